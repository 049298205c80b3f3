"""Read token files of other programs: their header, the type of their ids, and where documents begin.

megatron  X.bin: ids only. X.idx: magic, version, dtype, the length of each sequence, and the first sequence of each
          document.
npy       one array, written by numpy.save.
bin       ids only, of a dtype that the user must give (nanoGPT, OLMo).
llmc      256 int32: magic, version, number of ids; then the ids (llm.c and its descendants).

Each file is a header and one flat array, which is a shard of ours with `skip_bytes`. If a file has no document
boundaries, they are found by `<|endoftext|>`. It ends a document; in llmc files, or by option, it begins one.
"""

import io
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dist_llm.data.order import Ints
from dist_llm.data.shard import DType
from dist_llm.errors import DataError
from dist_llm.io.urls import is_remote

# Ids are never negative, so a signed type is read as the unsigned type of its size.
READ_AS: dict[str, DType] = {"uint16": "uint16", "int16": "uint16", "uint32": "uint32", "int32": "uint32"}

MEGATRON_MAGIC, MEGATRON_VERSION = b"MMIDIDX\x00\x00", 1
MEGATRON_HEADER = struct.Struct("<9sQBQQ")  # magic, version, type, sequences, documents + 1
MEGATRON_TYPES = dict(enumerate(("uint8", "int8", "int16", "int32", "int64", "float64", "float32", "uint16"), start=1))
LLMC_HEADER_BYTES = 256 * 4
LLMC_TYPES: dict[tuple[int, int], DType] = {(20240520, 1): "uint16", (20240801, 7): "uint32"}  # by magic and version

ReadFile = Callable[[str], bytes]


@dataclass(frozen=True)
class TokenFileHeader:
    """The layout of a file. `tokens` and the documents' `starts` are None if the file does not contain them."""

    dtype: DType
    skip_bytes: int = 0
    tokens: int | None = None
    starts: Ints | None = None


def locate_data_file(kind: str, location: str) -> str:
    """Return the file of the ids. Megatron's files are often named without their suffix."""
    return location.removesuffix(".bin") + ".bin" if kind == "megatron" else location


def read_header(kind: str, location: str, head: bytes, declared: str | None, read: ReadFile) -> TokenFileHeader:
    """Return the header of the file at `location` that begins with `head`. `read` returns the content of another file.

    Raises DataError with file and offset if the format or the dtype of the ids is not supported.
    """
    if kind == "megatron":
        index = location.removesuffix(".bin") + ".idx"
        return _parse_megatron(index, read(index))
    if kind == "npy":
        return _parse_npy(location, head)
    if kind == "llmc":
        return _parse_llmc(location, head)
    if declared is None:
        raise DataError(f"{location}: a .bin file does not store its dtype. Give --dtype: {', '.join(READ_AS)}.")
    return TokenFileHeader(_check_dtype(location, 0, declared))


def _check_dtype(location: str, offset: int, dtype: str) -> DType:
    if dtype not in READ_AS:
        raise DataError(
            f"{location}: byte {offset}: ids of type {dtype}; supported are {', '.join(READ_AS)}, little-endian. "
            "Convert it with numpy: array.astype('<u4')."
        )
    return READ_AS[dtype]


def _parse_megatron(location: str, content: bytes) -> TokenFileHeader:
    if len(content) < MEGATRON_HEADER.size or not content.startswith(MEGATRON_MAGIC):
        raise DataError(f"{location}: byte 0: not a Megatron index ({content[:9]!r}, not {MEGATRON_MAGIC!r}).")
    _, version, code, n_sequences, n_bounds = MEGATRON_HEADER.unpack_from(content)
    if version != MEGATRON_VERSION:
        raise DataError(f"{location}: byte 9: version {version}; only version {MEGATRON_VERSION} is supported.")
    dtype = _check_dtype(location, 17, MEGATRON_TYPES.get(code, f"number {code}"))
    expected = MEGATRON_HEADER.size + 12 * n_sequences + 8 * n_bounds
    if len(content) != expected:
        why = "truncated" if len(content) < expected else "too long, as with sequence modes, which are not text"
        raise DataError(
            f"{location}: byte {min(expected, len(content))}: {why}: {len(content)} bytes, but {n_sequences} sequences "
            f"and {n_bounds} document bounds make {expected}. Copy it again or make it again."
        )
    offset = MEGATRON_HEADER.size
    lengths = np.frombuffer(content, "<i4", n_sequences, offset).astype(np.int64)
    pointers = np.frombuffer(content, "<i8", n_sequences, offset + 4 * n_sequences)
    bounds = np.frombuffer(content, "<i8", n_bounds, offset + 12 * n_sequences)
    ends = np.concatenate([[0], np.cumsum(lengths)])
    if len(negative := np.flatnonzero(lengths < 0)):
        at = offset + 4 * int(negative[0])
        raise DataError(
            f"{location}: byte {at}: sequence {negative[0]} has {lengths[negative[0]]} tokens. Copy it again or make "
            "it again."
        )
    if len(misplaced := np.flatnonzero(pointers != ends[:-1] * np.dtype(dtype).itemsize)):
        at = offset + 4 * n_sequences + 8 * int(misplaced[0])
        raise DataError(
            f"{location}: byte {at}: sequence {misplaced[0]} does not follow the previous one. Make it again."
        )
    if not len(bounds) or bounds[0] or bounds[-1] != n_sequences or (np.diff(bounds) < 0).any():
        at = offset + 12 * n_sequences
        raise DataError(f"{location}: byte {at}: document bounds do not ascend from 0 to {n_sequences}. Make it again.")
    starts = np.unique(ends[bounds[:-1]])  # without repetitions: a document may be empty
    return TokenFileHeader(dtype, 0, int(ends[-1]), starts[starts < ends[-1]])


