"""A network of a user's own: model.name=slow_net:slow, with model.options.pause and .nan_after."""

import math
import time

from torch import nn

from jem.errors import DataError
from jem.models import small_conv


class Slow(nn.Module):
    """A small convolution net whose training passes take `pause` seconds more, and fail after `nan_after` of them."""

    def __init__(self, config, image_shape, n_classes):
        super().__init__()
        self.net = small_conv(config, image_shape, n_classes)
        self.pause = config.options.get("pause", 0.0)
        self.nan_after = config.options.get("nan_after", math.inf)
        self.passes = 0

    def forward(self, x):
        if self.training:
            time.sleep(self.pause)
            self.passes += 1
        out = self.net(x)
        return out * math.nan if self.training and self.passes > self.nan_after else out


def slow(config, image_shape, n_classes):
    return Slow(config, image_shape, n_classes)


def absent(config):
    raise DataError("the disk with the images is not mounted")
