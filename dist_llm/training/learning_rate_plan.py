"""Plan the learning-rate schedule when a run starts or resumes.

The learning rate is a function of the step and the config. To plan the schedule is to fix the step at which the decay
ends. The config in each checkpoint stores that step. A resumed run logs if its config gives another learning rate than
the checkpoint.
"""

import logging

from dist_llm.checkpoint.checkpoint_folder import CheckpointFolder
from dist_llm.checkpoint.load_checkpoint import read_progress
from dist_llm.config.derive import resolve_schedule
from dist_llm.config.optim_sections import DecayKeys, OptimConfig, ScheduleConfig
from dist_llm.config.schema import Config
from dist_llm.config.section import parse_union
from dist_llm.config.yaml_parser import parse_yaml
from dist_llm.optim.schedule import learning_rate

log = logging.getLogger("dist_llm")


def plan_learning_rate(config: Config, checkpoint: CheckpointFolder | None) -> Config:
    """Return the config with its schedule planned. `checkpoint` is the checkpoint to resume; None for a new run.

    Log both learning rates of the next step if the config of the checkpoint gives another one. Log the end of the decay
    if the schedule was planned for another run.steps.
    """
    if checkpoint is None:
        return config.model_copy(update={"schedule": resolve_schedule(config)})
    saved_config = parse_yaml(checkpoint.read("config.yaml").decode(), f"{checkpoint}/config.yaml")
    saved_schedule: ScheduleConfig = parse_union(ScheduleConfig, saved_config.get("schedule", {}))
    saved_optim: OptimConfig = parse_union(OptimConfig, saved_config.get("optim", {}))
    planned, next_step = resolve_schedule(config, saved_schedule), read_progress(checkpoint).step + 1
    decay_steps = planned.decay_steps if isinstance(planned, DecayKeys) else None
    if not _is_planned(config.schedule) and decay_steps != config.run.steps:
        replanned_lr = learning_rate(config.optim, resolve_schedule(config), next_step)
        lr = learning_rate(config.optim, planned, next_step)
        if lr != replanned_lr:
            log.info(
                "learning rate: the decay was planned to end at step %d and still does, although run.steps is now %d: "
                "step %d has %.3g. With schedule.on_extend=replan it would have %.3g",
                *(decay_steps, config.run.steps, next_step, lr, replanned_lr),
            )
    if _is_planned(saved_schedule):
        saved_lr = learning_rate(saved_optim, saved_schedule, next_step)
        lr = learning_rate(config.optim, planned, next_step)
        if saved_lr != lr:
            log.warning(
                "learning rate of step %d: %.3g by the checkpoint's config, %.3g by this one", next_step, saved_lr, lr
            )
    return config.model_copy(update={"schedule": planned})


def _is_planned(schedule: ScheduleConfig) -> bool:
    """Return whether the schedule has no decay_steps, or its decay_steps are set."""
    return not isinstance(schedule, DecayKeys) or schedule.decay_steps is not None
