"""Build the callbacks of a run that the config selects."""

from dist_llm.training.callback import Callback, TrainingState
from dist_llm.training.gc_control import GCControl
from dist_llm.training.guard import Guard
from dist_llm.training.repetition_log import RepetitionLog
from dist_llm.training.replay import StepReplay
from dist_llm.training.resume import EarlierSteps
from dist_llm.training.sample_audit import SampleAudit
from dist_llm.training.stragglers import StragglerMonitor
from dist_llm.training.weight_checks import FiniteWeightsCheck, ReplicaCheck


def build_callbacks(state: TrainingState, guard: Guard, earlier_steps: EarlierSteps) -> list[Callback]:
    """Return the callbacks in the order in which the trainer calls them.

    Checks come first, from the cause to the effect, so that an error names the cause: wrong samples, a faulty
    computation, different replicas, weights that are not finite. Metrics follow. GCControl is last, so that it also
    collects the garbage of the others.
    """
    config = state.config
    return [
        SampleAudit(state.engine, state.loader, config.data.audit_every),
        StepReplay(guard, config.guard.replay_every),
        RepetitionLog(),
        ReplicaCheck(guard, config.guard.digest_every),
        FiniteWeightsCheck(guard),
        StragglerMonitor(state.world, state.engine, config.log.stragglers_seconds),
        earlier_steps,
        GCControl(),
    ]
