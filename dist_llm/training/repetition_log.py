"""Log when the run has read all text of a data source once, 4 times and 10 times."""

import logging

from dist_llm.data.repetition import find_repetitions
from dist_llm.training.callback import Callback, TrainingState

log = logging.getLogger("dist_llm")


class RepetitionLog(Callback):
    """Predicts the repetitions of this start from the sample plan, and logs each one when the run reaches it."""

    def on_start(self, state: TrainingState) -> None:
        config, progress, plan = state.config, state.progress, state.loader.plan
        num_samples = (config.run.steps - progress.step) * config.data.global_batch
        end_sample = plan.advance(progress.samples, num_samples)
        self.repetitions = find_repetitions(plan, progress.samples, end_sample)

    def after_step(self, state: TrainingState) -> None:
        while self.repetitions and self.repetitions[0].sample <= state.progress.samples:
            log.info("%s", self.repetitions.pop(0))
