"""Build the index file that Megatron-LM writes beside a file of token ids.

# Sequences of 3, 2 and 4 tokens; the first document has sequence 0, the second has the sequences 1 and 2.
path.write_bytes(build_megatron_index(lengths=[3, 2, 4], bounds=[0, 1, 3]))
"""

import struct
from collections.abc import Sequence

import numpy as np


def build_megatron_index(
    lengths: Sequence[int],
    bounds: Sequence[int],
    *,
    dtype_code: int = 8,
    magic: bytes = b"MMIDIDX\0\0",
    version: int = 1,
    pointers: Sequence[int] | None = None,
    modes: bytes = b"",
    id_bytes: int = 2,
) -> bytes:
    """Return the content of an .idx file.

    `lengths` are the tokens of each sequence. `bounds` has the first sequence of each document, then the number of
    sequences. The dtype code 8 stands for uint16, and an id has `id_bytes` bytes. `pointers` are the byte offsets of
    the sequences; None: they follow each other. `modes` are the bytes at the end of the index of multimodal data.
    """
    byte_offsets = np.cumsum([0, *lengths])[:-1] * id_bytes if pointers is None else pointers
    head = magic + struct.pack("<QBQQ", version, dtype_code, len(lengths), len(bounds))
    arrays = np.array(lengths, "<i4"), np.array(byte_offsets, "<i8"), np.array(bounds, "<i8")
    return head + b"".join(array.tobytes() for array in arrays) + modes
