"""Freed memory stays with the process."""

import platform
import subprocess
import sys

import pytest

SCRIPT = """
import resource, torch
from jem.pages import keep_freed_pages
def step():
    held = [torch.ones(12 * 2**20) for _ in range(2)]
def faults(warm_up):
    for _ in range(warm_up):
        step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
left = faults(5)
keep_freed_pages()
print(left, faults(20))  # until the heap has a place for each
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc")
def test_a_step_that_allocates_what_the_one_before_freed_fetches_no_page_anew():
    """Blocks beyond 32 MiB are always the system's; five times two of 48 MiB are 122,880 pages of 4 KiB."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    left, kept = map(int, done.stdout.split())
    assert kept < 100
    assert left > 10 * (kept + 1)
