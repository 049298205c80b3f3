"""Look at prepared text, and at what a run reads of it.

  show     the documents that one step of a run saw, or will see, decoded
  find     in which steps of a run the documents with some text were, and will be, seen
  verify   hashes, ids and document boundaries of a corpus, or of all corpora of a run
  stats    lengths of documents, frequencies of tokens, bytes per token: a table and a picture
  to-bin   a corpus as nanoGPT's train.bin and val.bin

examples:
  python tools/inspect_data.py show --run runs/demo --step 7
  python tools/inspect_data.py show --run runs/demo --step 7 --rank 1 --ranks 2
  python tools/inspect_data.py find "def quicksort" --run runs/demo
  python tools/inspect_data.py verify data/stdlib
  python tools/inspect_data.py stats data/stdlib --picture stats.png
  python tools/inspect_data.py to-bin data/stdlib nanogpt/data/stdlib

No process group, no GPU. Exit code 1: verify found something wrong, or find nothing; 2: the command cannot be run.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from dist_llm.checkpoint.store import checkpoints_of_run
from dist_llm.config.load import load_saved
from dist_llm.config.schema import CACHE, Config
from dist_llm.data.corpus import Corpus, Document
from dist_llm.data.data_history import HISTORY_FILE, DataHistory, Segment, open_segment, parse_history
from dist_llm.data.mirror import localize_corpus
from dist_llm.data.order import Ints
from dist_llm.data.plan import SamplePlan
from dist_llm.data.shard import SPLITS
from dist_llm.data.streams import WindowStream
from dist_llm.errors import DataError, UserError
from dist_llm.text.export import export_bin
from dist_llm.text.tokenizer import Tokenizer

SHOWN_CHARS = 300  # of a document; --whole shows all
MOST_FOUND = 50
AT_ONCE = 1 << 16  # samples, or tokens

console = Console(highlight=False, markup=False, soft_wrap=True)


def main() -> int:
    """Run the command of the arguments."""
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top.add_subparsers(dest="command", required=True)
    one = commands.add_parser("show", help="the documents of a step")
    one.add_argument("--run", type=Path, required=True, help="run.dir of `dist-llm train`")
    one.add_argument("--step", type=int, required=True, help="the first is 1")
    one.add_argument("--rank", type=int, help="only what this data-parallel rank reads (default: all)")
    one.add_argument("--ranks", type=int, help="of so many (default: as in the run's config)")
    one.add_argument("--whole", action="store_true", help=f"all of each document, not {SHOWN_CHARS} characters")
    one = commands.add_parser("find", help="the steps that see a text")
    one.add_argument("text", help="what the documents contain")
    one.add_argument("--run", type=Path, required=True, help="run.dir of `dist-llm train`")
    for name, text in (("verify", "check a corpus"), ("stats", "numbers of a corpus")):
        one = commands.add_parser(name, help=text)
        one.add_argument("corpus", type=Path, nargs="*", help="directories that `dist-llm prepare` or `adopt` made")
        one.add_argument("--run", type=Path, help="in their place: the corpora of a run")
    one.add_argument("--picture", type=Path, help="a PNG of the distributions")
    one = commands.add_parser("to-bin", help="train.bin and val.bin of nanoGPT")
    one.add_argument("corpus", help="directory that `dist-llm prepare` or `adopt` made, or its URL")
    one.add_argument("out", type=Path, help="the directory to make")
    options = top.parse_args()
    run = {"show": show, "find": find, "verify": verify, "stats": stats, "to-bin": to_bin}
    try:
        return run[options.command](options)
    except UserError as error:
        print(f"inspect_data: {error}", file=sys.stderr)
        return 2


def show(options: argparse.Namespace) -> int:
    """Print every sample of a step."""
    config, history = open_run(options.run)
    if options.step < 1:
        raise DataError(f"--step {options.step}: the first is 1")
    segment = [each for each in history if each.step < options.step][-1]
    then, plan = open_segment(config, segment)
    first = plan.advance(segment.first, (options.step - 1 - segment.step) * segment.global_batch)
    samples = plan.sample_numbers(first, segment.global_batch)
    if options.rank is not None:
        ranks = options.ranks or config.parallel.dp_replicate * config.parallel.dp_shard
        if not 0 <= options.rank < ranks or len(samples) % ranks:
            raise DataError(f"--rank {options.rank}: {len(samples)} samples divide over {ranks} data ranks, from 0")
        samples = samples.reshape(ranks, -1)[options.rank]
    tokenizer = Tokenizer.load(plan.sources[0].corpus.directory)
    streams, places = plan.locate_samples(samples)
    for sample, number, place in zip(samples.tolist(), streams.tolist(), places.tolist(), strict=True):
        source, member = divmod(number, len(then.objective.components))
        stream, name = plan.streams[number], plan.sources[source].name
        objective = then.objective.components[member].name
        console.print(f"sample {sample}: {name or stream.corpus.directory}, {objective}", style="bold")
        for span in stream.spans(place):
            for line in described(stream, span, tokenizer, None if options.whole else SHOWN_CHARS):
                console.print(f"  {line}")
    return 0


def described(stream: WindowStream, span: tuple[int, int], tokenizer: Tokenizer, most: int | None) -> Iterator[str]:
    """The parts of documents in a span: where each is, and its text."""
    start, length = span
    corpus = stream.corpus
    ids = corpus.read(np.array([start]), length)[0]
    for document in corpus.iter_documents(start, length):
        begin, end = max(document.start, start), min(document.end, start + length)
        text = tokenizer.decode(ids[begin - start : end - start])
        shown = text if most is None or len(text) <= most else f"{text[:most]}..."
        yield (
            f"{corpus.shards[document.shard].file}, document {document.index}, tokens {begin - document.start} to "
            f"{end - document.start} of {document.end - document.start} (corpus {begin} to {end}): {shown!r}"
        )


def find(options: argparse.Namespace) -> int:
    """Print the steps of each document that contains the text."""
    config, history = open_run(options.run)
    done = trained(options.run, history)
    seen = 0
    for segment, end in zip(history, [*(each.step for each in history[1:]), config.run.steps], strict=True):
        _, plan = open_segment(config, segment)
        for source in plan.sources:
            for document in containing(source.corpus, options.text):
                seen += 1
                file = source.corpus.shards[document.shard].file
                console.print(
                    f"{source.name or source.corpus.directory}, {file}, document {document.index}, corpus tokens "
                    f"{document.start} to {document.end}:",
                    style="bold",
                )
                visits = list(steps_of(plan, segment, end, source.corpus, document))
                for step, sample in visits:
                    tense = "was seen" if step <= done else "will be seen"
                    console.print(f"  step {step} ({tense}), sample {sample}")
                if not visits:
                    console.print(f"  in no step from {segment.step + 1} to {end}")
                if seen == MOST_FOUND:
                    console.print(f"{MOST_FOUND} documents are shown; look for a longer text to see others")
                    return 0
    if not seen:
        console.print("no document has that text")
    return 0 if seen else 1


def containing(corpus: Corpus, text: str) -> Iterator[Document]:
    """The documents whose text contains `text`."""
    tokenizer = Tokenizer.load(corpus.directory)
    for shard in track(range(len(corpus.shards)), f"searching {corpus.directory}", console=Console(stderr=True)):
        begin = int(corpus.ends[shard]) - corpus.shards[shard].tokens
        bounds = np.append(corpus.document_offsets(shard).astype(np.int64), corpus.shards[shard].tokens) + begin
        for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
            if text in tokenizer.decode(corpus.read(np.array([start]), end - start)[0]):
                yield next(corpus.iter_documents(start, 1))


def steps_of(
    plan: SamplePlan, segment: Segment, end: int, corpus: Corpus, document: Document
) -> Iterator[tuple[int, int]]:
    """(step, sample) of each window of a segment, up to step `end`, that has tokens of the document.

    Every sample is looked up, some thousands at a time, so that this cannot differ from what training reads.
    """
    first, size = segment.first, segment.global_batch
    steps = max(1, AT_ONCE // size)
    for step in range(segment.step, end, steps):
        samples = plan.sample_numbers(first, min(steps, end - step) * size)
        first = plan.advance(first, len(samples))
        streams, places = plan.locate_samples(samples)
        touches = np.zeros(len(samples), bool)
        for number in np.unique(streams).tolist():
            stream = plan.streams[number]
            if stream.corpus is corpus:
                rows = streams == number
                touches[rows] = overlaps(stream, places[rows], document)
        for row in np.flatnonzero(touches).tolist():
            yield step + row // size + 1, int(samples[row])


def overlaps(stream: WindowStream, places: Ints, document: Document) -> np.ndarray:
    """Which of the windows have tokens of the document."""
    if stream.packed_windows is None:
        return (places < document.end) & (places + stream.window > document.start)
    return np.isin(places, stream.packed_windows.windows_of_document(document))


def verify(options: argparse.Namespace) -> int:
    """Check every corpus; print what is wrong."""
    wrong = 0
    for directory in corpora_of(options):
        for split in SPLITS:
            try:
                problems = list(problems_of(Corpus(directory, split, verify="hash")))
            except DataError as error:
                problems = [str(error)]
            for problem in problems:
                console.print(f"{directory}, {split}: {problem}")
            wrong += len(problems)
        if not wrong:
            console.print(f"{directory}: every hash, id and document boundary is as it should be")
    return 1 if wrong else 0


def _has_index(corpus: Corpus) -> bool:
    """Whether an index of Megatron's says where documents begin."""
    return corpus.manifest.source[:1] == ("adopted from megatron files",)


