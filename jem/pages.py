"""Memory that the C library keeps."""

from __future__ import annotations

import contextlib
import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
MOST = 2**31 - 1


def keep_freed_pages() -> None:
    """What this process frees it keeps for its next allocation, where the C library is glibc; elsewhere no change.

    By default glibc returns large blocks to the system, and every step fetches them again page by page, each cleared
    (docs/performance.md).
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(M_TRIM_THRESHOLD, MOST)
        libc.mallopt(M_MMAP_THRESHOLD, MOST)
