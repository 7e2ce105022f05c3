"""Image files of 12-bit colours in 16 bits a channel, which Pillow reads as 8 bits and does not write."""

from __future__ import annotations

import struct
import zlib

import numpy as np


def deep_png(size: tuple[int, int] = (4, 4)) -> bytes:
    """A PNG of so many pixels across and down."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    across, down = size
    rows = (b"\0" + np.full((across, 3), 4095, ">u2").tobytes()) * down
    head = struct.pack(">IIBBBBB", across, down, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def deep_tiff(side: int = 4) -> bytes:
    """A TIFF."""
    pixel_bytes = np.full((side, side, 3), 4095, "<u2").tobytes()
    bits_at, pixels_at = 8 + 2 + 9 * 12 + 4, 8 + 2 + 9 * 12 + 4 + 6
    tags = [
        *((256, 3, 1, side), (257, 3, 1, side), (258, 3, 3, bits_at), (259, 3, 1, 1), (262, 3, 1, 2)),
        *((273, 4, 1, pixels_at), (277, 3, 1, 3), (278, 3, 1, side), (279, 4, 1, len(pixel_bytes))),
    ]
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    head = b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0)
    return head + struct.pack("<3H", 16, 16, 16) + pixel_bytes
