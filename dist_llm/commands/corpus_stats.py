"""`dist-llm data stats` and `to-bin`: print statistics of a corpus, and export its tokens as files of nanoGPT."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from dist_llm.commands.run_data import BLOCK_TOKENS, console, select_corpora
from dist_llm.config.data_sections import CACHE
from dist_llm.data.corpus import Corpus
from dist_llm.data.mirror import localize_corpus
from dist_llm.data.order import Ints
from dist_llm.text.export import export_bin
from dist_llm.text.tokenizer import Tokenizer

QUANTILES = (0.01, 0.25, 0.5, 0.75, 0.99, 1.0)
NUM_FREQUENT = 10  # tokens in the table


@dataclass(frozen=True)
class Distributions:
    """Document lengths in tokens and the count of each token id, in the training split of a corpus."""

    name: str
    document_lengths: Ints
    token_counts: Ints


def print_stats(corpora: Sequence[Path], run: Path | None = None, picture: Path | None = None) -> None:
    """Print a table of each corpus, or of the corpora of a run; draw the distributions to `picture`."""
    all_distributions = []
    for directory in select_corpora(corpora, run):
        corpus = Corpus(directory)
        distributions = measure_distributions(corpus)
        table = Table("training split", title=str(directory))
        table.add_column("", justify="right")
        for row in iter_table_rows(corpus, distributions):
            table.add_row(*row)
        console.print(table)
        all_distributions.append(distributions)
    if picture:
        draw_distributions(all_distributions, picture)
        console.print(f"drew {picture}")


def measure_distributions(corpus: Corpus) -> Distributions:
    """Read all tokens of a corpus and count them."""
    lengths = [
        np.diff(np.append(corpus.get_document_offsets(shard_index), shard.tokens))
        for shard_index, shard in enumerate(corpus.shards)
    ]
    counts = np.zeros(corpus.manifest.vocab_size, np.int64)
    block_starts = range(0, corpus.num_tokens, BLOCK_TOKENS)
    for start_token in track(block_starts, f"counting {corpus.directory}", console=Console(stderr=True)):
        ids = corpus.read(np.array([start_token]), min(BLOCK_TOKENS, corpus.num_tokens - start_token))[0]
        counts += np.bincount(ids, minlength=len(counts))
    return Distributions(str(corpus.directory), np.concatenate(lengths).astype(np.int64), counts)


def iter_table_rows(corpus: Corpus, distributions: Distributions) -> Iterator[tuple[str, str]]:
    """Yield (name, value) of each row of the table."""
    tokenizer, counts = Tokenizer.load(corpus.directory), distributions.token_counts
    yield "documents", f"{len(distributions.document_lengths):,}"
    yield "tokens", f"{corpus.num_tokens:,}"
    yield "bytes per token", f"{corpus.manifest.count_text_bytes(corpus.split) / corpus.num_tokens:.3f}"
    yield "tokens held out", f"{corpus.manifest.count_tokens('heldout'):,}"
    for quantile in QUANTILES:
        length = int(np.quantile(distributions.document_lengths, quantile))
        yield f"document length in tokens, {quantile:.0%} quantile", f"{length:,}"
    used = counts[counts > 0]
    frequencies = used / used.sum()
    yield "ids that occur", f"{len(used):,} of {len(counts):,}"
    yield "entropy of single tokens, bits", f"{-(frequencies * np.log2(frequencies)).sum():.3f}"
    for token in np.argsort(-counts)[:NUM_FREQUENT].tolist():
        yield f"frequency of {tokenizer.decode([token])!r} ({token})", f"{counts[token] / counts.sum():.2%}"


def draw_distributions(all_distributions: Sequence[Distributions], path: Path) -> None:
    """Draw histograms of document lengths, and token frequency over rank, to a PNG file."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5))
    longest = max(distributions.document_lengths.max() for distributions in all_distributions)
    bin_edges = np.geomspace(1, longest + 1, 50)
    for distributions in all_distributions:
        left.hist(distributions.document_lengths, bin_edges, alpha=0.6, label=distributions.name)
        counts = np.sort(distributions.token_counts[distributions.token_counts > 0])[::-1]
        right.loglog(np.arange(1, len(counts) + 1), counts / counts.sum(), label=distributions.name)
    left.set(xscale="log", xlabel="tokens", ylabel="documents", title="Document lengths")
    right.set(xlabel="rank", ylabel="frequency", title="Token frequencies")
    right.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def to_bin(corpus: str, out: Path) -> None:
    """Write train.bin and val.bin of nanoGPT to a new directory."""
    for file, num_tokens in export_bin(localize_corpus(corpus, CACHE), out).items():
        console.print(f"wrote {out / file}: {num_tokens:,} tokens of uint16")
