"""The learning-rate schedule of a run that starts or resumes: planned once, kept in the checkpoint's config.

The rate stays a function of the step and the config. A resume whose config gives another rate says so.
"""

import logging

from dist_llm.checkpoint.folder import Folder
from dist_llm.checkpoint.store import read_progress
from dist_llm.config.derive import plan_schedule
from dist_llm.config.load import parse_yaml
from dist_llm.config.optim_sections import DecayKeys, OptimConfig, ScheduleConfig
from dist_llm.config.schema import Config
from dist_llm.config.section import parse_union
from dist_llm.optim.schedule import learning_rate

log = logging.getLogger("dist_llm")


def plan_rate(config: Config, checkpoint: Folder | None) -> Config:
    """The config with its schedule planned, for a run that resumes from `checkpoint` or starts (None).

    Logs the rate of the next step by the checkpoint's config and by this one where they differ, and what became of a
    schedule that was planned for another run.steps.
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
                "learning rate: the decay was planned to end at step %d and does, though run.steps is %d now: step %d "
                "has %.3g. With schedule.on_extend=replan it would have %.3g",
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
    """The step at which the decay ends; 0: not planned; None: the schedule has no such step."""
    return schedule.decay_steps if isinstance(schedule, DecayKeys) else None
