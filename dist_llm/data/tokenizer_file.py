"""Compare two `tokenizer.json` files: do they give the same ids for all texts?

Corpora and checkpoints contain this file, which `dist_llm/text` writes. This module reads only the fields that
determine ids. Other fields, such as names, may differ.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dist_llm.errors import DataError

TOKENIZER_FILE = "tokenizer.json"
EQUAL_BPE_KEY = "equal_bpe"
# The original files of a Hugging Face tokenizer that determine ids: the first file or, without it, the other two.
FILES_WITH_IDS = ("tokenizer.json", "vocab.json", "merges.txt")


def is_same_tokenizer(first: Path, second: Path, second_sha256: str = "") -> bool:
    """Return whether the tokenizers in two directories give the same ids.

    `second_sha256` is the hash of the second file, if it is known. Return False if the second directory has no
    tokenizer. Raises DataError if the first directory has none, or a file cannot be read.
    """
    first_content = _read(first)
    if hashlib.sha256(first_content).hexdigest() == second_sha256:
        return True
    if not (second / TOKENIZER_FILE).exists():
        return False
    second_content = _read(second)
    return first_content == second_content or hash_tokenizer_ids(first_content) == hash_tokenizer_ids(second_content)


def hash_tokenizer_ids(content: bytes) -> str:
    """Return a hash of the fields of a `tokenizer.json` that determine ids."""
    try:
        fields = json.loads(content)
        if "ranks" in fields:
            return hash_bpe_ids(fields)
        if fields.get("kind") != "huggingface":
            return _hash(fields)
        if fields[EQUAL_BPE_KEY]:
            return str(fields[EQUAL_BPE_KEY])
        files = {**fields["files"], **fields["binary_files"]}
        names = FILES_WITH_IDS[:1] if FILES_WITH_IDS[0] in files else FILES_WITH_IDS[1:]
        return _hash([fields["end_token"], fields["first_tokens"], [files.get(name) for name in names]])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return hashlib.sha256(content).hexdigest()


def hash_bpe_ids(fields: Mapping[str, Any]) -> str:
    """Return a hash of the fields of a byte-level BPE tokenizer that determine ids.

    Text never becomes a special token. So only two facts about special tokens count: the id of <|endoftext|>, and the
    largest id, which determines the vocabulary size.
    """
    special_tokens = fields["special_tokens"]
    ranks = sorted(fields["ranks"].items(), key=lambda item: item[1])
    largest_id = max(*special_tokens.values(), ranks[-1][1])
    return _hash([fields["pattern"], special_tokens["<|endoftext|>"], largest_id, ranks])


def _read(directory: Path) -> bytes:
    try:
        return (directory / TOKENIZER_FILE).read_bytes()
    except FileNotFoundError:
        raise DataError(
            f"{directory / TOKENIZER_FILE}: missing, so the ids that the model was trained on are unknown. If it was "
            f"converted without a tokenizer, copy the {TOKENIZER_FILE} of a corpus with its ids there."
        ) from None
    except OSError as error:
        raise DataError(f"{directory / TOKENIZER_FILE}: cannot be read: {error.strerror}.") from None


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
