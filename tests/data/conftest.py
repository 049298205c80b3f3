"""Fixtures that write tiny corpora with ShardWriter.

def test_windows(make_corpus):
    directory, tokens = make_corpus([3, 7], vocab_size=300)  # two random documents of 3 and 7 tokens
    corpus = Corpus(directory, "train")
"""

from itertools import count

import numpy as np
import pytest

from dist_llm.data.corpus import Corpus
from dist_llm.data.shard import CorpusManifest, ShardWriter, select_token_dtype


@pytest.fixture
def make_corpus(tmp_path):
    """Return a function that writes random documents of the given sizes in tokens, with one document per shard.

    The function returns the directory of the corpus, and all its tokens as one array [num_tokens].
    """
    corpus_numbers = count()

    def write_documents(sizes, *, vocab_size=300, seed=0):
        directory = tmp_path / f"corpus{next(corpus_numbers)}"
        directory.mkdir()
        rng = np.random.default_rng(seed)
        documents = [rng.integers(0, vocab_size, size) for size in sizes]
        dtype = select_token_dtype(vocab_size)
        writer = ShardWriter(directory, "train", dtype, max_tokens=1)  # one document per shard
        for document in documents:
            writer.add(document, text_bytes=3 * len(document))  # the size of the text is arbitrary
        CorpusManifest(
            dtype,
            vocab_size,
            tokenizer_sha256="none",
            source=("random",),
            shards={"train": writer.close(), "heldout": ()},
        ).save(directory)
        return directory, np.concatenate(documents)

    return write_documents


@pytest.fixture
def make_counting_corpus(tmp_path):
    """Return a function that writes and opens a corpus of `num_tokens` tokens. Its token at position i is i.

    The documents have 5 tokens, the last one has the rest. A shard has about 7 tokens, so windows cross shards.
    """
    document_tokens = 5

    def write_counting_corpus(num_tokens, split="train"):
        writer = ShardWriter(tmp_path, split, "uint32", max_tokens=7)
        for start in range(0, num_tokens, document_tokens):
            writer.add(np.arange(start, min(start + document_tokens, num_tokens)), text_bytes=5)
        shards = {"train": (), "heldout": (), split: writer.close()}
        vocab_size = max(num_tokens, 1)
        CorpusManifest("uint32", vocab_size, tokenizer_sha256="none", source=("range",), shards=shards).save(tmp_path)
        return Corpus(tmp_path, split)

    return write_counting_corpus
