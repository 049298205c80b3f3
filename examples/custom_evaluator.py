"""Add a metric of your own to a run: how often the model prefers the true continuation of a text to a wrong one.

    python examples/custom_evaluator.py --corpus data/stdlib
    torchrun --nproc-per-node 2 examples/custom_evaluator.py --corpus data/stdlib parallel.tp=2

The evaluator runs on every layout and engine, because it uses only the methods of the engine.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

import dist_llm
from dist_llm.data.corpus import Corpus
from dist_llm.losses.cross_entropy import IGNORE_INDEX
from dist_llm.models.attention_mask import CAUSAL
from dist_llm.objectives.batch import Batch
from dist_llm.observe.metrics import MetricsRow
from dist_llm.training.callback import Callback, TrainingState


class ContinuationAccuracy:
    """An evaluator: the share of held-out windows whose own second half is more likely than that of another window.

    It evaluates at most `max_windows` windows. An untrained model reaches about 0.5.
    """

    metric_names = ("continuation_accuracy",)

    def __init__(self, max_windows: int = 64) -> None:
        self.max_windows = max_windows

    def evaluate(self, state: TrainingState) -> MetricsRow:
        seq_len = state.config.data.seq_len
        corpus = Corpus(state.loader.plan.sources[0].corpus.directory, "heldout")
        num_windows = min(self.max_windows, corpus.count_windows(seq_len + 1, seq_len))
        windows = torch.from_numpy(corpus.read(np.arange(num_windows) * seq_len, seq_len + 1).astype(np.int64))
        wrong_windows = windows.clone()
        wrong_windows[:, seq_len // 2 + 1 :] = windows[:, seq_len // 2 + 1 :].roll(1, dims=0)
        # The more likely continuation has the lower loss.
        is_correct = self._compute_losses(state, windows) < self._compute_losses(state, wrong_windows)
        return {"continuation_accuracy": float(is_correct.double().mean())}

    def _compute_losses(self, state: TrainingState, windows: torch.Tensor) -> torch.Tensor:
        """Return the loss of the second half of each window, [windows], on all ranks.

        Each data-parallel rank scores some of the windows. A forward pass of a sharded model needs all ranks, so all
        ranks run the same number of batches. If no window is left, window 0 fills the batch, and its loss is ignored.
        """
        engine, micro_batch = state.engine, state.config.data.micro_batch
        dp_rank, dp_size = engine.dp_rank_and_size
        losses = torch.zeros(len(windows), dtype=torch.float64, device=engine.device)
        for start in range(0, len(windows), micro_batch * dp_size):
            window_ids = start + dp_rank * micro_batch + torch.arange(micro_batch)
            has_window = window_ids < len(windows)
            tokens = windows[window_ids.where(has_window, 0)]
            targets = tokens[:, 1:].clone()
            targets[:, : targets.shape[1] // 2] = IGNORE_INDEX
            # `score` returns the loss of each sequence: the sum over its targets.
            losses_B = engine.score(engine.to_local_batch(Batch.build(tokens[:, :-1], targets, CAUSAL)))
            losses[window_ids[has_window]] = losses_B[has_window].double()
            state.heartbeat("the accuracy of continuations")
        return engine.all_reduce_over_loss_axes(losses)  # the ranks score different windows, or tokens


class BestAccuracy(Callback):
    """A callback: logs an event when the accuracy is higher than in all evaluations before."""

    def on_start(self, state: TrainingState) -> None:
        self.best = 0.0

    def on_metrics(self, state: TrainingState, rows: Sequence[MetricsRow]) -> Sequence[MetricsRow]:
        accuracy = rows[-1].get("continuation_accuracy", 0.0)
        if accuracy <= self.best:
            return []
        self.best = accuracy
        return [{"event": f"step {state.progress.step}: the best accuracy of continuations so far, {accuracy:.1%}"}]


def main() -> None:
    """Train with the evaluator and the callback."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="a prepared corpus")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of config keys")
    options = parser.parse_args()
    overrides = (f"data.path={options.corpus}", "run.dir=runs/custom-evaluator", "eval.every=10", *options.overrides)
    dist_llm.train("debug", *overrides, callbacks=[BestAccuracy()], evaluators=[ContinuationAccuracy()])


if __name__ == "__main__":
    main()