def _parse_npy(location: str, head: bytes) -> TokenFileHeader:
    file = io.BytesIO(head)
    try:
        readers: dict[Any, Any] = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }
        shape, _, dtype = readers[np.lib.format.read_magic(file)](file)
    except Exception as error:  # numpy parses the header as Python text and raises many types
        raise DataError(f"{location}: byte 0: not an array that numpy.save wrote: {error!r}") from None
    if len(shape) != 1:
        raise DataError(f"{location}: byte 8: an array of shape {shape}; ids must be flat: save array.reshape(-1).")
    name = dtype.name if dtype == dtype.newbyteorder("<") else f"{dtype.name}, big-endian"
    return TokenFileHeader(_check_dtype(location, 8, name), file.tell(), shape[0])


def _parse_llmc(location: str, head: bytes) -> TokenFileHeader:
    if len(head) < LLMC_HEADER_BYTES:
        raise DataError(f"{location}: byte {len(head)}: truncated: the header alone has {LLMC_HEADER_BYTES} bytes.")
    magic, version, tokens = struct.unpack_from("<iii", head)
    if (magic, version) not in LLMC_TYPES:
        known = " or ".join(f"{magic} and {version}" for magic, version in LLMC_TYPES)
        raise DataError(f"{location}: byte 0: magic {magic} and version {version}; llm.c's token files have {known}.")
    return TokenFileHeader(LLMC_TYPES[magic, version], LLMC_HEADER_BYTES, tokens)


class TokenFileScan:
    """One pass over the bytes of a file: counts the ids, checks them, and sums the bytes of their text.

    `text_bytes` has the length of the text of each id.
    """

    def __init__(self, location: str, header: TokenFileHeader, eot: int, text_bytes: npt.NDArray[np.uint16]) -> None:
        self.location, self.header, self.eot, self._lengths = location, header, eot, text_bytes
        self.dtype = np.dtype(header.dtype).newbyteorder("<")
        self.tokens = self.text_bytes = self.size = 0
        self.eots: list[Ints] = []
        self._rest = b""

    def add(self, block: bytes) -> None:
        """Scan the next bytes. Raises DataError for an id that the tokenizer does not have."""
        header_bytes = max(0, self.header.skip_bytes - self.size)
        self.size += len(block)
        data = self._rest + block[header_bytes:]
        count = len(data) // self.dtype.itemsize
        ids, self._rest = np.frombuffer(data, self.dtype, count), data[count * self.dtype.itemsize :]
        if not count:
            return
        if ids.max() >= len(self._lengths):
            index = int(np.flatnonzero(ids >= len(self._lengths))[0])
            at = self.tokens + index
            raise DataError(
                f"{self.location}: token {at} (byte {self.header.skip_bytes + at * self.dtype.itemsize}) is "
                f"{ids[index]}, but the tokenizer has {len(self._lengths)} ids. Check --tokenizer, --format and "
                "--dtype."
            )
        self.text_bytes += int(self._lengths[ids].sum(dtype=np.int64))
        if self.header.starts is None:
            self.eots.append(self.tokens + np.flatnonzero(ids == self.eot))
        self.tokens += count

    def check(self) -> None:
        """Check the file at its end. Raises DataError if its length is wrong."""
        check_size(self.location, self.header, self.size)

    @property
    def has_document_bounds(self) -> bool:
        """Whether the file marks where documents begin or end."""
        return self.header.starts is not None or any(map(len, self.eots))

    @property
    def has_leading_eot(self) -> bool:
        """Whether separators seem to begin documents: the first id is one, and the last is not."""
        boundaries = [position for each in self.eots if len(each) for position in (int(each[0]), int(each[-1]))]
        return bool(boundaries) and boundaries[0] == 0 and boundaries[-1] < self.tokens - 1

    def compute_starts(self, eot_at_start: bool) -> Ints:
        """Return the first token of each document. A file that begins inside a document begins with the rest of it."""
        if self.header.starts is not None:
            return self.header.starts
        boundaries = np.concatenate([np.zeros(1, np.int64), *(each + (not eot_at_start) for each in self.eots)])
        return np.unique(boundaries[boundaries < self.tokens])


def check_size(location: str, header: TokenFileHeader, size: int) -> None:
    """Raise DataError unless a file of `size` bytes has complete ids, as many as its header says."""
    item = np.dtype(header.dtype).itemsize
    tokens, remainder = divmod(size - header.skip_bytes, item)
    hint = "Fetch it again." if is_remote(location) else "Copy it again."
    if header.tokens is not None and size != header.skip_bytes + header.tokens * item:
        expected = header.skip_bytes + header.tokens * item
        kind = "truncated" if size < expected else "too long"
        raise DataError(
            f"{location}: {kind} at byte {min(size, expected)}: {size} bytes, but {header.tokens} ids of "
            f"{header.dtype} after {header.skip_bytes} bytes make {expected}. {hint}"
        )
    if remainder:
        raise DataError(
            f"{location}: truncated at byte {size}: {size} bytes are not whole ids of {header.dtype}. "
            f"{hint} Or is it of another --dtype?"
        )
    if not tokens:
        raise DataError(f"{location}: byte {size}: no ids in it. Leave it out.")
