"""Plan the learning-rate schedule when a run starts or resumes. The checkpoint's config stores the result.

The learning rate is a function of the step and the config. A resume logs if the config now gives another rate.
"""

import logging

from dist_llm.checkpoint.checkpoint_folder import CheckpointFolder
from dist_llm.checkpoint.store import read_progress
from dist_llm.config.derive import plan_schedule
from dist_llm.config.load import parse_yaml
from dist_llm.config.optim_sections import DecayKeys, OptimConfig, ScheduleConfig
from dist_llm.config.schema import Config
from dist_llm.config.section import parse_union
from dist_llm.optim.schedule import learning_rate

log = logging.getLogger("dist_llm")


def plan_learning_rate(config: Config, checkpoint: CheckpointFolder | None) -> Config:
    """Return the config with its schedule planned. `checkpoint`: the one to resume from; None for a new run.

    If the checkpoint's config gives the next step another learning rate, log both rates. If the schedule was planned
    for another run.steps, log whether its end moves.
    """
    if checkpoint is None:
        return plan_schedule(config)
    saved = parse_yaml(checkpoint.read("config.yaml").decode(), f"{checkpoint}/config.yaml")
    schedule: ScheduleConfig = parse_union(ScheduleConfig, saved.get("schedule", {}))
    optim: OptimConfig = parse_union(OptimConfig, saved.get("optim", {}))
    planned, next_step = plan_schedule(config, schedule), read_progress(checkpoint).step + 1
    decay_steps = _decay_steps(planned.schedule)
    if _decay_steps(config.schedule) == 0 and decay_steps != config.run.steps:
        replanned = learning_rate(config.optim, plan_schedule(config).schedule, next_step)
        rate = learning_rate(config.optim, planned.schedule, next_step)
        if rate != replanned:
            log.info(
                "learning rate: the decay was planned to end at step %d and still does, although run.steps is now %d: "
                "step %d has %.3g. With schedule.on_extend=replan it would have %.3g",
                *(decay_steps, config.run.steps, next_step, rate, replanned),
            )
    if _decay_steps(schedule) != 0:
        before, now = (
            learning_rate(optim, schedule, next_step),
            learning_rate(config.optim, planned.schedule, next_step),
        )
        if before != now:
            log.warning(
                "learning rate of step %d: %.3g by the checkpoint's config, %.3g by this one", next_step, before, now
            )
    return planned


def _decay_steps(schedule: ScheduleConfig) -> int | None:
    """Return the step at which the decay ends; 0 if it is not planned; None if the schedule has no such step."""
    return schedule.decay_steps if isinstance(schedule, DecayKeys) else None
