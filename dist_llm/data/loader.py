"""Sample numbers -> the microbatches of one rank, made ahead in a thread."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from dist_llm.config.schema import DataConfig
from dist_llm.data.corpus import Corpus
from dist_llm.data.order import Order, Random, Shuffle
from dist_llm.errors import DataError
from dist_llm.objectives.batch import Batch

FOUND_AT_ONCE = 4096  # samples; the order's price is mostly one per call

Objective = Callable[[npt.NDArray[np.unsignedinteger]], Batch]  # windows [B, S+1] -> batch


def build_order(data: DataConfig, corpus: Corpus, seed: int) -> Order:
    """The order that the config asks for. Raises DataError where no window fits."""
    n_windows = corpus.n_windows(data.seq_len)
    if n_windows < 1:
        way_out = f"lower seq_len to at most {corpus.n_tokens - 1} or " if corpus.n_tokens > 1 else ""
        raise DataError(
            f"{corpus.directory}: {corpus.n_tokens} {corpus.split} tokens make no window of data.seq_len "
            f"{data.seq_len} + 1; {way_out}prepare more text"
        )
    if data.order == "random":
        return Random(seed, corpus.n_tokens - data.seq_len)
    return Shuffle(seed, n_windows, data.seq_len)


class Loader:
    """The batches of data rank `rank` of `ranks`; the global order is the same for any `ranks`.

    A step that starts at sample n consumes [n, n + global_batch); each rank takes its slice.
    """

    def __init__(
        self, corpus: Corpus, order: Order, objective: Objective, data: DataConfig, rank: int, ranks: int, pin: bool
    ) -> None:
        self.corpus, self.order, self.objective, self.pin = corpus, order, objective, pin
        self.window, self.global_batch, self.micro_batch = data.seq_len + 1, data.global_batch, data.micro_batch
        self.share = data.global_batch // ranks
        self.offset = rank * self.share
        self.prefetch = data.prefetch
        self._pool = ThreadPoolExecutor(1, "loader") if data.prefetch else None
        self._ahead: dict[int, Future[list[Batch]]] = {}
        self._found, self._found_first = np.empty((0, self.share), np.int64), 0

    def samples(self, first: int) -> npt.NDArray[np.int64]:
        """The sample numbers of this rank in the step that starts at sample `first`."""
        return np.arange(first + self.offset, first + self.offset + self.share, dtype=np.int64)

    def batches(self, first: int) -> list[Batch]:
        """The microbatches of the step that starts at sample `first`; starts on the next ones."""
        if self._pool is None:
            return self._make(first)
        for step in range(self.prefetch + 1):
            ahead = first + step * self.global_batch
            if ahead not in self._ahead:
                self._ahead[ahead] = self._pool.submit(self._make, ahead)
        return self._ahead.pop(first).result()

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _make(self, first: int) -> list[Batch]:
        rows = self.corpus.read(self._starts(first), self.window)
        batches = [self.objective(rows[i : i + self.micro_batch]) for i in range(0, len(rows), self.micro_batch)]
        return [batch.pin() for batch in batches] if self.pin else batches

    def _starts(self, first: int) -> npt.NDArray[np.int64]:
        """Where the windows of the step that starts at sample `first` begin, found for some steps at a time."""
        step, off_beat = divmod(first - self._found_first, self.global_batch)
        if off_beat or not 0 <= step < len(self._found):
            steps = max(1, FOUND_AT_ONCE // self.share)
            samples = self.samples(first) + self.global_batch * np.arange(steps)[:, None]
            self._found, self._found_first, step = self.order.starts(samples.ravel()).reshape(steps, -1), first, 0
        return self._found[step]
