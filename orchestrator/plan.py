"""What a run would be, without running it: --dry-run. No Ray, no data, no training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from jem.data.catalog import DataSpec, describe
from jem.data.stream import WINDOW_BYTES
from jem.errors import DataError
from jem.files import Location
from jem.models import make_network
from jem.train import dtype_of
from orchestrator.config import ON_DISK, RunConfig, to_yaml
from orchestrator.launch import check_before
from orchestrator.result import Result
from orchestrator.runs import check_kind, planned_folder


def plan(config: RunConfig) -> Result:
    """Print the resolved configuration and what it costs; the same figures as a Result."""
    folder = planned_folder(config)
    if "://" in folder or not (Path(folder) / "run.json").exists():
        check_before(config)
    if "://" not in folder and config.seeds == 1:
        check_kind(Location.of(folder))
    spec = describe(config.data)
    print(to_yaml(config))
    several, counts = _several(config)
    folder = planned_folder(replace(config, name=several.get("name", config.name)))
    name = str(several.get("name", config.name))
    rows = [*({"name": name, "folder": folder} | several).items(), ("data", spec.where)]
    metrics: dict[str, float] = {}
    if spec.image_shape is None or spec.n_classes is None:
        rows.append(("network", "unknown until the data are there: their image shape or classes are not known yet"))
    else:
        figures, metrics = _network(config, spec)
        rows += figures
    width = max(len(label) for label, _ in rows)
    for label, text in rows:
        print(f"{label:<{width}}  {text}")
    if config.data.name in ON_DISK and spec.n_classes is None:
        raise DataError(f"data.root: {spec.where}: the run would end at once; say where the images are")
    return Result(name=name, step=0, metrics=metrics | counts, status="planned")


def _several(config: RunConfig) -> tuple[dict[str, str], dict[str, float]]:
    """What more than one seed makes of it; the other figures are those of one run."""
    if config.seeds == 1:
        return {}, {}
    from orchestrator.sweep.seeds import planned

    return planned(config)


def _network(config: RunConfig, spec: DataSpec) -> tuple[list[tuple[str, str]], dict[str, float]]:
    assert spec.image_shape is not None
    assert spec.n_classes is not None
    with torch.device("meta"):
        network = make_network(config.model, spec.image_shape, spec.n_classes)
    forward, activations = forward_cost(network, spec.image_shape)
    parameters = sum(p.numel() for p in network.parameters())
    width = torch.finfo(dtype_of(config)).bits // 8
    stored = {"float32": width, "float16": 2, "uint8": 1}[config.replay.dtype]
    optimizer = config.optimizer
    copies = 2 + (2 if optimizer.name == "adam" else 1) + (optimizer.ema_decay > 0) + (optimizer.sam_rho > 0)
    samples = config.objective.samples_needed
    workers = config.min_workers  # the fewer they are, the more each of them holds
    share = -(-config.batch_size // workers)
    chains = -(-config.replay.capacity // workers) if samples else 0
    pixels = torch.Size(spec.image_shape).numel()
    held = {name: count * pixels for name, count in (spec.sizes or {}).items()}
    if config.data.stream:
        held["train"] = min(held["train"], 2 * WINDOW_BYTES)
    metrics = {
        "parameters": float(parameters),
        "flop_per_image": float(forward),
        "flop_per_step": float(forward * passes(config) * config.batch_size),
        "times_a_classifier": passes(config) / passes_of_classifier(config),
        "weights_bytes": float(parameters * width * copies),
        "replay_bytes_per_worker": float(chains * pixels * stored),
        "activations_bytes_per_worker": float(activations * width * share * held_passes(config)),
        "data_bytes_per_worker": float(sum(held.values())),
    }
    mib = {key: f"{value / 2**20:,.1f} MiB" for key, value in metrics.items() if "bytes" in key}
    classes = f"{spec.n_classes} classes"
    splits = ", ".join(f"{name} {count:,}" for name, count in (spec.sizes or {}).items())
    rows = [
        ("images", f"{' x '.join(map(str, spec.image_shape))}, {classes}" + (f", {splits}" if splits else "")),
        ("parameters", f"{parameters:,}"),
        ("a step", f"{metrics['flop_per_step'] / 1e9:,.2f} GFLOP, {metrics['times_a_classifier']:.1f} x a classifier"),
        (
            "memory, each worker",
            f"weights, gradients, moments {mib['weights_bytes']}; "
            f"chains {mib['replay_bytes_per_worker']}; activations about {mib['activations_bytes_per_worker']}; "
            f"data {mib['data_bytes_per_worker']}",
        ),
    ]
    return rows, metrics


def passes(config: RunConfig) -> float:
    """The cost of a step in forward passes of the batch: 2 an SGLD step, 3 a training pass.

    Training passes are of the data, of the samples, and of labelled images apart. The KL term costs 8 for each of its
    chains: E_theta and its gradient at x are 2, E_sg(theta) and its gradient at x' are 2, and the derivative of the
    first two in weights and activations is twice what they are, 4. The approximate mass costs 6 in the same way, as it
    has no E_sg(theta). SAM makes twice of all this, the chains apart.
    PYLD's inner steps, through the first layer alone, are not counted, nor what chains that adapt add to sgld.steps.
    """
    samples = config.objective.samples_needed
    mass = 6 * bool(config.objective.mass_weight)
    training = 3 * (1 + samples + labelled_apart(config)) + 8 * kl_share(config) + mass
    return 2 * config.sgld.steps * samples + (2 if config.optimizer.sam_rho else 1) * training


def held_passes(config: RunConfig) -> float:
    """Batches whose activations are held at once; of the KL term's chains those at x, their gradients, those at x'."""
    mass = 2 * bool(config.objective.mass_weight)  # at data, and their gradients
    return 1 + config.objective.samples_needed + labelled_apart(config) + 3 * kl_share(config) + mass


def labelled_apart(config: RunConfig) -> float:
    """Images of a step that go through the network for cross-entropy alone, in batches."""
    if config.data.labels_per_class is None:
        return 0.0 if config.data.augment_p_x else 1.0
    return (config.data.labelled_batch_size or config.batch_size) / config.batch_size


def kl_share(config: RunConfig) -> float:
    """Chains that the KL term differentiates, in batches."""
    if not config.objective.kl_weight:
        return 0.0
    return (config.objective.kl_samples or config.batch_size) / config.batch_size


def passes_of_classifier(config: RunConfig) -> float:
    """The same for a classifier on the images that have labels."""
    if config.data.labels_per_class is None:
        return 3.0
    return 3 * labelled_apart(config)


def forward_cost(network: nn.Module, image_shape: tuple[int, int, int]) -> tuple[int, int]:
    """FLOP of one image's forward pass, and the numbers that its layers' outputs hold; nothing is computed."""
    held = 0

    def count(_module: nn.Module, _inputs: Any, output: Any) -> None:
        nonlocal held
        held += output.numel()

    handles = [m.register_forward_hook(count) for m in network.modules() if not list(m.children())]
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        network.eval()(torch.zeros(1, *image_shape, device="meta"))
    for handle in handles:
        handle.remove()
    return counter.get_total_flops(), held
