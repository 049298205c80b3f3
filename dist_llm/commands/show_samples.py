"""`dist-llm data show`: decode the samples of one step of a run."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dist_llm.commands.run_data import console, open_run
from dist_llm.data.data_history import open_segment
from dist_llm.data.order import Ints
from dist_llm.data.streams import WindowStream
from dist_llm.errors import DataError
from dist_llm.text.tokenizer import Tokenizer

SHOWN_CHARS = 300  # characters of a document that are printed without --full-text


def show_samples(
    run: Path, step: int, rank: int | None = None, num_ranks: int | None = None, full_text: bool = False
) -> None:
    """Print the samples of a step, or those of one data-parallel rank if `rank` is given.

    `num_ranks` is the number of data-parallel ranks that share the samples; by default as many as in the run. Raises
    DataError if the step or the rank does not exist.
    """
    config, history = open_run(run)
    if step < 1:
        raise DataError(f"--step {step}: the first step is 1")
    segment = [segment for segment in history if segment.step < step][-1]  # the latest that began before this step
    segment_config, plan = open_segment(config, segment)
    first_sample = plan.advance(segment.first_sample, (step - 1 - segment.step) * segment.global_batch)
    sample_numbers = plan.list_sample_numbers(first_sample, segment.global_batch)
    if rank is not None:
        num_ranks = num_ranks or config.parallel.dp_replicate * config.parallel.dp_shard
        sample_numbers = _select_samples_of_rank(sample_numbers, rank, num_ranks)
    tokenizer = Tokenizer.load(plan.sources[0].corpus.directory)
    streams = plan.streams
    locations = plan.locate_samples(sample_numbers)
    for sample_number, stream_id, location in zip(
        sample_numbers.tolist(), locations.stream_ids.tolist(), locations.offsets.tolist(), strict=True
    ):
        stream = streams[stream_id]
        source, component_index = plan.get_source_and_component(stream_id)
        component_name = segment_config.objective.components[component_index].name
        source_name = source.name or source.corpus.directory
        console.print(f"sample {sample_number}: {source_name}, {component_name}", style="bold")
        for span in stream.get_spans(location):
            for line in describe_span(stream, span, tokenizer, None if full_text else SHOWN_CHARS):
                console.print(f"  {line}")


def _select_samples_of_rank(sample_numbers: Ints, rank: int, num_ranks: int) -> Ints:
    """Return the sample numbers of one data-parallel rank of `num_ranks`. Raises DataError if it does not exist."""
    if num_ranks < 1 or len(sample_numbers) % num_ranks:
        raise DataError(
            f"the {len(sample_numbers)} samples of the step do not divide over {num_ranks} data-parallel ranks; give "
            "another --ranks"
        )
    if not 0 <= rank < num_ranks:
        raise DataError(f"--rank {rank}: the data-parallel ranks are 0 to {num_ranks - 1}")
    return sample_numbers.reshape(num_ranks, -1)[rank]


def describe_span(
    stream: WindowStream, span: tuple[int, int], tokenizer: Tokenizer, max_chars: int | None
) -> Iterator[str]:
    """Yield a line for each document in a span (start, length) of tokens: the position and text of its part there."""
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
