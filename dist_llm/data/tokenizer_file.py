"""Whether two tokenizer files give the same ids: their names, and texts beside them, do not matter.

`dist_llm/text` writes `tokenizer.json`; a corpus and a checkpoint hold one. Data knows of it only what decides ids.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dist_llm.errors import DataError

TOKENIZER = "tokenizer.json"
BPE_IDENTITY = "equal_bpe"
DECIDES_IDS = ("tokenizer.json", "vocab.json", "merges.txt")  # of the original files: the first, else the others


def same_tokenizer(first: Path, second: Path, second_sha256: str = "") -> bool:
    """Whether the tokenizers in two directories give the same ids; `second_sha256` is the hash of the second's file.

    Where the second has no file, they do not. Raises DataError where the first has none, or one cannot be read.
    """
    content = _read(first)
    if hashlib.sha256(content).hexdigest() == second_sha256:
        return True
    if not (second / TOKENIZER).exists():
        return False
    other = _read(second)
    return content == other or identity(content) == identity(other)


def identity(content: bytes) -> str:
    """A hash of what decides ids in the bytes of a `tokenizer.json` of ours."""
    try:
        fields = json.loads(content)
        if "ranks" in fields:
            return bpe_identity(fields)
        if fields.get("kind") != "huggingface":
            return _hash(fields)
        if fields[BPE_IDENTITY]:
            return str(fields[BPE_IDENTITY])
        files = {**fields["files"], **fields["binary_files"]}
        decisive = DECIDES_IDS[:1] if DECIDES_IDS[0] in files else DECIDES_IDS[1:]
        return _hash([fields["end_token"], fields["first_tokens"], [files.get(name) for name in decisive]])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return hashlib.sha256(content).hexdigest()


def bpe_identity(fields: Mapping[str, Any]) -> str:
    """Of byte-level BPE. Of special tokens the end of a document and the largest id count: text never becomes one."""
    special = fields["special_tokens"]
    ranks = sorted(fields["ranks"].items(), key=lambda item: item[1])
    largest = max(*special.values(), ranks[-1][1])
    return _hash([fields["pattern"], special["<|endoftext|>"], largest, ranks])


def _read(directory: Path) -> bytes:
    try:
        return (directory / TOKENIZER).read_bytes()
    except FileNotFoundError:
        raise DataError(
            f"{directory / TOKENIZER}: missing, so that it is not known which ids the model was trained on. If it was "
            f"converted without a tokenizer, copy the {TOKENIZER} of a corpus with its ids there."
        ) from None
    except OSError as error:
        raise DataError(f"{directory / TOKENIZER}: cannot be read: {error.strerror}.") from None


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
