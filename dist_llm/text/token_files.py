"""Read the token files of other programs: the header, the dtype of the ids, and the starts of documents.

megatron  X.bin: ids only. X.idx: magic, version, dtype, the length of each sequence, and the first sequence of each
          document.
npy       One array, written by numpy.save.
bin       Ids only. The user must give their dtype (nanoGPT, OLMo).
llmc      A header of 256 int32 (magic, version, number of ids, ...), then the ids (llm.c and its descendants).

A file consists of a header and one flat array of ids, so it can be a shard of our format with `skip_bytes`. If the
format has no document boundaries, the token `<|endoftext|>` marks them. It ends a document or, in llmc files and by
option, begins one.
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

# Ids are never negative, so a signed dtype is read as the unsigned dtype of the same size.
SUPPORTED_DTYPES: dict[str, DType] = {"uint16": "uint16", "int16": "uint16", "uint32": "uint32", "int32": "uint32"}

MEGATRON_MAGIC, MEGATRON_VERSION = b"MMIDIDX\x00\x00", 1
MEGATRON_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, number of sequences, number of documents + 1
MEGATRON_DTYPES = dict(enumerate(("uint8", "int8", "int16", "int32", "int64", "float64", "float32", "uint16"), start=1))
LLMC_HEADER_BYTES = 256 * 4
LLMC_DTYPES: dict[tuple[int, int], DType] = {(20240520, 1): "uint16", (20240801, 7): "uint32"}  # by (magic, version)

ReadFile = Callable[[str], bytes]


@dataclass(frozen=True)
class TokenFileHeader:
    """The layout of a token file. Optional fields are None if the file does not store them."""

    dtype: DType
    skip_bytes: int = 0  # size of the header
    num_tokens: int | None = None
    document_starts: Ints | None = None  # first token of each document


def locate_data_file(file_format: str, location: str) -> str:
    """Return the location of the file with the ids. Megatron users often leave out the suffix .bin."""
    return location.removesuffix(".bin") + ".bin" if file_format == "megatron" else location


def read_header(
    file_format: str, location: str, first_bytes: bytes, given_dtype: str | None, read_file: ReadFile
) -> TokenFileHeader:
    """Return the header of the file at `location`, whose content begins with `first_bytes`.

    `read_file` reads the index of a megatron file. Raises DataError, with file and offset, if the format or the dtype
    of the ids is not supported.
    """
    if file_format == "megatron":
        index_location = location.removesuffix(".bin") + ".idx"
        return _parse_megatron(index_location, read_file(index_location))
    if file_format == "npy":
        return _parse_npy(location, first_bytes)
    if file_format == "llmc":
        return _parse_llmc(location, first_bytes)
    if given_dtype is None:
        supported = ", ".join(SUPPORTED_DTYPES)
        raise DataError(f"{location}: a .bin file does not store its dtype. Give --dtype: {supported}.")
    return TokenFileHeader(_to_unsigned_dtype(location, 0, given_dtype))


def _to_unsigned_dtype(location: str, byte_offset: int, dtype: str) -> DType:
    """Return the unsigned dtype in which ids of `dtype` are read. Raises DataError if it is not supported."""
    if dtype not in SUPPORTED_DTYPES:
        raise DataError(
            f"{location}: byte {byte_offset}: ids of type {dtype}; supported are {', '.join(SUPPORTED_DTYPES)}, "
            "little-endian. Convert it with numpy: array.astype('<u4')."
        )
    return SUPPORTED_DTYPES[dtype]


def _parse_megatron(location: str, content: bytes) -> TokenFileHeader:
    """Parse the index X.idx of a Megatron file. Raises DataError, with the byte offset, if it is damaged."""
    if len(content) < MEGATRON_HEADER.size or not content.startswith(MEGATRON_MAGIC):
        raise DataError(f"{location}: byte 0: not a Megatron index ({content[:9]!r}, not {MEGATRON_MAGIC!r}).")
    _, version, dtype_code, num_sequences, num_bounds = MEGATRON_HEADER.unpack_from(content)
    if version != MEGATRON_VERSION:
        raise DataError(f"{location}: byte 9: version {version}; only version {MEGATRON_VERSION} is supported.")
    dtype = _to_unsigned_dtype(location, 17, MEGATRON_DTYPES.get(dtype_code, f"number {dtype_code}"))
    expected_bytes = MEGATRON_HEADER.size + 12 * num_sequences + 8 * num_bounds
    if len(content) != expected_bytes:
        is_truncated = len(content) < expected_bytes
        problem = "truncated" if is_truncated else "too long, as with sequence modes, which are not text"
        raise DataError(
            f"{location}: byte {min(expected_bytes, len(content))}: {problem}: {len(content)} bytes, but "
            f"{num_sequences} sequences and {num_bounds} document bounds make {expected_bytes}. Copy it again or make "
            "it again."
        )
    lengths_offset = MEGATRON_HEADER.size
    pointers_offset = lengths_offset + 4 * num_sequences
    bounds_offset = pointers_offset + 8 * num_sequences
    sequence_lengths = np.frombuffer(content, "<i4", num_sequences, lengths_offset).astype(np.int64)
    sequence_pointers = np.frombuffer(content, "<i8", num_sequences, pointers_offset)  # first byte of each sequence
    document_bounds = np.frombuffer(content, "<i8", num_bounds, bounds_offset)  # indices of sequences
    token_ends = np.concatenate([[0], np.cumsum(sequence_lengths)])
    if len(negative := np.flatnonzero(sequence_lengths < 0)):
        byte_offset = lengths_offset + 4 * int(negative[0])
        raise DataError(
            f"{location}: byte {byte_offset}: sequence {negative[0]} has {sequence_lengths[negative[0]]} tokens. "
            "Copy it again or make it again."
        )
    if len(misplaced := np.flatnonzero(sequence_pointers != token_ends[:-1] * np.dtype(dtype).itemsize)):
        byte_offset = pointers_offset + 8 * int(misplaced[0])
        raise DataError(
            f"{location}: byte {byte_offset}: sequence {misplaced[0]} does not follow the previous one. Make it again."
        )
    ascends = len(document_bounds) > 0 and (np.diff(document_bounds) >= 0).all()
    if not ascends or document_bounds[0] or document_bounds[-1] != num_sequences:
        raise DataError(
            f"{location}: byte {bounds_offset}: document bounds do not ascend from 0 to {num_sequences}. Make it again."
        )
    starts = np.unique(token_ends[document_bounds[:-1]])  # an empty document has the same start as the next one
    num_tokens = int(token_ends[-1])
    return TokenFileHeader(dtype, num_tokens=num_tokens, document_starts=starts[starts < num_tokens])


def _parse_npy(location: str, first_bytes: bytes) -> TokenFileHeader:
    """Parse the header of an array that numpy.save wrote."""
    file = io.BytesIO(first_bytes)
    try:
        reader_of_version: dict[Any, Any] = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }
        shape, _, dtype = reader_of_version[np.lib.format.read_magic(file)](file)
    except Exception as error:  # numpy evaluates the header as Python text and raises many types
        raise DataError(f"{location}: byte 0: not an array that numpy.save wrote: {error!r}") from None
    if len(shape) != 1:
        raise DataError(f"{location}: byte 8: an array of shape {shape}; ids must be flat: save array.reshape(-1).")
    dtype_name = dtype.name if dtype == dtype.newbyteorder("<") else f"{dtype.name}, big-endian"
    return TokenFileHeader(_to_unsigned_dtype(location, 8, dtype_name), skip_bytes=file.tell(), num_tokens=shape[0])


def _parse_llmc(location: str, first_bytes: bytes) -> TokenFileHeader:
    """Parse the header of a token file of llm.c."""
    if len(first_bytes) < LLMC_HEADER_BYTES:
        raise DataError(
            f"{location}: byte {len(first_bytes)}: truncated: the header alone has {LLMC_HEADER_BYTES} bytes."
        )
    magic, version, num_tokens = struct.unpack_from("<iii", first_bytes)
    if (magic, version) not in LLMC_DTYPES:
        supported = " or ".join(f"{magic} and {version}" for magic, version in LLMC_DTYPES)
        raise DataError(
            f"{location}: byte 0: magic {magic} and version {version}; llm.c's token files have {supported}."
        )
    return TokenFileHeader(LLMC_DTYPES[magic, version], LLMC_HEADER_BYTES, num_tokens)


class TokenFileScan:
    """Scans a token file block by block: counts and checks the ids, and sums the bytes of their text.

    `text_bytes_of_id` has, for each id of the tokenizer, the number of bytes of its text.
    """

    def __init__(
        self, location: str, header: TokenFileHeader, eot: int, text_bytes_of_id: npt.NDArray[np.uint16]
    ) -> None:
        self.location, self.header, self.eot, self._text_bytes_of_id = location, header, eot, text_bytes_of_id
        self.dtype = np.dtype(header.dtype).newbyteorder("<")
        self.num_tokens = self.text_bytes = self.num_bytes = 0
        self.eot_positions: list[Ints] = []  # per block
        self._incomplete_id = b""  # the last bytes of the previous block

    def add(self, block: bytes) -> None:
        """Scan the next bytes. Raises DataError for an id that the tokenizer does not have."""
        header_bytes = max(0, self.header.skip_bytes - self.num_bytes)
        self.num_bytes += len(block)
        content = self._incomplete_id + block[header_bytes:]
        num_ids = len(content) // self.dtype.itemsize
        ids = np.frombuffer(content, self.dtype, num_ids)
        self._incomplete_id = content[num_ids * self.dtype.itemsize :]
        if not num_ids:
            return
        vocab_size = len(self._text_bytes_of_id)
        if ids.max() >= vocab_size:
            index = int(np.flatnonzero(ids >= vocab_size)[0])
            position = self.num_tokens + index
            raise DataError(
                f"{self.location}: token {position} (byte {self.header.skip_bytes + position * self.dtype.itemsize}) "
                f"is {ids[index]}, but the tokenizer has {vocab_size} ids. Check --tokenizer, --format and --dtype."
            )
        self.text_bytes += int(self._text_bytes_of_id[ids].sum(dtype=np.int64))
        if self.header.document_starts is None:
            self.eot_positions.append(self.num_tokens + np.flatnonzero(ids == self.eot))
        self.num_tokens += num_ids

    def check(self) -> None:
        """Check the size of the file after the last block. Raises DataError if the size is wrong."""
        check_size(self.location, self.header, self.num_bytes)

    @property
    def has_document_bounds(self) -> bool:
        """Whether the file marks where documents begin or end."""
        return self.header.document_starts is not None or any(map(len, self.eot_positions))

    @property
    def has_leading_eot(self) -> bool:
        """Whether end-of-document tokens seem to begin documents: one is the first id, and none is the last id."""
        non_empty = [positions for positions in self.eot_positions if len(positions)]
        return bool(non_empty) and int(non_empty[0][0]) == 0 and int(non_empty[-1][-1]) < self.num_tokens - 1

    def compute_starts(self, eot_at_start: bool) -> Ints:
        """Return the first token of each document. The ids before the first boundary count as a document."""
        if self.header.document_starts is not None:
            return self.header.document_starts
        shift = 0 if eot_at_start else 1
        starts = np.concatenate([np.zeros(1, np.int64), *(positions + shift for positions in self.eot_positions)])
        return np.unique(starts[starts < self.num_tokens])


def check_size(location: str, header: TokenFileHeader, num_bytes: int) -> None:
    """Raise DataError unless a file of `num_bytes` bytes has complete ids, as many as its header says."""
    id_bytes = np.dtype(header.dtype).itemsize
    num_tokens, extra_bytes = divmod(num_bytes - header.skip_bytes, id_bytes)
    hint = "Fetch it again." if is_remote(location) else "Copy it again."
    if header.num_tokens is not None and num_bytes != header.skip_bytes + header.num_tokens * id_bytes:
        expected_bytes = header.skip_bytes + header.num_tokens * id_bytes
        problem = "truncated" if num_bytes < expected_bytes else "too long"
        raise DataError(
            f"{location}: {problem} at byte {min(num_bytes, expected_bytes)}: {num_bytes} bytes, but "
            f"{header.num_tokens} ids of {header.dtype} after {header.skip_bytes} bytes make {expected_bytes}. {hint}"
        )
    if extra_bytes:
        raise DataError(
            f"{location}: truncated at byte {num_bytes}: {num_bytes} bytes are not whole ids of {header.dtype}. "
            f"{hint} Or give another --dtype."
        )
    if not num_tokens:
        raise DataError(f"{location}: byte {num_bytes}: no ids in it. Leave the file out.")