def problems_of(corpus: Corpus) -> Iterator[str]:
    """What is wrong with ids and document boundaries, a line for each shard."""
    eot = Tokenizer.load(corpus.directory).eot
    for number in track(range(len(corpus.shards)), f"checking {corpus.split}", console=Console(stderr=True)):
        shard = corpus.shards[number]
        begin, starts = int(corpus.ends[number]) - shard.tokens, corpus.document_offsets(number).astype(np.int64)
        if len(starts) and (starts[0] < 0 or starts[-1] >= shard.tokens or (np.diff(starts) <= 0).any()):
            yield f"{shard.offsets_file}: document offsets do not ascend within the shard's {shard.tokens} tokens"
            continue
        ends: list[Ints] = []
        for start in range(0, shard.tokens, AT_ONCE):
            ids = corpus.read(np.array([begin + start]), min(AT_ONCE, shard.tokens - start))[0]
            ends.append(np.flatnonzero(ids == eot) + start)
        found = np.concatenate(ends)
        # In a shard that others cut, a document may begin before it or end after it.
        inner = found[found < shard.tokens - 1] + 1
        wanted = starts[starts > 0]
        if eot is None:  # no id ends a document: the offsets alone know
            continue
        if shard.offsets:  # adopted: a separator may also begin a document, and with an index there need be none
            begun = found[found > 0]
            inner = min(wanted if _has_index(corpus) else inner, begun, key=lambda each: len(np.setxor1d(each, wanted)))
        if not np.array_equal(inner, wanted):
            odd = np.setxor1d(inner, wanted)[0]
            yield f"{shard.file}: a document {'should begin' if odd in inner else 'begins'} at token {odd}, and " + (
                "the offsets have none there" if odd in inner else "no <|endoftext|> is beside it"
            )


