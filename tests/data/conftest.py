"""Tiny corpora, written directly with the shard writer."""

import numpy as np
import pytest

from dist_llm.data.corpus import Corpus
from dist_llm.data.shard import Manifest, ShardWriter, select_token_dtype


@pytest.fixture
def make_corpus(tmp_path):
    """Return a function: write documents of these sizes, one per shard -> (directory, all tokens as one stream)."""
    directories = []

    def make(sizes, vocab_size=300, seed=0):
        directory = tmp_path / f"corpus{len(directories)}"
        directory.mkdir()
        directories.append(directory)
        rng = np.random.default_rng(seed)
        documents = [rng.integers(0, vocab_size, size) for size in sizes]
        dtype = select_token_dtype(vocab_size)
        writer = ShardWriter(directory, "train", dtype, max_tokens=1)  # one document per shard
        for document in documents:
            writer.add(document, text_bytes=3 * len(document))
        Manifest(dtype, vocab_size, "none", ("random",), {"train": writer.close(), "heldout": ()}).save(directory)
        return directory, np.concatenate(documents)

    return make


@pytest.fixture
def counting(tmp_path):
    """Return a function that makes a corpus of `num_tokens` tokens whose token at position i is i."""

    def make(num_tokens, split="train"):
        writer = ShardWriter(tmp_path, split, "uint32", max_tokens=7)
        for start in range(0, num_tokens, 5):
            writer.add(np.arange(start, min(start + 5, num_tokens)), text_bytes=5)
        shards = {"train": (), "heldout": (), split: writer.close()}
        Manifest("uint32", max(num_tokens, 1), "none", ("range",), shards).save(tmp_path)
        return Corpus(tmp_path, split)

    return make
