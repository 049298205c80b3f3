"""Callbacks that check the weights: replicas are equal, and all values are finite before they are saved."""

from dist_llm.checkpoint.flat_shard import local_chunks
from dist_llm.parallel.replica_check import find_mismatches
from dist_llm.training.callback import Callback, TrainingState
from dist_llm.training.guard import Guard


class ReplicaCheck(Callback):
    """Compares the replicas of the weights every `interval` steps (guard.digest_every) and before a checkpoint.

    If they differ, the guard raises DivergedError or RewindRequest on all ranks. None or 0 disables the check.
    """

    def __init__(self, guard: Guard, interval: int | None) -> None:
        self.guard, self.interval = guard, interval

    def after_step(self, state: TrainingState) -> None:
        if self.interval and state.progress.step % self.interval == 0:
            self._check(state)

    def before_save(self, state: TrainingState) -> None:
        if self.interval:
            self._check(state)

    def _check(self, state: TrainingState) -> None:
        if replica_groups := state.engine.replica_groups:
            self.guard.handle_divergence(state.progress.step, find_mismatches(replica_groups, state.world.host))


class FiniteWeightsCheck(Callback):
    """Checks before a checkpoint that all weights are finite.

    If some are not, the guard raises DivergedError or RewindRequest on all ranks.
    """

    def __init__(self, guard: Guard) -> None:
        self.guard = guard

    def before_save(self, state: TrainingState) -> None:
        weights = state.engine.state.weights().values()
        chunks = (chunk for weight in weights for _, chunk in local_chunks(weight))
        self.guard.check_weights_finite(state.progress.step, all(bool(chunk.isfinite().all()) for chunk in chunks))
