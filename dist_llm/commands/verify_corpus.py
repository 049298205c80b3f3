"""`dist-llm data verify`: check the hashes, ids and document boundaries of corpora."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track

from dist_llm.commands.run_data import BLOCK_TOKENS, console, select_corpora
from dist_llm.data.corpus import Corpus
from dist_llm.data.order import Ints
from dist_llm.data.shard import SPLITS, Shard
from dist_llm.errors import DataError
from dist_llm.text.tokenizer import Tokenizer


def verify(corpora: Sequence[Path], run: Path | None = None) -> int:
    """Print each problem of the corpora, or of the corpora of a run. Returns 1 if there is any, else 0."""
    num_problems = 0
    for directory in select_corpora(corpora, run):
        problems = list(_check_corpus(directory))
        for problem in problems:
            console.print(f"{directory}, {problem}")
        if not problems:
            console.print(f"{directory}: all hashes, ids and document boundaries are correct")
        num_problems += len(problems)
    return 1 if num_problems else 0


def _check_corpus(directory: Path) -> Iterator[str]:
    for split in SPLITS:
        try:
            problems = list(find_boundary_problems(Corpus(directory, split, verify="hash")))
        except DataError as error:
            problems = [str(error)]
        yield from (f"{split}: {problem}" for problem in problems)


def find_boundary_problems(corpus: Corpus) -> Iterator[str]:
    """Yield a line for each shard whose document offsets and end tokens disagree."""
    eot = Tokenizer.load(corpus.directory).eot
    has_index = corpus.manifest.source[:1] == ("adopted from megatron files",)
    for number in track(range(len(corpus.shards)), f"checking {corpus.split}", console=Console(stderr=True)):
        shard, offsets = corpus.shards[number], corpus.get_document_offsets(number).astype(np.int64)
        if len(offsets) and (offsets[0] < 0 or offsets[-1] >= shard.tokens or (np.diff(offsets) <= 0).any()):
            yield f"{shard.offsets_file}: document offsets do not ascend within the shard's {shard.tokens} tokens"
        elif eot is not None:  # without an end token, only the offsets define the documents
            yield from _compare_boundaries(shard, offsets[offsets > 0], _end_positions(corpus, number, eot), has_index)


def _end_positions(corpus: Corpus, shard_number: int, eot: int) -> Ints:
    """Return the positions of the end token within a shard."""
    num_tokens = corpus.shards[shard_number].tokens
    begin = corpus.get_shard_start(shard_number)
    positions = []
    for start in range(0, num_tokens, BLOCK_TOKENS):
        ids = corpus.read(np.array([begin + start]), min(BLOCK_TOKENS, num_tokens - start))[0]
        positions.append(np.flatnonzero(ids == eot) + start)
    return np.concatenate(positions)


def _compare_boundaries(shard: Shard, offsets: Ints, end_positions: Ints, has_index: bool) -> Iterator[str]:
    """Yield a line if documents, by their end tokens, begin elsewhere than `offsets` (without offset 0) say."""
    # The first document may begin before this shard, and the last may end after it.
    by_end_token = end_positions[end_positions < shard.tokens - 1] + 1
    if shard.offsets:  # adopted: a separator may also begin a document, and with an index there may be none
        leading = end_positions[end_positions > 0]
        candidates = (offsets if has_index else by_end_token, leading)
        by_end_token = min(candidates, key=lambda positions: len(np.setxor1d(positions, offsets)))
    if not np.array_equal(by_end_token, offsets):
        position = np.setxor1d(by_end_token, offsets)[0]
        missing = position in by_end_token
        yield f"{shard.file}: a document {'should begin' if missing else 'begins'} at token {position}, and " + (
            "the offsets have none there" if missing else "no <|endoftext|> is beside it"
        )
