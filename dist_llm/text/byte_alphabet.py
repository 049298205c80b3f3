"""GPT-2's alphabet: a printable sign for each byte, in which vocabularies of byte-level BPE are written."""

from collections.abc import Iterator


def _iter_alphabet() -> Iterator[tuple[str, int]]:
    """Each byte's sign: the character itself where it is printable, else the next one from U+0100."""
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
    """The bytes of a token. Raises KeyError for a sign that is not of the alphabet."""
    return bytes(CHAR_TO_BYTE[char] for char in token)
