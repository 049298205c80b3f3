"""Hashes of content: digests that name their algorithm, and short hashes for decisions about a text."""

import hashlib
from typing import Any

from blake3 import blake3


def create_hash(like: str = "blake3:") -> Any:
    """Return a new hash object of the algorithm that the digest `like` names. BLAKE3 takes a fifth of SHA-256's
    time."""
    return blake3() if like.startswith("blake3:") else hashlib.new(like.partition(":")[0])


def format_digest(digest: Any) -> str:
    """Return the digest as manifests store it: `blake3:` or `sha256:`, then hexadecimal digits."""
    return f"{digest.name}:{digest.hexdigest()}"


def hash_content(content: bytes) -> str:
    """Return the digest of `content` as manifests store it."""
    digest = create_hash()
    digest.update(content)
    return format_digest(digest)


def digest64(content: bytes) -> bytes:
    """Return 8 bytes that are a function of `content`, uniformly distributed (BLAKE2b). Not for verification."""
    return hashlib.blake2b(content, digest_size=8).digest()
