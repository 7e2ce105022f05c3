"""An autoscaler's machines as processes, each with a folder of its own for what Ray keeps on a machine's disk.

Runs in the cluster's own environment. As Ray has its fake machines, all keep their things in the head's folder, and
one that begins empties what a job has unpacked for the others.
"""

from functools import partial
from unittest.mock import patch

from ray._private.parameter import RayParams
from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider


class Processes(FakeMultiNodeProvider):
    def _create_node_with_resources_and_labels(self, *asked):
        with self.lock:
            self.made = getattr(self, "made", 0) + 1
            own = partial(RayParams, temp_dir=f"/tmp/ray/machine{self.made}")
            with patch("ray._private.parameter.RayParams", own):
                super()._create_node_with_resources_and_labels(*asked)
