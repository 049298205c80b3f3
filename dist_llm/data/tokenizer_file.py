"""Compare two tokenizer files: whether they give the same ids. Names and additional texts do not matter.

`dist_llm/text` writes `tokenizer.json`; a corpus and a checkpoint contain one. This package only knows the fields that
determine ids.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dist_llm.errors import DataError

TOKENIZER = "tokenizer.json"
BPE_IDENTITY = "equal_bpe"
# original files that determine ids: the first one or, without it, the others
DECIDES_IDS = ("tokenizer.json", "vocab.json", "merges.txt")


def same_tokenizer(first: Path, second: Path, second_sha256: str = "") -> bool:
    """Return whether the tokenizers in two directories give the same ids. `second_sha256` is the hash of the second
    file.

    Returns False if the second has no file. Raises DataError if the first has none or one cannot be read.
    """
    content = _read(first)
    if hashlib.sha256(content).hexdigest() == second_sha256:
        return True
    if not (second / TOKENIZER).exists():
        return False
    other = _read(second)
    return content == other or identity(content) == identity(other)


def identity(content: bytes) -> str:
    """Return a hash of what determines ids in the bytes of our `tokenizer.json`."""
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
    """Return the identity of a byte-level BPE tokenizer.

    Of its special tokens only the end of document and the largest id count, because text never becomes one.
    """
    special = fields["special_tokens"]
    ranks = sorted(fields["ranks"].items(), key=lambda item: item[1])
    largest = max(*special.values(), ranks[-1][1])
    return _hash([fields["pattern"], special["<|endoftext|>"], largest, ranks])


def _read(directory: Path) -> bytes:
    try:
        return (directory / TOKENIZER).read_bytes()
    except FileNotFoundError:
        raise DataError(
            f"{directory / TOKENIZER}: missing, so the ids that the model was trained on are unknown. If it was "
            f"converted without a tokenizer, copy the {TOKENIZER} of a corpus with its ids there."
        ) from None
    except OSError as error:
        raise DataError(f"{directory / TOKENIZER}: cannot be read: {error.strerror}.") from None


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
