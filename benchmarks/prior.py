"""How near to data chains start:  python benchmarks/prior.py RECIPE [key=value ...] [--out FILE]

FID and its kin of draws of the Gaussian prior itself, no SGLD step taken: what samples of chains that start there are
to be compared with.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from common import machine, save

from jem.data.augment import to_float
from jem.data.sources import load
from jem.evaluate.extractors import extractor_for
from jem.evaluate.generation import figures
from jem.prior import fit_classes, make_prior
from jem.randomness import generator
from orchestrator.config import load_run_config

DRAWS = 1000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("settings", nargs="*", metavar="key=value")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_intermixed_args()
    config = load_run_config(arguments.recipe, ["replay.prior=gaussian", *arguments.settings])
    data = load(config.data)
    extractor = extractor_for(config.data, data.image_shape)
    reference, _ = extractor.features(to_float(data.train.images, torch.float32))
    prior = make_prior(config, data.train, data.n_classes, fit_classes(config, data.train, data.n_classes), "cpu")
    draws = prior.sample(torch.arange(DRAWS) % data.n_classes, generator("cpu", config.seed, "prior alone"))
    found = figures(*extractor.features(draws), reference)
    command = " ".join(["python benchmarks/prior.py", *sys.argv[1:]])
    save({"command": command, "hardware": machine(), "seed": config.seed, "draws": DRAWS, **found}, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
