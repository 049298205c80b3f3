"""GPT-2's alphabet, in which vocabularies of byte-level BPE are written: a printable character for each byte."""

from collections.abc import Iterator


def _iter_alphabet() -> Iterator[tuple[str, int]]:
    """Yield each byte's character: the byte's own if it is printable, else the next one from U+0100."""
    spare = 256
    for byte in range(256):
        if chr(byte).isprintable() and chr(byte) != " ":
            yield chr(byte), byte
        else:
            yield chr(spare), byte
            spare += 1


CHAR_TO_BYTE = dict(_iter_alphabet())
BYTE_TO_CHAR = {byte: char for char, byte in CHAR_TO_BYTE.items()}


def to_bytes(token: str) -> bytes:
    """Return the bytes of a token. Raises KeyError for a character outside of the alphabet."""
    return bytes(CHAR_TO_BYTE[char] for char in token)
