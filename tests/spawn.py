"""Real ranks: processes that gloo connects."""

import datetime
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from jem.world import World


def run_ranks(function, sizes, folder, *arguments):
    """`{size: [what function(world, *arguments) returned on rank 0, 1, ...]}` for worlds of these sizes.

    The processes are started once, as that is what takes time: a world of 2 is the first two of them.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    mp.spawn(_rank, (function, sizes, folder, arguments), nprocs=max(sizes))
    return {
        size: [torch.load(folder / f"{size}-{rank}.pt", weights_only=False) for rank in range(size)] for size in sizes
    }


def _rank(rank, function, sizes, folder, arguments):
    torch.set_num_threads(1)
    for size in sizes:
        if rank >= size:
            continue
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/meet-{size}",
            rank=rank,
            world_size=size,
            timeout=datetime.timedelta(seconds=60),
        )
        torch.save(function(World.current(), *arguments), folder / f"{size}-{rank}.pt")
        dist.barrier()
        dist.destroy_process_group()
    # All is on the disk: torch's threads that still run while the interpreter ends have aborted it (SIGABRT).
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
