"""`dist-llm data show`: decode the samples of one step of a run."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dist_llm.commands.run_data import console, open_run
from dist_llm.data.data_history import open_segment
from dist_llm.data.streams import WindowStream
from dist_llm.errors import DataError
from dist_llm.text.tokenizer import Tokenizer

SHOWN_CHARS = 300  # characters of a document that are printed without --full-text


def show_step(run: Path, step: int, rank: int | None = None, ranks: int | None = None, full_text: bool = False) -> None:
    """Print the samples of a step, or of one of `ranks` data-parallel ranks (default: as many as the run has).

    Raises DataError if the step or the rank does not exist.
    """
    config, history = open_run(run)
    if step < 1:
        raise DataError(f"--step {step}: the first is 1")
    segment = [segment for segment in history if segment.step < step][-1]
    segment_config, plan = open_segment(config, segment)
    first_sample = plan.advance(segment.first_sample, (step - 1 - segment.step) * segment.global_batch)
    samples = plan.list_sample_numbers(first_sample, segment.global_batch)
    if rank is not None:
        ranks = ranks or config.parallel.dp_replicate * config.parallel.dp_shard
        if not 0 <= rank < ranks or len(samples) % ranks:
            raise DataError(f"--rank {rank}: {len(samples)} samples divide over {ranks} data ranks, from 0")
        samples = samples.reshape(ranks, -1)[rank]
    tokenizer = Tokenizer.load(plan.sources[0].corpus.directory)
    streams, offsets = plan.locate_samples(samples)
    components = segment_config.objective.components
    for sample, stream_index, offset in zip(samples.tolist(), streams.tolist(), offsets.tolist(), strict=True):
        source_index, component_index = divmod(stream_index, len(components))
        stream, objective_name = plan.streams[stream_index], components[component_index].name
        source_name = plan.sources[source_index].name or stream.corpus.directory
        console.print(f"sample {sample}: {source_name}, {objective_name}", style="bold")
        for span in stream.get_spans(offset):
            for line in describe_span(stream, span, tokenizer, None if full_text else SHOWN_CHARS):
                console.print(f"  {line}")


def describe_span(
    stream: WindowStream, span: tuple[int, int], tokenizer: Tokenizer, max_chars: int | None
) -> Iterator[str]:
    """Yield a line for each document of a span (start, length) of corpus tokens: its offset and its text."""
    start, length = span
    corpus = stream.corpus
    ids = corpus.read(np.array([start]), length)[0]
    for document in corpus.iter_documents(start, length):
        begin, end = max(document.start, start), min(document.end, start + length)
        text = tokenizer.decode(ids[begin - start : end - start])
        shown = text if max_chars is None or len(text) <= max_chars else f"{text[:max_chars]}..."
        yield (
            f"{corpus.shards[document.shard].file}, document {document.index}, tokens {begin - document.start} to "
            f"{end - document.start} of {document.end - document.start} (corpus {begin} to {end}): {shown!r}"
        )
