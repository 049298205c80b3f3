"""Export a corpus as token files for nanoGPT: train.bin and val.bin."""

from pathlib import Path

import numpy as np

from dist_llm.data.corpus import Corpus
from dist_llm.data.shard import Split
from dist_llm.errors import DataError
from dist_llm.io.atomic import create_atomically, open_durably

FILE_OF_SPLIT: dict[Split, str] = {"train": "train.bin", "heldout": "val.bin"}
MAX_VOCAB_SIZE = 1 << 16  # ids are stored as uint16
BLOCK_TOKENS = 1 << 20  # tokens written at once


def export_bin(directory: Path, out: Path) -> dict[str, int]:
    """Write `out`/train.bin and `out`/val.bin in the format of nanoGPT: uint16 ids without a header.

    Return {file name: number of tokens}. `out` is created when both files are complete. Raises DataError if `out`
    exists, or an id does not fit into uint16.
    """
    corpora = {split: Corpus(directory, split) for split in FILE_OF_SPLIT}
    if (vocab_size := corpora["train"].manifest.vocab_size) > MAX_VOCAB_SIZE:
        raise DataError(f"{directory}: has {vocab_size} ids, but nanoGPT's .bin files hold at most {MAX_VOCAB_SIZE}")
    if out.exists():
        raise DataError(f"{out}: exists. Choose another directory, or remove it first.")
    try:
        with create_atomically(out) as partial:
            partial.mkdir(parents=True)
            for split, corpus in corpora.items():
                corpus.check_shard_sizes()
                _write_bin(corpus, partial / FILE_OF_SPLIT[split])
    except OSError as error:
        raise DataError(f"{error.filename or out}: cannot be written: {error.strerror or error}.") from None
    return {FILE_OF_SPLIT[split]: corpus.num_tokens for split, corpus in corpora.items()}


def _write_bin(corpus: Corpus, path: Path) -> None:
    """Write all tokens of one split as uint16."""
    with open_durably(path) as file:
        for start in range(0, corpus.num_tokens, BLOCK_TOKENS):
            ids = corpus.read(np.array([start]), min(BLOCK_TOKENS, corpus.num_tokens - start))[0]
            file.write(ids.astype("<u2").tobytes())
