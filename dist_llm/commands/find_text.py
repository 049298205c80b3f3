"""`dist-llm data find`: the steps that read the documents with a given text."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track

from dist_llm.checkpoint.find_checkpoint import checkpoints_of_run
from dist_llm.commands.run_data import console, open_run
from dist_llm.data.corpus import Corpus, DocumentLocation
from dist_llm.data.data_history import DataHistory, Segment, open_segment
from dist_llm.data.order import Ints
from dist_llm.data.plan import SamplePlan
from dist_llm.data.streams import WindowStream
from dist_llm.text.tokenizer import Tokenizer

MAX_DOCUMENTS = 50
BLOCK_SAMPLES = 1 << 16  # samples whose windows are located at once


def find_text(text: str, run: Path) -> int:
    """Print the steps that read each document with the text. Returns 1 if there is no such document, else 0.

    A document that several segments of the data history read is printed for each of them and counted once.
    """
    config, history = open_run(run)
    last_step = _last_trained_step(run, history)
    printed_documents: set[tuple[Path, int]] = set()
    end_steps = [*(segment.step for segment in history[1:]), config.run.steps]
    for segment, end_step in zip(history, end_steps, strict=True):
        plan = open_segment(config, segment).plan
        for source in plan.sources:
            for document in iter_matching_documents(source.corpus, text):
                document_key = (source.corpus.directory, document.start)
                if document_key not in printed_documents and len(printed_documents) == MAX_DOCUMENTS:
                    console.print(f"stopped after {MAX_DOCUMENTS} matches; give a longer text to see others")
                    return 0
                printed_documents.add(document_key)
                file = source.corpus.shards[document.shard].file
                console.print(
                    f"{source.name or source.corpus.directory}, {file}, document {document.index}, corpus tokens "
                    f"{document.start} to {document.end}:",
                    style="bold",
                )
                reads = list(iter_steps_with_document(plan, segment, end_step, source.corpus, document))
                for step, sample in reads:
                    status = "was read" if step <= last_step else "will be read"
                    console.print(f"  step {step} ({status}), sample {sample}")
                if not reads:
                    console.print(f"  in no step from {segment.step + 1} to {end_step}")
    if not printed_documents:
        console.print("no document contains this text")
    return 0 if printed_documents else 1


def iter_matching_documents(corpus: Corpus, text: str) -> Iterator[DocumentLocation]:
    """Yield the documents whose decoded text contains `text`."""
    tokenizer = Tokenizer.load(corpus.directory)
    for shard in track(range(len(corpus.shards)), f"searching {corpus.directory}", console=Console(stderr=True)):
        num_tokens = corpus.shards[shard].tokens
        shard_start = corpus.get_shard_start(shard)
        document_bounds = np.append(corpus.get_document_offsets(shard).astype(np.int64), num_tokens) + shard_start
        for start_token, end_token in zip(document_bounds[:-1].tolist(), document_bounds[1:].tolist(), strict=True):
            if text in tokenizer.decode(corpus.read(np.array([start_token]), end_token - start_token)[0]):
                yield next(corpus.iter_documents(start_token, 1))


def iter_steps_with_document(
    plan: SamplePlan, segment: Segment, end_step: int, corpus: Corpus, document: DocumentLocation
) -> Iterator[tuple[int, int]]:
    """Yield (step, sample) of each window with tokens of the document, from the segment's first step to `end_step`.

    Locates all samples in blocks, with the plan that training uses. So the steps are those that read the document.
    """
    first_sample, global_batch = segment.first_sample, segment.global_batch
    steps_per_block = max(1, BLOCK_SAMPLES // global_batch)
    for first_step in range(segment.step, end_step, steps_per_block):
        samples = plan.list_sample_numbers(first_sample, min(steps_per_block, end_step - first_step) * global_batch)
        first_sample = plan.advance(first_sample, len(samples))
        streams, offsets = plan.locate_samples(samples)
        has_document = np.zeros(len(samples), bool)
        for stream_index in np.unique(streams).tolist():
            stream = plan.streams[stream_index]
            if stream.corpus is corpus:
                rows = streams == stream_index
                has_document[rows] = mask_windows_with_document(stream, offsets[rows], document)
        for row in np.flatnonzero(has_document).tolist():
            yield first_step + row // global_batch + 1, int(samples[row])


def mask_windows_with_document(stream: WindowStream, offsets: Ints, document: DocumentLocation) -> np.ndarray:
    """Return for each window, given by its offset, whether it contains tokens of the document."""
    if stream.packed_windows is None:
        return (offsets < document.end) & (offsets + stream.window_tokens > document.start)
    return np.isin(offsets, stream.packed_windows.find_document_windows(document))


def _last_trained_step(run: Path, history: DataHistory) -> int:
    """Return the step of the newest committed checkpoint, or else the step at which the newest segment starts."""
    committed = checkpoints_of_run(run).list_committed()
    return int(committed[-1].name.removeprefix("step_")) if committed else history[-1].step
