"""Read compressed files as streams of bytes.

A file may have several compressed frames and padding after a frame. A truncated file raises UnreadableError.
"""

import bz2
import io
import lzma
import zlib
from collections.abc import Callable
from typing import Any

from dist_llm.text.rows import UnreadableError

BLOCK_BYTES = 64 << 10  # compressed bytes read at once
GZIP_WBITS = 31  # value of `wbits` with which zlib expects a gzip header
ZSTD_WINDOW_BYTES = 1 << 31  # the longest window that zstd writes, with `zstd --ultra --long=31`
PADDING = b"\0"  # tar and tapes append zero bytes


def _open_zstd() -> Any:
    import zstandard

    return zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW_BYTES).decompressobj()


CODECS: dict[str, Callable[[], Any]] = {
    ".gz": lambda: zlib.decompressobj(GZIP_WBITS),
    ".zst": _open_zstd,
    ".bz2": bz2.BZ2Decompressor,
    ".xz": lzma.LZMADecompressor,
}


class DecompressedFile(io.RawIOBase):
    """The decompressed content of a file. Its suffix selects the codec. Raises UnreadableError if it is damaged."""

    def __init__(self, disk_file: io.FileIO, suffix: str) -> None:
        self._disk_file, self._suffix, self._create_decompressor = disk_file, suffix, CODECS[suffix]
        self._decompressor: Any = None  # of the current frame; None between frames
        self._compressed = self._content = b""
        self._num_returned_bytes = 0  # bytes of `_content` that `readinto` has returned
        self._num_finished_frames = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        while self._num_returned_bytes == len(self._content) and self._decompress_block():
            pass
        start = self._num_returned_bytes
        num_bytes = min(len(buffer), len(self._content) - start)
        buffer[:num_bytes] = self._content[start : start + num_bytes]
        self._num_returned_bytes += num_bytes
        return num_bytes

    def _decompress_block(self) -> bool:
        """Decompress one more block. Return False at the end of the file."""
        compressed = self._compressed or self._disk_file.read(BLOCK_BYTES) or b""
        self._compressed = b""
        if self._decompressor is None:
            if self._num_finished_frames:
                compressed = compressed.lstrip(PADDING) or self._skip_padding()
            if not compressed:
                return False
            self._decompressor = self._create_decompressor()
        elif not compressed:
            raise UnreadableError(f"Truncated {self._suffix} file: it ends within a frame")
        try:
            self._content, self._num_returned_bytes = self._decompressor.decompress(compressed), 0
        except Exception as error:  # zlib, lzma, bz2 and zstandard raise different types
            raise UnreadableError(f"damaged {self._suffix} file: {error}") from None
        if self._decompressor.eof:
            self._compressed, self._decompressor = self._decompressor.unused_data, None
            self._num_finished_frames += 1
        return True

    def _skip_padding(self) -> bytes:
        """Read until the next byte that is not padding. Return the block from this byte on; empty at the end."""
        while block := self._disk_file.read(BLOCK_BYTES):
            if remainder := block.lstrip(PADDING):
                return remainder
        return b""