def to_bin(options: argparse.Namespace) -> int:
    """Write a corpus as nanoGPT's files."""
    for file, tokens in export_bin(localize_corpus(options.corpus, CACHE), options.out).items():
        console.print(f"wrote {options.out / file}: {tokens:,} tokens of uint16")
    return 0


def stats(options: argparse.Namespace) -> int:
    """Print a table of each corpus; draw a picture if asked for one."""
    drawn = []
    for directory in corpora_of(options):
        corpus = Corpus(directory)
        tokenizer = Tokenizer.load(directory)
        lengths = [
            np.diff(np.append(corpus.document_offsets(n), corpus.shards[n].tokens)) for n in range(len(corpus.shards))
        ]
        documents = np.concatenate(lengths).astype(np.int64)
        counts = np.zeros(corpus.manifest.vocab_size, np.int64)
        for start in track(range(0, corpus.n_tokens, AT_ONCE), f"counting {directory}", console=Console(stderr=True)):
            ids = corpus.read(np.array([start]), min(AT_ONCE, corpus.n_tokens - start))[0]
            counts += np.bincount(ids, minlength=len(counts))
        drawn.append((str(directory), documents, counts))
        table = Table(title=str(directory))
        table.add_column("of its training text")
        table.add_column("", justify="right")
        for name, value in rows_of(corpus, documents, counts, tokenizer):
            table.add_row(name, value)
        console.print(table)
    if options.picture:
        draw(drawn, options.picture)
        console.print(f"drew {options.picture}")
    return 0


