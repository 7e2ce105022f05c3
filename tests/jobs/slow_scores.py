"""small_conv that takes SLOWLY seconds a batch: the scores are the same."""

import os
import time

from torch import nn

from jem.models import small_conv


class Slow(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        time.sleep(float(os.environ.get("SLOWLY", "0")))
        return self.network(x)


def slow(config, image_shape, n_classes):
    return Slow(small_conv(config, image_shape, n_classes))
