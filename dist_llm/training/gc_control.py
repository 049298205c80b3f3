"""Run Python's cyclic garbage collector only between steps.

A collection within a step stalls one rank, and all other ranks wait for that rank.
"""

import gc
from collections.abc import Sequence

from dist_llm.observe.metrics import MetricsRow
from dist_llm.training.callback import Callback, TrainingState


class GCControl(Callback):
    """From start to close, automatic collection is off, and objects that already existed are exempt from collection.

    It collects young objects when metrics are logged, and all objects after an evaluation and before a checkpoint.
    After `close`, the collector has its previous state.
    """

    def on_start(self, state: TrainingState) -> None:
        self.was_enabled = gc.isenabled()
        gc.disable()
        gc.collect()
        gc.freeze()

    def on_metrics(self, state: TrainingState, rows: Sequence[MetricsRow]) -> Sequence[MetricsRow]:
        gc.collect(1 if "loss" in rows[0] else 2)  # 1: the two young generations, which is fast
        return ()

    def before_save(self, state: TrainingState) -> None:
        gc.collect()

    def close(self, state: TrainingState) -> None:
        gc.unfreeze()
        if self.was_enabled:
            gc.enable()
