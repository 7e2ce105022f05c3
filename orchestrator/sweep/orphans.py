"""CPUs that nobody uses and nobody gives back: those of a trial's workers whose own process was killed."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

log = logging.getLogger(__name__)

LOOK_EVERY_S = 2.0


@contextmanager
def freeing_orphans() -> Iterator[None]:
    """While open, remove this job's placement groups whose creators are dead.

    Ray keeps one as long as the job lives. Ray Train has a cleaner that asks the dashboard, which a private Ray does
    not run, and which did not free them in time where it ran: a trial that was killed would wait for its own CPUs.
    """
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(LOOK_EVERY_S):
            try:
                free_orphans()
            except Exception as error:  # a cluster that is busy: the next look may tell
                log.debug("placement groups cannot be looked at: %s", error)

    thread = threading.Thread(target=watch, daemon=True, name="orphans")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(LOOK_EVERY_S)


def free_orphans() -> int:
    """Once; how many there were."""
    import ray
    from ray._private.state import state  # the public table does not tell who made a group
    from ray.core.generated.gcs_pb2 import PlacementGroupTableData
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    job, removed = ray.get_runtime_context().get_job_id(), 0
    for raw in state._connect_and_get_accessor().get_placement_group_table():
        group = PlacementGroupTableData.FromString(raw)
        ours = group.creator_job_id.hex() == job and group.creator_actor_id.strip(b"\xff")
        if ours and group.creator_actor_dead and group.state != PlacementGroupTableData.REMOVED:
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))
            log.info("the CPUs of a trial that was killed are free again")
            removed += 1
    return removed
