"""Find exact and near duplicates among documents. The first of several duplicates is kept.

Each document has a key, which the tokenizing process computes. The writing process sees the documents in order and has
an index of the keys of all kept documents. With this index it decides whether a document is a duplicate.

exact   The key is a hash of the text. The index takes about 100 bytes of memory per kept document.
near    The key is a MinHash signature of the set of 5-word shingles (Broder 1997). A document is compared with the kept
        documents that share a band of the signature (locality-sensitive hashing). It is a duplicate if the estimated
        Jaccard similarity of the two shingle sets reaches the threshold.
"""

import hashlib
import re
from functools import cache
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from dist_llm.io.hashing import digest64

EXACT_BYTES = 16  # of the hash of a text
# Hash functions of a signature; the standard deviation of the estimated similarity is at most 0.5 / sqrt(128) = 0.044.
PERMUTATIONS = 128
SHINGLE_WORDS = 5
SHINGLES_PER_BATCH = 4096  # limits the memory for a long document
# Weights of (false positives, false negatives) when the bands are chosen. A false positive costs one comparison; a
# false negative keeps a duplicate.
ERROR_WEIGHTS = (0.25, 0.75)
SCHEME = "affine32"  # the family of hash functions in datasketch
KEY_BYTES = {"exact": EXACT_BYTES, "near": 4 * PERMUTATIONS}

Key = npt.NDArray[np.uint8]
_WORD = re.compile(r"\w+")


class DuplicateIndex(Protocol):
    """An index of the keys of kept documents."""

    def add_if_new(self, key: Key) -> bool:
        """Add the key unless the document is a duplicate of a kept one. Return whether the key was added."""
        ...

    def add(self, key: Key) -> None:
        """Add the key of a kept document, without a search for duplicates."""
        ...


def compute_key(kind: str, text: str) -> Key:
    """Return the key of a text as KEY_BYTES[kind] bytes. The key depends only on the text."""
    return _compute_exact_key(text) if kind == "exact" else compute_near_key(text)


def build_index(kind: str, threshold: float) -> DuplicateIndex:
    """Build an empty index. `threshold` is the Jaccard similarity of near duplicates, from 0 to 1."""
    return ExactIndex() if kind == "exact" else NearIndex(threshold)


def _compute_exact_key(text: str) -> Key:
    return np.frombuffer(hashlib.blake2b(text.encode(), digest_size=EXACT_BYTES).digest(), dtype=np.uint8)


class ExactIndex:
    """An index of text hashes, which finds exact duplicates."""

    def __init__(self) -> None:
        self._keys: set[bytes] = set()

    def add_if_new(self, key: Key) -> bool:
        is_new = key.tobytes() not in self._keys
        self.add(key)
        return is_new

    def add(self, key: Key) -> None:
        self._keys.add(key.tobytes())


def compute_near_key(text: str) -> Key:
    """Return the MinHash signature of the shingles of a text, as bytes."""
    minhash = _build_minhash().copy()
    shingles = _hash_shingles(text)
    for start in range(0, len(shingles), SHINGLES_PER_BATCH):
        minhash.update_batch(shingles[start : start + SHINGLES_PER_BATCH].tolist())
    signature: npt.NDArray[np.uint32] = minhash.hashvalues.astype("<u4")
    return signature.view(np.uint8)


@cache
def _build_minhash() -> Any:
    from datasketch import MinHash

    return MinHash(PERMUTATIONS, seed=1, hashfunc=int, scheme=SCHEME)


def _hash_shingles(text: str) -> npt.NDArray[np.uint32]:
    """Return the hashes of the distinct shingles: runs of SHINGLE_WORDS words, without case and punctuation."""
    words = _WORD.findall(text.lower()) or [text]
    words += [""] * (SHINGLE_WORDS - len(words))
    hash_of_word = {word: _hash_word(word) for word in set(words)}
    word_hashes = np.array([hash_of_word[word] for word in words], dtype=np.uint64)
    shingles = np.zeros(len(words) - SHINGLE_WORDS + 1, dtype=np.uint64)
    for offset in range(SHINGLE_WORDS):  # a polynomial modulo 2^64, whose upper half is well mixed
        shingles = shingles * np.uint64(0x9E3779B97F4A7C15) + word_hashes[offset : offset + len(shingles)]
    return np.unique((shingles >> np.uint64(32)).astype(np.uint32))


def _hash_word(word: str) -> int:
    return int.from_bytes(digest64(word.encode()), "big")


class NearIndex:
    """An index of MinHash signatures, which finds near duplicates. Signatures that share a band are compared."""

    def __init__(self, threshold: float) -> None:
        from datasketch import MinHashLSH

        self.threshold = threshold
        self._lsh = MinHashLSH(threshold, PERMUTATIONS, weights=ERROR_WEIGHTS)
        self._signatures: list[Key] = []

    def add_if_new(self, key: Key) -> bool:
        signature = key.view("<u4")
        for candidate in self._lsh.query(self._to_minhash(key)):
            similarity = np.mean(self._signatures[candidate].view("<u4") == signature)
            if similarity >= self.threshold:
                return False
        self.add(key)
        return True

    def add(self, key: Key) -> None:
        self._lsh.insert(len(self._signatures), self._to_minhash(key), check_duplication=False)
        self._signatures.append(key.copy())

    def _to_minhash(self, key: Key) -> Any:
        from datasketch import LeanMinHash

        return LeanMinHash(seed=1, hashvalues=key.view("<u4"), scheme=SCHEME)
