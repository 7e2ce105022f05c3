"""compile=true: the chains' gradient through the compiler, and what becomes of it where there is none."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

STORIES = Path(__file__).with_name("compiled_stories.py")

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What each story returned."""
    folder = tmp_path_factory.mktemp("compiled")
    environment = os.environ | {
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache"),
        "TORCHINDUCTOR_VEC_ISA_OK": "1",  # else it compiles a program to find out
        "TORCHINDUCTOR_COMPILE_THREADS": "1",  # else it starts processes that compile
    }
    command = [sys.executable, str(STORIES), str(folder / "told.json")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "told.json").read_text())


@pytest.mark.parametrize("energy", ["marginal", "conditional"])
def test_energies_and_gradients_are_those_of_autograd_as_the_weights_change(told, energy):
    assert told[energy]["said"] == []
    assert 0 <= told[energy]["difference"] < 1e-5


def test_code_that_is_compiled_anew_goes_through_the_same_bits(told):
    one, other = told["trained"]
    assert one == other


@pytest.mark.parametrize("story", ["odd", "no_compiler"])
def test_what_cannot_be_compiled_runs_as_it_is_with_one_warning(told, story):
    assert told[story]["difference"] == 0
    assert len(told[story]["said"]) == 1
    assert told[story]["said"][0].startswith("compile=true: the chains are not compiled but run as they are: ")


def test_an_error_of_the_networks_own_is_raised_as_it_is(told):
    assert told["broken"].endswith("mat1 and mat2 shapes cannot be multiplied (2x64 and 3x2)")
