"""Digests name their algorithm. Short hashes keep their values, because corpora and initial values depend on them."""

import hashlib

from dist_llm.io.hashing import create_hash, digest64, format_digest, hash_content


def test_a_digest_selects_its_own_algorithm():
    for digest in (hash_content(b"x"), f"sha256:{hashlib.sha256(b'x').hexdigest()}"):
        again = create_hash(digest)
        again.update(b"x")
        assert format_digest(again) == digest


def test_digests_of_known_values():
    assert hash_content(b"") == "blake3:af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"
    assert digest64(b"tok_embeddings.weight").hex() == "da97fccd010fff92"
