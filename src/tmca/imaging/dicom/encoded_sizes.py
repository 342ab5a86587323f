"""How large a compressed frame is, told by its bytes before it is decoded: a file's header may say something else."""

from __future__ import annotations

import itertools
import struct

_BOX_BYTES = 8  # at least, before each box of a JP2
_FRAME_HEADERS = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}  # SOF markers of JPEG and JPEG-LS
_BARE_MARKERS = {0x00, 0x01, *range(0xD0, 0xD9)}  # without a length


def jpeg2000_sizes(encoded: bytes) -> list[tuple[int, int, int]]:
    """Return rows, columns and samples by the size marker of a JPEG 2000 stream, which may stand in the boxes of a JP2.

    The marker comes second in a stream (ISO/IEC 15444-1 A.3); where it does not, nothing is returned.
    """
    start = 0
    if encoded[4:8] == b"jP  ":
        while encoded[start + 4 : start + 8] != b"jp2c":
            length = int.from_bytes(encoded[start : start + 4], "big")
            if length < _BOX_BYTES:
                return []
            start += length
        start += _BOX_BYTES
    if encoded[start : start + 4] != b"\xff\x4f\xff\x51" or len(encoded) < start + 42:
        return []
    width, height, left, top, samples = struct.unpack(">IIII16xH", encoded[start + 8 : start + 42])
    return [(height - top, width - left, samples)]


def jpeg_sizes(encoded: bytes) -> list[tuple[int, int, int]]:
    """Return rows, columns and samples by each frame header of a JPEG or JPEG-LS stream before its first scan."""
    sizes = []
    place = 2 if encoded.startswith(b"\xff\xd8") else len(encoded)
    while place + 9 < len(encoded) and encoded[place] == 0xFF and encoded[place + 1] != 0xDA:
        marker, length = encoded[place + 1], int.from_bytes(encoded[place + 2 : place + 4], "big")
        if marker in _FRAME_HEADERS:
            sizes.append(struct.unpack(">HHB", encoded[place + 5 : place + 10]))
        if marker == 0xFF:  # any number of these may stand before a marker
            place += 1
        else:
            place += 2 if marker in _BARE_MARKERS else 2 + length
    return sizes


def is_longer_than(encoded: bytes, limit: int) -> bool:
    """Return whether a segment of an RLE frame (PS3.5 G.3) is longer than so many bytes once it is decoded."""
    if len(encoded) < 64:
        return False
    count, *starts = struct.unpack("<16L", encoded[:64])
    starts = [*starts[:count], len(encoded)]
    for start, end in itertools.pairwise(starts):
        place, length = start, 0
        while place < min(end, len(encoded)) and length <= limit:
            control = encoded[place]
            if control < 128:  # that many bytes and one more follow
                length += control + 1
                place += control + 2
            elif control > 128:  # one byte follows, which is repeated
                length += 257 - control
                place += 2
            else:
                place += 1
        if length > limit:
            return True
    return False
