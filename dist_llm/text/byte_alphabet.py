"""The byte alphabet of GPT-2: one printable character for each byte. Files of byte-level BPE write tokens in it."""

from collections.abc import Iterator


def _iter_alphabet() -> Iterator[tuple[str, int]]:
    """Yield (character, byte). A printable byte keeps its character; other bytes get the characters from U+0100 on."""
    next_code_point = 256
    for byte in range(256):
        if chr(byte).isprintable() and chr(byte) != " ":
            yield chr(byte), byte
        else:
            yield chr(next_code_point), byte
            next_code_point += 1


CHAR_TO_BYTE = dict(_iter_alphabet())
BYTE_TO_CHAR = {byte: char for char, byte in CHAR_TO_BYTE.items()}


def to_bytes(token: str) -> bytes:
    """Return the bytes of a token. Raises KeyError for a character outside of the alphabet."""
    return bytes(CHAR_TO_BYTE[char] for char in token)
