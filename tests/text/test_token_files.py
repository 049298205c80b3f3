"""read_header and TokenFileScan read token files of other programs (Megatron, numpy, llm.c, raw ids).

An error names the byte where the file is damaged.
"""

import struct

import numpy as np
import pytest

from dist_llm.errors import DataError
from dist_llm.text.token_files import TokenFileHeader, TokenFileScan, check_size, locate_data_file, read_header

from .megatron_index import build_megatron_index

VOCAB_SIZE, EOT = 300, 256  # number of ids, id of the end of a document
BYTES_OF_ID = np.arange(VOCAB_SIZE).astype(np.uint16)  # bytes of text per id: id n stands for n bytes


def read_header_of(file_format, first_bytes=b"", given_dtype=None, idx=b""):
    """Read the header of a file that begins with `first_bytes`. `idx` is the content of its Megatron index."""
    return read_header(file_format, "here/x.bin", first_bytes, given_dtype, read_file=lambda path: idx)


def make_llmc_header(magic, version, num_tokens):
    """Return a header of llm.c: three int32 numbers, padded with zeros to 1024 bytes."""
    return struct.pack("<iii", magic, version, num_tokens).ljust(1024, b"\0")


def save_npy(tmp_path, array):
    """Save the array with numpy and return the content of the file."""
    np.save(tmp_path / "x.npy", array)
    return (tmp_path / "x.npy").read_bytes()


def test_a_megatron_index_gives_dtype_length_and_documents():
    header = read_header_of("megatron", idx=build_megatron_index([3, 2, 4], [0, 1, 3]))
    assert (header.dtype, header.skip_bytes, header.num_tokens) == ("uint16", 0, 3 + 2 + 4)
    assert header.document_starts.tolist() == [0, 3]


def test_an_empty_document_of_a_megatron_index_has_no_start():
    idx = build_megatron_index([3, 0, 4], [0, 1, 2, 2, 3], dtype_code=4, id_bytes=4)
    header = read_header_of("megatron", idx=idx)
    assert (header.dtype, header.num_tokens) == ("uint32", 3 + 0 + 4)
    assert header.document_starts.tolist() == [0, 3], "an empty document must have no start"
    header = read_header_of("megatron", idx=build_megatron_index([3, 0], [0, 1, 2]))
    assert header.document_starts.tolist() == [0], "an empty last document must have no start"


# The header of a Megatron index has 34 bytes: magic (9), version (8), dtype code (1) and two numbers (8 each). After it
# come the lengths, 4 bytes per sequence, the byte offsets, 8 per sequence, and the document bounds, 8 each.
@pytest.mark.parametrize(
    ("idx", "message"),
    [
        (b"", r"here/x.idx: byte 0: not a Megatron index"),
        (build_megatron_index([3], [0, 1], magic=b"TNTIDX\0\0\0"), r"here/x.idx: byte 0: not a Megatron index"),
        (build_megatron_index([3], [0, 1], version=2), r"here/x.idx: byte 9: version 2"),
        (
            build_megatron_index([3], [0, 1], dtype_code=5),
            r"here/x.idx: byte 17: ids of type int64; supported are uint16",
        ),
        (build_megatron_index([3], [0, 1], dtype_code=7), r"here/x.idx: byte 17: ids of type float32"),
        (build_megatron_index([3], [0, 1], dtype_code=77), r"here/x.idx: byte 17: ids of type number 77"),
        (
            build_megatron_index([3], [0, 1])[:-1],
            r"here/x.idx: byte 61: truncated: 61 bytes, but 1 sequences .* make 62",
        ),
        (build_megatron_index([3], [0, 1], modes=b"\1"), r"here/x.idx: byte 62: too long"),
        (
            build_megatron_index([3, 2, 1], [0, 3], pointers=[0, 6, 8]),
            r"here/x.idx: byte 62: sequence 2 does not follow",
        ),
        (build_megatron_index([3, 2], [0, 1]), r"here/x.idx: byte 58: document bounds do not ascend from 0 to 2"),
        (build_megatron_index([3, 2], [1, 2]), r"here/x.idx: byte 58: document bounds"),
        (build_megatron_index([3, 2], [0, 2, 1, 2]), r"here/x.idx: byte 58: document bounds"),
        (build_megatron_index([3, 2], []), r"here/x.idx: byte 58: document bounds"),
    ],
)
def test_a_damaged_index_is_refused(idx, message):
    with pytest.raises(DataError, match=message):
        read_header_of("megatron", idx=idx)


@pytest.mark.parametrize(
    ("name", "unsigned_name"),
    [("uint16", "uint16"), ("int16", "uint16"), ("uint32", "uint32"), ("int32", "uint32")],
)
def test_an_array_gives_dtype_and_length(name, unsigned_name, tmp_path):
    content = save_npy(tmp_path, np.arange(7).astype(name))
    header = read_header_of("npy", content)
    assert (header.dtype, header.num_tokens) == (unsigned_name, 7)
    assert np.array_equal(np.frombuffer(content[header.skip_bytes :], name), np.arange(7))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros(3, ">u2"), "byte 8: ids of type uint16, big-endian; supported are"),
        (np.zeros(3, "float32"), "byte 8: ids of type float32"),
        (np.zeros(3, "int64"), "byte 8: ids of type int64"),
        (np.zeros(3, "uint8"), "byte 8: ids of type uint8"),
        (np.zeros((3, 2), "uint16"), r"byte 8: an array of shape \(3, 2\); ids must be flat"),
    ],
    ids=lambda value: str(getattr(value, "dtype", "")),
)
def test_an_array_of_another_kind_is_refused(array, message, tmp_path):
    with pytest.raises(DataError, match=message):
        read_header_of("npy", save_npy(tmp_path, array))


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"PK\3\4" + bytes(200), b"\x93NUMPY\1\0\x10\0" + bytes(200)])
def test_a_file_without_an_array_is_refused(content):
    with pytest.raises(DataError, match=r"here/x.bin: byte 0: not an array that numpy.save wrote"):
        read_header_of("npy", content)


