"""Freed memory stays with the process."""

import platform
import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys, torch
from jem.pages import keep_freed_pages
if sys.argv[1] == "keep":
    keep_freed_pages()
def step():
    held = [torch.ones(12 * 2**20) for _ in range(2)]
for _ in range(20):  # until the heap has a place for each
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc")
def test_a_step_that_allocates_what_the_one_before_freed_fetches_no_page_anew():
    """Blocks beyond 32 MiB are always the system's; five times two of 48 MiB are 122,880 pages of 4 KiB."""
    faults = {
        how: int(subprocess.run([sys.executable, "-c", SCRIPT, how], capture_output=True, text=True, check=True).stdout)
        for how in ("keep", "leave")
    }
    assert faults["keep"] < 100
    assert faults["leave"] > 10 * (faults["keep"] + 1)