def rows_of(corpus: Corpus, documents: Ints, counts: Ints, tokenizer: Tokenizer) -> Iterator[tuple[str, str]]:
    """The lines of the table."""
    yield "documents", f"{len(documents):,}"
    yield "tokens", f"{corpus.n_tokens:,}"
    yield "bytes per token", f"{corpus.manifest.text_bytes(corpus.split) / corpus.n_tokens:.3f}"
    yield "tokens held out", f"{corpus.manifest.tokens('heldout'):,}"
    for share in (0.01, 0.25, 0.5, 0.75, 0.99, 1.0):
        yield f"tokens of a document, {share:.0%} have at most", f"{int(np.quantile(documents, share)):,}"
    used = counts[counts > 0]
    share = used / used.sum()
    yield "ids that occur", f"{len(used):,} of {len(counts):,}"
    yield "entropy of single tokens, bits", f"{-(share * np.log2(share)).sum():.3f}"
    for token in np.argsort(-counts)[:10].tolist():
        yield f"share of {tokenizer.decode([token])!r} ({token})", f"{counts[token] / counts.sum():.2%}"


def draw(found: Sequence[tuple[str, Ints, Ints]], path: Path) -> None:
    """Lengths of documents, and how often the n-th most frequent token occurs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5))
    edges = np.geomspace(1, max(documents.max() for _, documents, _ in found) + 1, 50)
    for name, documents, counts in found:
        left.hist(documents, edges, alpha=0.6, label=name)
        ranked = np.sort(counts[counts > 0])[::-1]
        right.loglog(np.arange(1, len(ranked) + 1), ranked / ranked.sum(), label=name)
    left.set(xscale="log", xlabel="tokens", ylabel="documents", title="Lengths of documents")
    right.set(xlabel="rank", ylabel="share of all tokens", title="Frequencies of tokens")
    right.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def open_run(directory: Path) -> tuple[Config, DataHistory]:
    """The config and history of a run. Raises DataError where there is none."""
    if not (directory / HISTORY_FILE).exists():
        raise DataError(f"--run {directory}: has no {HISTORY_FILE}; give the run.dir of a `dist-llm train`")
    config = load_saved(directory)
    return config, parse_history((directory / HISTORY_FILE).read_bytes(), str(directory / HISTORY_FILE))


def trained(directory: Path, history: DataHistory) -> int:
    """The step of the newest checkpoint."""
    committed = checkpoints_of_run(directory).list_committed()
    return int(committed[-1].name.removeprefix("step_")) if committed else history[-1].step


def corpora_of(options: argparse.Namespace) -> list[Path]:
    """The corpora that are named, or those that the run reads now."""
    if options.run is None:
        if not options.corpus:
            raise DataError(f"{options.command}: name a corpus, or a run with --run")
        return [Path(localize_corpus(str(each), CACHE)) for each in options.corpus]
    _, history = open_run(options.run)
    return [Path(source.path) for source in history[-1].mix.sources]


if __name__ == "__main__":
    sys.exit(main())