@pytest.mark.parametrize(("magic", "version", "dtype"), [(20240520, 1, "uint16"), (20240801, 7, "uint32")])
def test_an_llmc_header_gives_dtype_and_length(magic, version, dtype):
    first_bytes = make_llmc_header(magic, version, num_tokens=5)
    assert read_header_of("llmc", first_bytes) == TokenFileHeader(dtype, skip_bytes=1024, num_tokens=5)
    with pytest.raises(DataError, match="byte 1023: truncated: the header alone has 1024 bytes"):
        read_header_of("llmc", first_bytes[:-1])
    with pytest.raises(DataError, match=f"byte 0: magic {magic} and version 2; .* 20240520 and 1 or 20240801 and 7"):
        read_header_of("llmc", make_llmc_header(magic, 2, num_tokens=5))


def test_raw_ids_need_a_dtype():
    assert read_header_of("bin", given_dtype="int32") == TokenFileHeader("uint32")
    with pytest.raises(DataError, match=r"does not store its dtype. Give --dtype"):
        read_header_of("bin")


def test_megatron_paths_may_omit_the_suffix():
    assert locate_data_file("megatron", "a/b") == locate_data_file("megatron", "a/b.bin") == "a/b.bin"
    assert locate_data_file("bin", "a/b") == "a/b"


def scan_ids(ids, block_bytes, dtype="uint16", header_bytes=0, starts=None):
    """Scan a file of `header_bytes` zeros and these ids, in blocks of `block_bytes` bytes."""
    content = bytes(header_bytes) + np.array(ids).astype(dtype).tobytes()
    header = TokenFileHeader(dtype, skip_bytes=header_bytes, num_tokens=None, document_starts=starts)
    scan = TokenFileScan("here", header, EOT, BYTES_OF_ID)
    for offset in range(0, len(content), block_bytes):
        scan.add(content[offset : offset + block_bytes])
    scan.check()
    return scan


@pytest.mark.parametrize("block_bytes", [1, 3, 7, 16, 1000])
@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
@pytest.mark.parametrize("header_bytes", [0, 6, 1024])
def test_a_scan_does_not_depend_on_the_block_size(header_bytes, dtype, block_bytes):
    ids = [5, 6, EOT, 7, EOT, 8, 9]
    scan = scan_ids(ids, block_bytes, dtype, header_bytes)
    assert (scan.num_tokens, scan.text_bytes) == (len(ids), sum(ids))  # BYTES_OF_ID
    assert scan.compute_starts(eot_at_start=False).tolist() == [0, 3, 5]
    assert scan.compute_starts(eot_at_start=True).tolist() == [0, 2, 4]


def test_document_starts_at_the_ends_of_a_file():
    starts = scan_ids([5, EOT], block_bytes=100).compute_starts(eot_at_start=False)
    assert starts.tolist() == [0], "no document must start after the last token"
    starts = scan_ids([EOT, 5], block_bytes=100).compute_starts(eot_at_start=True)
    assert starts.tolist() == [0], "the first document must start once"


def test_document_starts_of_a_header_replace_those_of_a_scan():
    scan = scan_ids([5, EOT, 6], block_bytes=100, starts=np.array([0, 1]))
    assert scan.compute_starts(eot_at_start=False).tolist() == [0, 1]


@pytest.mark.parametrize("block_bytes", [1, 4, 1000])
def test_an_unknown_id_is_reported_with_its_byte(block_bytes):
    # Two uint16 ids precede token 2: it begins at byte 10 + 2 * 2 = 14.
    with pytest.raises(DataError, match=r"here: token 2 \(byte 14\) is 300, but the tokenizer has 300 ids"):
        scan_ids([5, VOCAB_SIZE - 1, VOCAB_SIZE, 999], block_bytes, header_bytes=10)
    with pytest.raises(DataError, match=r"is 4294967295, but"):  # -1 as uint32
        scan_ids([-1], block_bytes, "uint32")


@pytest.mark.parametrize(
    ("header", "size", "message"),
    [
        (
            TokenFileHeader("uint16", skip_bytes=10, num_tokens=4),
            17,
            "x: truncated at byte 17: 17 bytes, but 4 ids of uint16 after 10 bytes make 18",
        ),
        (TokenFileHeader("uint16", skip_bytes=10, num_tokens=4), 19, "x: too long at byte 18: 19 bytes"),
        (TokenFileHeader("uint32"), 7, "x: truncated at byte 7: 7 bytes are not whole ids of uint32.* another --dtype"),
        (TokenFileHeader("uint32"), 0, "x: byte 0: no ids in it"),
        (TokenFileHeader("uint32", skip_bytes=1024, num_tokens=0), 1024, "x: byte 1024: no ids in it"),
    ],
)
def test_a_file_of_another_size_is_refused(header, size, message):
    with pytest.raises(DataError, match=message):
        check_size("x", header, size)
