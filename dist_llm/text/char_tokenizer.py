"""A tokenizer with one id per character, and a reader of nanoGPT's `meta.pkl` that runs no code of the pickle.

This tokenizer has no end-of-document id. Only the document offsets of a corpus tell where documents begin.
"""

import io
import json
import pickle
import pickletools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from reprlib import repr as short_repr  # limits the length, also of deeply nested values
from typing import Any

import numpy as np
import numpy.typing as npt

from dist_llm.errors import DataError
from dist_llm.text.tokenizer import FORMAT, MAX_IDS, Tokenizer, to_well_formed

NANOGPT_META_FILE = "meta.pkl"
MAX_META_BYTES = 64 << 20  # each of the 300,000 Unicode characters takes about 20 bytes
# Pickle opcodes for dictionaries, lists, tuples, strings, integers, None and booleans. None of them imports or calls.
SAFE_OPCODES = {
    *("PROTO", "FRAME", "STOP", "MARK", "MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT", "GET", "BINGET", "LONG_BINGET"),
    *("EMPTY_DICT", "DICT", "SETITEM", "SETITEMS", "EMPTY_LIST", "LIST", "APPEND", "APPENDS"),
    *("EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "NONE", "NEWTRUE", "NEWFALSE"),
    *("INT", "BININT", "BININT1", "BININT2", "LONG1", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
}
MEMO_OPCODES = {"PUT", "BINPUT", "LONG_BINPUT"}


@dataclass(frozen=True)
class CharTokenizer(Tokenizer):
    """`ids` maps each character to its id. The constructor raises DataError for invalid ids and characters."""

    ids: dict[str, int]
    name: str = "characters"

    def __post_init__(self) -> None:
        token_ids = list(self.ids.values())
        if not token_ids or len(set(token_ids)) != len(token_ids) or min(token_ids) < 0 or max(token_ids) >= MAX_IDS:
            raise DataError(f"tokenizer of characters: needs one or more distinct ids from 0 to {MAX_IDS - 1}.")
        if invalid_chars := [char for char in self.ids if len(char) != 1 or 0xD800 <= ord(char) < 0xE000]:
            raise DataError(f"tokenizer of characters: {invalid_chars[0]!r} is not one character.")

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
        sorted_code_points, token_ids = self._lookup_table
        indices = np.minimum(np.searchsorted(sorted_code_points, code_points), len(sorted_code_points) - 1)
        if len(missing := np.flatnonzero(sorted_code_points[indices] != code_points)):
            char = chr(code_points[missing[0]])
            raise DataError(
                f"character {char!r} (U+{ord(char):04X}), number {missing[0]} of the text, has no id in the tokenizer "
                "of characters. Remove such characters from the text, or use another tokenizer."
            )
        return token_ids[indices]

    def decode(self, ids: Sequence[int] | npt.NDArray[np.integer]) -> str:
        return "".join(self._id_to_char.get(token, "\ufffd") for token in np.asarray(ids, dtype=np.int64).tolist())

    def build_incremental_decoder(self, before: Sequence[int] | npt.NDArray[np.integer]) -> "CharIncrementalDecoder":
        return CharIncrementalDecoder(self)

    def get_token_bytes(self) -> Mapping[int, bytes]:
        return {token: char.encode() for char, token in self.ids.items()}

    def to_json_bytes(self) -> bytes:
        content = {"format": FORMAT, "kind": "characters", "ids": dict(sorted(self.ids.items(), key=lambda x: x[1]))}
        return (json.dumps(content, indent=1) + "\n").encode()

    @staticmethod
    def from_fields(fields: Mapping[str, Any]) -> "CharTokenizer":
        """Build the tokenizer from the JSON fields of `to_json_bytes`. Raises the exception of a malformed field."""
        return CharTokenizer({str(char): _require_int(token) for char, token in fields["ids"].items()})

    @cached_property
    def _lookup_table(self) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint32]]:
        """Return (all code points in ascending order, the id of each)."""
        code_points = np.array([ord(char) for char in self.ids], np.uint32)
        order = np.argsort(code_points)
        return code_points[order], np.array(list(self.ids.values()), np.uint32)[order]

    @cached_property
    def _id_to_char(self) -> dict[int, str]:
        return {token: char for char, token in self.ids.items()}


class CharIncrementalDecoder:
    """The `IncrementalDecoder` of a CharTokenizer. Each id is a complete character, so nothing is buffered."""

    def __init__(self, tokenizer: CharTokenizer) -> None:
        self._tokenizer = tokenizer

    def add(self, token: int) -> str:
        return self._tokenizer.decode([token])

    def end(self) -> str:
        return ""


def read_nanogpt_meta(path: Path) -> CharTokenizer:
    """Read the tokenizer in nanoGPT's `meta.pkl`: {"vocab_size": n, "stoi": {char: id}, "itos": {id: char}}.

    Raises DataError if the file is invalid, or contains anything but containers, strings and integers.
    """
    try:
        if path.stat().st_size > MAX_META_BYTES:
            raise DataError(f"{path}: more than {MAX_META_BYTES} bytes, which is too large for a table of characters.")
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}. Check the path given to --tokenizer.") from None
    meta = _unpickle_safely(content, path)
    stoi, itos = (meta.get(name) if isinstance(meta, dict) else None for name in ("stoi", "itos"))
    if not isinstance(stoi, dict) or not stoi:
        raise DataError(f"{path}: not a meta.pkl of nanoGPT: it has no dictionary stoi, from characters to ids.")
    try:
        ids = {_require_string(char): _require_int(token) for char, token in stoi.items()}
    except TypeError as error:
        raise DataError(f"{path}: stoi: {error}") from None
    if itos is not None and itos != {token: char for char, token in ids.items()}:
        raise DataError(f"{path}: stoi and itos contradict each other. Make the file again.")
    if meta.get("vocab_size", max(ids.values()) + 1) != max(ids.values()) + 1:
        raise DataError(
            f"{path}: vocab_size is {short_repr(meta['vocab_size'])}, but the largest id is {max(ids.values())}."
        )
    try:
        return CharTokenizer(ids)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


def _unpickle_safely(content: bytes, path: Path) -> Any:
    """Load a pickle of containers, strings and integers. Raises DataError for any other content."""
    try:
        for opcode, argument, offset in pickletools.genops(content):
            if opcode.name not in SAFE_OPCODES:
                raise DataError(
                    f"{path}: byte {offset}: holds more than strings and numbers ({opcode.name}); not loaded."
                )
            # The unpickler allocates a memo of this size, so a huge index would exhaust the memory.
            if opcode.name in MEMO_OPCODES and int(argument or 0) > len(content):
                raise DataError(f"{path}: byte {offset}: damaged: index {argument} of its memo.")
        return _NoImportUnpickler(io.BytesIO(content)).load()
    except DataError:
        raise
    except Exception as error:  # a damaged pickle may raise anything
        raise DataError(f"{path}: damaged, or not a pickle: {type(error).__name__}: {error}") from None


class _NoImportUnpickler(pickle.Unpickler):
    """Refuses to import: a second line of defence behind SAFE_OPCODES."""

    def find_class(self, module: str, name: str) -> Any:
        raise DataError(f"names {module}.{name}, which loading would run; not loaded.")


def _require_string(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{short_repr(value)} is not a string.")
    return value


def _require_int(value: object) -> int:
    if type(value) is not int:
        raise TypeError(f"{short_repr(value)} is not a whole number.")
    return value
