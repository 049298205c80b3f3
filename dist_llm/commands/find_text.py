"""`dist-llm data find`: the steps that read the documents with a given text."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track

from dist_llm.checkpoint.store import checkpoints_of_run
from dist_llm.commands.run_data import BLOCK_TOKENS, console, open_run
from dist_llm.data.corpus import Corpus, Document
from dist_llm.data.data_history import DataHistory, Segment, open_segment
from dist_llm.data.order import Ints
from dist_llm.data.plan import SamplePlan
from dist_llm.data.streams import WindowStream
from dist_llm.text.tokenizer import Tokenizer

MAX_DOCUMENTS = 50
BLOCK_SAMPLES = BLOCK_TOKENS  # samples located per call


def find_text(text: str, run: Path) -> int:
    """Print the steps that read each document with the text. Returns 1 if there is no such document, else 0."""
    config, history = open_run(run)
    last_step = _last_trained_step(run, history)
    num_documents = 0
    ends = [*(segment.step for segment in history[1:]), config.run.steps]
    for segment, end in zip(history, ends, strict=True):
        _, plan = open_segment(config, segment)
        for source in plan.sources:
            for document in iter_matching_documents(source.corpus, text):
                num_documents += 1
                file = source.corpus.shards[document.shard].file
                console.print(
                    f"{source.name or source.corpus.directory}, {file}, document {document.index}, corpus tokens "
                    f"{document.start} to {document.end}:",
                    style="bold",
                )
                reads = list(iter_reads(plan, segment, end, source.corpus, document))
                for step, sample in reads:
                    tense = "was read" if step <= last_step else "will be read"
                    console.print(f"  step {step} ({tense}), sample {sample}")
                if not reads:
                    console.print(f"  not in steps {segment.step + 1} to {end}")
                if num_documents == MAX_DOCUMENTS:
                    console.print(f"{MAX_DOCUMENTS} documents are shown; give a longer text to see others")
                    return 0
    if not num_documents:
        console.print("no document contains this text")
    return 0 if num_documents else 1


def iter_matching_documents(corpus: Corpus, text: str) -> Iterator[Document]:
    """Yield the documents whose decoded text contains `text`."""
    tokenizer = Tokenizer.load(corpus.directory)
    for shard in track(range(len(corpus.shards)), f"searching {corpus.directory}", console=Console(stderr=True)):
        begin = int(corpus.ends[shard]) - corpus.shards[shard].tokens
        bounds = np.append(corpus.document_offsets(shard).astype(np.int64), corpus.shards[shard].tokens) + begin
        for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
            if text in tokenizer.decode(corpus.read(np.array([start]), end - start)[0]):
                yield next(corpus.iter_documents(start, 1))


def iter_reads(
    plan: SamplePlan, segment: Segment, end: int, corpus: Corpus, document: Document
) -> Iterator[tuple[int, int]]:
    """Yield (step, sample) of each window with tokens of the document, from the segment's first step to step `end`.

    Looks up all samples in blocks, through the plan that training uses, so that both agree by construction.
    """
    first, size = segment.first, segment.global_batch
    steps = max(1, BLOCK_SAMPLES // size)
    for step in range(segment.step, end, steps):
        samples = plan.sample_numbers(first, min(steps, end - step) * size)
        first = plan.advance(first, len(samples))
        streams, positions = plan.locate_samples(samples)
        has_document = np.zeros(len(samples), bool)
        for number in np.unique(streams).tolist():
            stream = plan.streams[number]
            if stream.corpus is corpus:
                rows = streams == number
                has_document[rows] = windows_with_document(stream, positions[rows], document)
        for row in np.flatnonzero(has_document).tolist():
            yield step + row // size + 1, int(samples[row])


def windows_with_document(stream: WindowStream, positions: Ints, document: Document) -> np.ndarray:
    """Return which of the windows contain tokens of the document: a boolean array."""
    if stream.packed_windows is None:
        return (positions < document.end) & (positions + stream.window > document.start)
    return np.isin(positions, stream.packed_windows.windows_of_document(document))


def _last_trained_step(run: Path, history: DataHistory) -> int:
    """Return the step of the newest checkpoint."""
    committed = checkpoints_of_run(run).list_committed()
    return int(committed[-1].name.removeprefix("step_")) if committed else history[-1].step
