"""A tokenizer with one id per character, and a safe reader of nanoGPT's `meta.pkl`, which runs no code of the pickle.

A corpus of this tokenizer is one stream of characters. No id ends a document; only document offsets mark where one
begins.
"""

import io
import json
import pickle
import pickletools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from reprlib import repr as short_repr  # bounded for values of any depth
from typing import Any

import numpy as np
import numpy.typing as npt

from dist_llm.errors import DataError
from dist_llm.text.tokenizer import FORMAT, MAX_IDS, Tokenizer, to_well_formed

NANOGPT_META_FILE = "meta.pkl"
MAX_META_BYTES = 64 << 20  # a character takes about 20 bytes, and Unicode has 300,000
# Opcodes for dictionaries, lists, tuples, strings, integers, None and booleans; none that imports or calls anything.
PLAIN_OPCODES = {
    *("PROTO", "FRAME", "STOP", "MARK", "MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT", "GET", "BINGET", "LONG_BINGET"),
    *("EMPTY_DICT", "DICT", "SETITEM", "SETITEMS", "EMPTY_LIST", "LIST", "APPEND", "APPENDS"),
    *("EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "NONE", "NEWTRUE", "NEWFALSE"),
    *("INT", "BININT", "BININT1", "BININT2", "LONG1", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
}
MEMO_OPCODES = {"PUT", "BINPUT", "LONG_BINPUT"}


@dataclass(frozen=True)
class CharTokenizer(Tokenizer):
    """A tokenizer in which `ids` maps each character to its id. Raises DataError if they cannot make a tokenizer."""

    ids: dict[str, int]
    name: str = "characters"

    def __post_init__(self) -> None:
        numbers = list(self.ids.values())
        if not numbers or len(set(numbers)) != len(numbers) or min(numbers) < 0 or max(numbers) >= MAX_IDS:
            raise DataError(f"tokenizer of characters: needs one or more distinct ids from 0 to {MAX_IDS - 1}.")
        if wrong := [char for char in self.ids if len(char) != 1 or 0xD800 <= ord(char) < 0xE000]:
            raise DataError(f"tokenizer of characters: {wrong[0]!r} is not one character.")

    @property
    def vocab_size(self) -> int:
        return max(self.ids.values()) + 1

    @property
    def eot(self) -> None:
        return None

    @property
    def _padding_id(self) -> int:
        return self.ids.get("\n", min(self.ids.values()))

    def encode(self, text: str) -> npt.NDArray[np.uint32]:
        code_points = np.frombuffer(to_well_formed(text).encode("utf-32-le"), "<u4")
        known, numbers = self._lookup_table
        indices = np.minimum(np.searchsorted(known, code_points), len(known) - 1)
        if len(missing := np.flatnonzero(known[indices] != code_points)):
            char = chr(code_points[missing[0]])
            raise DataError(
                f"character {char!r} (U+{ord(char):04X}), number {missing[0]} of the text, has no id in the tokenizer "
                "of characters. Remove such characters from the text, or use another tokenizer."
            )
        return numbers[indices]

    def decode(self, ids: Sequence[int] | npt.NDArray[np.integer]) -> str:
        return "".join(self._id_to_char.get(each, "\ufffd") for each in np.asarray(ids, dtype=np.int64).tolist())

    def text_stream(self, before: Sequence[int] | npt.NDArray[np.integer]) -> "CharTextStream":
        return CharTextStream(self)

    def token_bytes(self) -> Mapping[int, bytes]:
        return {number: char.encode() for char, number in self.ids.items()}

    def file_bytes(self) -> bytes:
        content = {"format": FORMAT, "kind": "characters", "ids": dict(sorted(self.ids.items(), key=lambda i: i[1]))}
        return (json.dumps(content, indent=1) + "\n").encode()

    @staticmethod
    def from_fields(fields: Mapping[str, Any]) -> "CharTokenizer":
        """Build the tokenizer from the JSON fields of `file_bytes`. Raises the exception of a malformed field."""
        return CharTokenizer({str(char): _check_int(number) for char, number in fields["ids"].items()})

    @cached_property
    def _lookup_table(self) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint32]]:
        """Return (all code points in ascending order, the id of each)."""
        code_points = np.array([ord(char) for char in self.ids], np.uint32)
        order = np.argsort(code_points)
        return code_points[order], np.array(list(self.ids.values()), np.uint32)[order]

    @cached_property
    def _id_to_char(self) -> dict[int, str]:
        return {number: char for char, number in self.ids.items()}


class CharTextStream:
    """A `TextStream` of characters, each with its own id."""

    def __init__(self, tokenizer: CharTokenizer) -> None:
        self._tokenizer = tokenizer

    def add(self, token: int) -> str:
        return self._tokenizer.decode([token])

    def end(self) -> str:
        return ""


def read_nanogpt_meta(path: Path) -> CharTokenizer:
    """Read the tokenizer in nanoGPT's `meta.pkl`: {"vocab_size": n, "stoi": {char: id}, "itos": {id: char}}.

    Raises DataError if the file is invalid, or contains anything but plain containers, strings and integers.
    """
    try:
        if path.stat().st_size > MAX_META_BYTES:
            raise DataError(f"{path}: more than {MAX_META_BYTES} bytes, which is too large for a table of characters.")
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}. Check the path given to --tokenizer.") from None
    meta = _unpickle_plain(content, path)
    stoi, itos = (meta.get(name) if isinstance(meta, dict) else None for name in ("stoi", "itos"))
    if not isinstance(stoi, dict) or not stoi:
        raise DataError(f"{path}: not a meta.pkl of nanoGPT: it has no dictionary stoi, from characters to ids.")
    try:
        ids = {_check_string(char): _check_int(number) for char, number in stoi.items()}
    except TypeError as error:
        raise DataError(f"{path}: stoi: {error}") from None
    if itos is not None and itos != {number: char for char, number in ids.items()}:
        raise DataError(f"{path}: stoi and itos contradict each other. Make the file again.")
    if meta.get("vocab_size", max(ids.values()) + 1) != max(ids.values()) + 1:
        raise DataError(
            f"{path}: vocab_size is {short_repr(meta['vocab_size'])}, but the largest id is {max(ids.values())}."
        )
    try:
        return CharTokenizer(ids)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


def _unpickle_plain(content: bytes, path: Path) -> Any:
    """Load a pickle of plain containers, strings and integers. Raises DataError for any other content."""
    try:
        for opcode, argument, offset in pickletools.genops(content):
            if opcode.name not in PLAIN_OPCODES:
                raise DataError(
                    f"{path}: byte {offset}: holds more than strings and numbers ({opcode.name}); not loaded."
                )
            if opcode.name in MEMO_OPCODES and int(argument or 0) > len(content):  # it would allocate memory
                raise DataError(f"{path}: byte {offset}: damaged: index {argument} of its memo.")
        return _Unpickler(io.BytesIO(content)).load()
    except DataError:
        raise
    except Exception as error:  # a damaged pickle may raise anything
        raise DataError(f"{path}: damaged, or not a pickle: {type(error).__name__}: {error}") from None


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise DataError(f"names {module}.{name}, which loading would run; not loaded.")


def _check_string(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{short_repr(value)} is not a string.")
    return value


def _check_int(value: object) -> int:
    if type(value) is not int:
        raise TypeError(f"{short_repr(value)} is not a whole number.")
    return value
