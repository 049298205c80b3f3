"""Steps of third-party engines on the ranks of a world, with the traces that the law compares."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from dist_llm.checkpoint import store
from dist_llm.checkpoint.checkpoint_state import GuardState, Progress
from dist_llm.config.schema import Config, GuardConfig
from dist_llm.engines.accelerate_engine import AccelerateEngine
from dist_llm.engines.base import Engine
from dist_llm.engines.build_engine import build_engine
from dist_llm.engines.deepspeed_engine import DeepSpeedEngine
from dist_llm.training.guard import Guard
from dist_llm.training.step import train_step
from tests.laws.law import (
    ShardsByName,
    Trace,
    assert_traces_match,
    copy_local_shards,
    make_batches,
    merge_shards,
    reference,
    save_checkpoint,
)
from tests.laws.worlds import world

CPU = torch.device("cpu")


def deepspeed_sections(stage: int, **options: Any) -> dict[str, Any]:
    """Return the config sections of DeepSpeed with a ZeRO stage."""
    return {"engine": "deepspeed", "deepspeed": {"stage": stage, **options}}


def accelerate_sections(plugin: str, **options: Any) -> dict[str, Any]:
    """Return the config sections of accelerate with a plugin."""
    return {"engine": "accelerate", "accelerate": {"plugin": plugin}, **options}


ENGINES = {
    **{f"zero{stage}": deepspeed_sections(stage) for stage in range(4)},
    "ddp": accelerate_sections("ddp"),
    "accelerate-zero2": accelerate_sections("deepspeed", deepspeed={"stage": 2}),
    "accelerate-zero3": accelerate_sections("deepspeed", deepspeed={"stage": 3}),
}
OFFLOADED = {
    "zero2-offload": deepspeed_sections(2, offload_optimizer="cpu"),
    "zero3-offload": deepspeed_sections(3, offload_optimizer="cpu", offload_params="cpu"),
}


@dataclass
class EngineTrace:
    """One rank's record of its steps.

    Per step: loss, scored tokens, norm and learning rates. Further: shards of weights and moments, and a held-out loss.
    """

    losses: list[float] = field(default_factory=list)
    scored: list[int] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    rates: list[list[float]] = field(default_factory=list)
    states: list[ShardsByName] = field(default_factory=list)  # after the first step, and after the last
    heldout: float = 0.0


def run_steps(
    config: Config,
    steps: Sequence[int],
    bug: str | None = None,
    load: Path | None = None,
    save: Path | None = None,
    skip: bool = False,
) -> EngineTrace:
    """Run steps on this rank, from a checkpoint if `load` is given, and save one if `save` is given.

    With `skip`, the guard skips a step that is not finite.
    """
    with open_engine(config) as engine, ExitStack() as planted:
        if bug:
            planted.enter_context((BUGS | FAULTS)[bug]())
        trace = EngineTrace()
        if load is not None:
            store.load_checkpoint(load, engine.state)
        guard = Guard(GuardConfig(not_finite="skip"), GuardState(), engine, Path("unused"))
        for step in steps:
            should_apply = partial(guard.should_apply, step) if skip else None
            report = train_step(
                engine, make_batches(config, engine, step), learning_rate(config, step), step, should_apply=should_apply
            )
            trace.losses.append(report.loss.item())
            trace.scored.append(int(report.num_valid_tokens))
            trace.norms.append(report.grad_norm.item())
            trace.rates.append([group["lr"] for group in engine.optimizer.param_groups])  # type: ignore[attr-defined]
            if step in (steps[0], steps[-1]):
                trace.states.append(copy_local_shards((engine.state.weights() | engine.state.moments()).items()))
        (batch, *_) = make_batches(config, engine, 1000)
        trace.heldout = engine.all_reduce_over_data(engine.score(engine.to_local_batch(batch)).sum()).item()
        if save is not None:
            save_checkpoint(store.CheckpointStore(save), engine, Progress(steps[-1] + 1), {})
        return trace


def native_reference(config: Config, steps: int) -> Trace:
    """Return the steps of one native process with the same learning rates as `run_steps`."""
    native = config.model_copy(update={"engine": "native"})
    return reference(native, steps, decay=0.7)


def assert_engine_matches_one_process(
    ranks: int, config: Config, steps: int, bug: str | None = None, first: float = 1e-5
) -> None:
    """Raise AssertionError unless the engine's steps are those of one native process."""
    by_rank = world(ranks).run(run_steps, config, range(steps), bug)
    expected = native_reference(config, steps)
    assert_traces_match(merge_engine_traces(by_rank, expected), expected, first=first)
    for step, rates in enumerate(by_rank[0].rates):
        assert rates == [config.optim.lr * 0.7**step] * len(rates), "the rate of each step, in each group"


