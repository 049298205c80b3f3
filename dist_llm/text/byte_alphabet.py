"""GPT-2's alphabet: a printable sign for each byte, in which vocabularies of byte-level BPE are written."""

from collections.abc import Iterator


def _signs_and_bytes() -> Iterator[tuple[str, int]]:
    """Each byte's sign: the character itself where it is printable, else the next one from U+0100."""
    spare = 256
    for byte in range(256):
        if chr(byte).isprintable() and chr(byte) != " ":
            yield chr(byte), byte
        else:
            yield chr(spare), byte
            spare += 1


BYTE_OF = dict(_signs_and_bytes())
SIGN_OF = {byte: sign for sign, byte in BYTE_OF.items()}


def to_bytes(token: str) -> bytes:
    """The bytes of a token. Raises KeyError for a sign that is not of the alphabet."""
    return bytes(BYTE_OF[sign] for sign in token)
