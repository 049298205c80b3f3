"""Compressed files as streams of bytes: with several frames, padding after them, and an error if the file is
truncated."""

import bz2
import io
import lzma
import zlib
from collections.abc import Callable
from typing import Any

from dist_llm.text.rows import UnreadableError

BLOCK_BYTES = 64 << 10  # compressed bytes read at once
GZIP_WINDOW = 31  # zlib's value for a gzip header
ZSTD_WINDOW_BYTES = 1 << 31  # the longest window, of `zstd --ultra --long=31`
PADDING = b"\0"  # which tar and tapes append


def _open_zstd() -> Any:
    import zstandard

    return zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW_BYTES).decompressobj()


CODECS: dict[str, Callable[[], Any]] = {
    ".gz": lambda: zlib.decompressobj(GZIP_WINDOW),
    ".zst": _open_zstd,
    ".bz2": bz2.BZ2Decompressor,
    ".xz": lzma.LZMADecompressor,
}


class DecompressedFile(io.RawIOBase):
    """The content of a file compressed by the method of its suffix. Raises UnreadableError if it is damaged."""

    def __init__(self, raw: io.FileIO, suffix: str) -> None:
        self._raw, self._suffix, self._new = raw, suffix, CODECS[suffix]
        self._frame: Any = None  # the decompressor of the current frame
        self._packed = self._content = b""
        self._used = 0  # bytes of `_content` that were returned
        self._frames = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        while self._used == len(self._content) and self._decompress_block():
            pass
        size = min(len(buffer), len(self._content) - self._used)
        buffer[:size] = self._content[self._used : self._used + size]
        self._used += size
        return size

    def _decompress_block(self) -> bool:
        """Decompress one more block. Return False at the end of the file."""
        packed = self._packed or self._raw.read(BLOCK_BYTES) or b""
        self._packed = b""
        if self._frame is None:
            if self._frames:
                packed = packed.lstrip(PADDING) or self._skip_padding()
            if not packed:
                return False
            self._frame = self._new()
        elif not packed:
            raise UnreadableError(f"Truncated {self._suffix} file: it ends within a frame")
        try:
            self._content, self._used = self._frame.decompress(packed), 0
        except Exception as error:  # zlib, lzma, bz2 and zstandard raise different types
            raise UnreadableError(f"damaged {self._suffix} file: {error}") from None
        if self._frame.eof:
            self._packed, self._frame = self._frame.unused_data, None
            self._frames += 1
        return True

    def _skip_padding(self) -> bytes:
        while block := self._raw.read(BLOCK_BYTES):
            if rest := block.lstrip(PADDING):
                return rest
        return b""