def learning_rate(config: Config, step: int) -> float:
    """Return a different learning rate for each step, so that a rate that is set too late is detected."""
    return config.optim.lr * 0.7**step


@contextmanager
def open_engine(config: Config) -> Iterator[Engine]:
    """Build an engine, and reset the global settings of its library afterwards."""
    with patch.dict(os.environ):
        engine = build_engine(config, CPU)
        try:
            yield engine
        finally:
            if isinstance(engine, DeepSpeedEngine):
                engine.deepspeed.destroy()
            if config.engine == "accelerate":
                from accelerate.state import AcceleratorState, GradientState

                AcceleratorState._reset_state(reset_partial_state=True)
                GradientState._reset_state()


def merge_engine_traces(by_rank: list[EngineTrace], expected: Trace) -> Trace:
    """Merge the ranks' steps into a trace of the law."""
    first = by_rank[0]
    for rank, steps in enumerate(by_rank[1:], 1):
        for name in ("losses", "scored", "norms"):
            assert getattr(steps, name) == getattr(first, name), f"{name} of rank {rank} differ from rank 0's"
    trace = Trace(first.losses, first.scored, first.norms)
    shapes = {f"model.{name}": tuple(value.shape) for name, value in expected.parameters[0].items()}
    for index in range(len(first.states)):
        full = merge_shards([steps.states[index] for steps in by_rank], shapes)
        trace.parameters.append({name.removeprefix("model."): value for name, value in full.items()})
    trace.gradients = (
        expected.gradients
    )  # third-party engines do not expose gradients; the updated weights are compared
    return trace


def write_json(path: Path, content: dict[str, Any]) -> str:
    """Write a JSON file and return its path."""
    path.write_text(json.dumps(content))
    return str(path)


def patch_accumulate(accumulate: Callable[..., Callable[..., Tensor]]) -> Callable[[], Iterator[None]]:
    """Return a planted bug that replaces `accumulate` of both engines by `accumulate(original)`."""

    @contextmanager
    def bug() -> Iterator[None]:
        with (
            patch.object(DeepSpeedEngine, "accumulate", accumulate(DeepSpeedEngine.accumulate)),
            patch.object(AccelerateEngine, "accumulate", accumulate(AccelerateEngine.accumulate)),
        ):
            yield

    bug.__name__ = accumulate.__name__
    return bug


@patch_accumulate
def losses_are_averaged_over_ranks(real: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The loss is not multiplied by the number of ranks, although the engine averages gradients."""

    def accumulate(self: Any, batches: Any, scored: Tensor, step: int) -> Tensor:
        ranks = torch.distributed.get_world_size()
        return real(self, batches, scored * ranks, step) * ranks

    return accumulate


@patch_accumulate
def only_the_last_microbatch_counts(real: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def accumulate(self: Any, batches: Any, scored: Tensor, step: int) -> Tensor:
        with torch.no_grad():
            scores = [self.model(batch.inputs_BS, **batch.forward_arguments()) / scored for batch in batches[:-1]]
        return torch.cat([*scores, real(self, batches[-1:], scored, step)])

    return accumulate


@patch_accumulate
def the_second_step_is_not_finite(real: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def accumulate(self: Any, batches: Any, scored: Tensor, step: int) -> Tensor:
        return real(self, batches, scored * (torch.nan if step == 1 else 1.0), step)

    return accumulate


@contextmanager
def losses_are_divided_by_the_microbatches() -> Iterator[None]:
    import accelerate
    from deepspeed import DeepSpeedEngine as Theirs

    real, real_accelerate = Theirs.backward, accelerate.Accelerator.backward
    with (
        patch.object(Theirs, "backward", lambda self, loss, **options: real(self, loss)),
        patch.object(accelerate.Accelerator, "backward", lambda self, loss: real_accelerate(self, loss / 3)),
    ):
        yield


@contextmanager
def the_rate_is_set_after_the_step() -> Iterator[None]:
    with (
        patch.object(DeepSpeedEngine, "update", delay_learning_rate(DeepSpeedEngine.update)),
        patch.object(AccelerateEngine, "update", delay_learning_rate(AccelerateEngine.update)),
    ):
        yield


def delay_learning_rate(update: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Apply each learning rate one step late."""

    def with_the_last(self: Any, lr: float, should_apply: Any) -> Tensor:
        norm = update(self, getattr(self, "before", self.config.optim.lr), should_apply)
        self.previous_lr = lr
        return norm

    return with_the_last


BUGS = {
    each.__name__: each
    for each in (
        losses_are_averaged_over_ranks,
        losses_are_divided_by_the_microbatches,
        the_rate_is_set_after_the_step,
        only_the_last_microbatch_counts,
    )
}
FAULTS = {"the_second_step_is_not_finite": the_second_step_is_not_finite}
