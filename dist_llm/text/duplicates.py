"""Find exact and near duplicates of earlier documents, in the order of the source; the first one is kept.

Each document has a key, which is computed where the document is tokenized. The process that collects the documents in
order has an index of the keys of the kept documents, which tells whether a new key is a duplicate.

exact   the key is a hash of the text. About 100 bytes of memory per kept document.
near    the key is a MinHash signature of the set of 5-word shingles (Broder 1997). A document is compared with the kept
        documents that share a band of it (locality-sensitive hashing). It is a duplicate if the estimated Jaccard
        similarity of the two sets reaches the threshold.
"""

import hashlib
import re
from functools import cache
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from dist_llm.io.hashing import digest64

EXACT_BYTES = 16
PERMUTATIONS = 128  # the estimate's standard deviation is at most 0.5 / sqrt(128) = 0.044
SHINGLE_WORDS = 5
SHINGLES_PER_BATCH = 4096  # limits the memory for a book
# A false positive costs a comparison, a false negative keeps a duplicate: bands are chosen for few false negatives.
ERROR_WEIGHTS = (0.25, 0.75)
SCHEME = "affine32"
KEY_BYTES = {"exact": EXACT_BYTES, "near": 4 * PERMUTATIONS}

Key = npt.NDArray[np.uint8]
_WORD = re.compile(r"\w+")


class DuplicateIndex(Protocol):
    """An index of the keys of kept documents."""

    def add_if_new(self, key: Key) -> bool:
        """Add the key unless the document is a duplicate of a kept one. Return whether the key was added."""
        ...

    def remember(self, key: Key) -> None:
        """Add the key of a kept document."""
        ...


def compute_key(kind: str, text: str) -> Key:
    """Compute the key of a text, bytes [KEY_BYTES[kind]]. It depends only on the text."""
    return _compute_exact_key(text) if kind == "exact" else compute_near_key(text)


def build_index(kind: str, threshold: float) -> DuplicateIndex:
    return ExactIndex() if kind == "exact" else NearIndex(threshold)


def _compute_exact_key(text: str) -> Key:
    return np.frombuffer(hashlib.blake2b(text.encode(), digest_size=EXACT_BYTES).digest(), dtype=np.uint8)


class ExactIndex:
    """An index of hashes."""

    def __init__(self) -> None:
        self._seen: set[bytes] = set()

    def add_if_new(self, key: Key) -> bool:
        new = key.tobytes() not in self._seen
        self.remember(key)
        return new

    def remember(self, key: Key) -> None:
        self._seen.add(key.tobytes())


def compute_near_key(text: str) -> Key:
    """Compute the MinHash signature of a text's shingles, as bytes."""
    sketch = _build_sketch().copy()
    shingles = _hash_shingles(text)
    for start in range(0, len(shingles), SHINGLES_PER_BATCH):
        sketch.update_batch(shingles[start : start + SHINGLES_PER_BATCH].tolist())
    signature: npt.NDArray[np.uint32] = sketch.hashvalues.astype("<u4")
    return signature.view(np.uint8)


@cache
def _build_sketch() -> Any:
    from datasketch import MinHash

    return MinHash(PERMUTATIONS, seed=1, hashfunc=int, scheme=SCHEME)


def _hash_shingles(text: str) -> npt.NDArray[np.uint32]:
    """Hash the distinct runs of SHINGLE_WORDS words; case and punctuation do not matter."""
    words = _WORD.findall(text.lower()) or [text]
    words += [""] * (SHINGLE_WORDS - len(words))
    hashes = {word: _hash_word(word) for word in set(words)}
    column = np.array([hashes[word] for word in words], dtype=np.uint64)
    runs = np.zeros(len(words) - SHINGLE_WORDS + 1, dtype=np.uint64)
    for offset in range(SHINGLE_WORDS):  # a polynomial modulo 2^64, whose upper half is well mixed
        runs = runs * np.uint64(0x9E3779B97F4A7C15) + column[offset : offset + len(runs)]
    return np.unique((runs >> np.uint64(32)).astype(np.uint32))


def _hash_word(word: str) -> int:
    return int.from_bytes(digest64(word.encode()), "big")


class NearIndex:
    """An index of signatures in tables of bands; signatures that share a band are compared."""

    def __init__(self, threshold: float) -> None:
        from datasketch import MinHashLSH

        self.threshold = threshold
        self._tables = MinHashLSH(threshold, PERMUTATIONS, weights=ERROR_WEIGHTS)
        self._signatures: list[Key] = []

    def add_if_new(self, key: Key) -> bool:
        signature = key.view("<u4")
        for number in self._tables.query(self._sketch(key)):
            if np.mean(self._signatures[number].view("<u4") == signature) >= self.threshold:
                return False
        self.remember(key)
        return True

    def remember(self, key: Key) -> None:
        self._tables.insert(len(self._signatures), self._sketch(key), check_duplication=False)
        self._signatures.append(key.copy())

    def _sketch(self, key: Key) -> Any:
        from datasketch import LeanMinHash

        return LeanMinHash(seed=1, hashvalues=key.view("<u4"), scheme=SCHEME)
