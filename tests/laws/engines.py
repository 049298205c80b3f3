"""What the ranks of an engine of others do in the law: steps, and what they hold after them."""

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
from dist_llm.train.guard import Guard
from dist_llm.train.step import train_step
from tests.laws.law import Placed, Trace, batches_of, compare, joined, parts_of, reference, saved
from tests.laws.worlds import world

CPU = torch.device("cpu")


def zero(stage: int, **more: Any) -> dict[str, Any]:
    return {"engine": "deepspeed", "deepspeed": {"stage": stage, **more}}


def prepared(plugin: str, **more: Any) -> dict[str, Any]:
    return {"engine": "accelerate", "accelerate": {"plugin": plugin}, **more}


ENGINES = {
    **{f"zero{stage}": zero(stage) for stage in range(4)},
    "ddp": prepared("ddp"),
    "accelerate-zero2": prepared("deepspeed", deepspeed={"stage": 2}),
    "accelerate-zero3": prepared("deepspeed", deepspeed={"stage": 3}),
}
OFFLOADED = {
    "zero2-offload": zero(2, offload_optimizer="cpu"),
    "zero3-offload": zero(3, offload_optimizer="cpu", offload_params="cpu"),
}


@dataclass
class Steps:
    """What one rank saw: per step loss, scored tokens, norm and rates; its parts; a loss without a step."""

    losses: list[float] = field(default_factory=list)
    scored: list[int] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    rates: list[list[float]] = field(default_factory=list)
    held: list[Placed] = field(default_factory=list)  # after the first step, and after the last
    heldout: float = 0.0


def take(
    config: Config,
    steps: Sequence[int],
    bug: str | None = None,
    load: Path | None = None,
    save: Path | None = None,
    skip: bool = False,
) -> Steps:
    """Steps on this rank, from a checkpoint if there is one; rates are some power of the step.

    With `skip`, a step that is not finite is left out.
    """
    with opened(config) as engine, ExitStack() as planted:
        if bug:
            planted.enter_context((BUGS | FAULTS)[bug]())
        found = Steps()
        if load is not None:
            store.load(load, engine.state)
        guard = Guard(GuardConfig(not_finite="skip"), GuardState(), engine, Path("unused"))
        for step in steps:
            should_apply = partial(guard.should_apply, step) if skip else None
            report = train_step(
                engine, batches_of(config, engine, step), rate(config, step), step, should_apply=should_apply
            )
            found.losses.append(report.loss.item())
            found.scored.append(int(report.scored))
            found.norms.append(report.grad_norm.item())
            found.rates.append([group["lr"] for group in engine.optimizer.param_groups])  # type: ignore[attr-defined]
            if step in (steps[0], steps[-1]):
                found.held.append(parts_of((engine.state.weights() | engine.state.moments()).items()))
        (batch, *_) = batches_of(config, engine, 1000)
        found.heldout = engine.all_reduce_over_data(engine.score(engine.to_local_batch(batch)).sum()).item()
        if save is not None:
            saved(store.CheckpointStore(save), engine, Progress(steps[-1] + 1), {})
        return found


def want(config: Config, steps: int) -> Trace:
    """One process, natively, with the rates of `take`."""
    plain = config.model_copy(update={"engine": "native"})
    return reference(plain, steps, decay=0.7)


def hold(ranks: int, config: Config, steps: int, bug: str | None = None, first: float = 1e-5) -> None:
    every = world(ranks).run(take, config, range(steps), bug)
    one = want(config, steps)
    compare(as_trace(every, one), one, first=first)
    for step, rates in enumerate(every[0].rates):
        assert rates == [config.optim.lr * 0.7**step] * len(rates), "the rate of each step, in each group"


def rate(config: Config, step: int) -> float:
    """Another one each step, so that a rate set too late shows."""
    return config.optim.lr * 0.7**step


@contextmanager
def opened(config: Config) -> Iterator[Engine]:
    """An engine, and none of its settings after."""
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


def as_trace(every: list[Steps], want: Trace) -> Trace:
    """All ranks' steps in the form of the law."""
    first = every[0]
    for rank, other in enumerate(every[1:], 1):
        for name in ("losses", "scored", "norms"):
            assert getattr(other, name) == getattr(first, name), f"{name} of rank {rank} differ from rank 0's"
    found = Trace(first.losses, first.scored, first.norms)
    shapes = {f"model.{name}": tuple(value.shape) for name, value in want.parameters[0].items()}
    for place in range(len(first.held)):
        whole = joined([steps.held[place] for steps in every], shapes)
        found.parameters.append({name.removeprefix("model."): value for name, value in whole.items()})
    found.gradients = want.gradients  # an engine of others keeps its own; stepped weights tell
    return found


def json_file(path: Path, content: dict[str, Any]) -> str:
    path.write_text(json.dumps(content))
    return str(path)


def changed(accumulate: Callable[..., Callable[..., Tensor]]) -> Callable[[], Iterator[None]]:
    """Both engines with `accumulate(the real one)` in place of the real one."""

    @contextmanager
    def bug() -> Iterator[None]:
        with (
            patch.object(DeepSpeedEngine, "accumulate", accumulate(DeepSpeedEngine.accumulate)),
            patch.object(AccelerateEngine, "accumulate", accumulate(AccelerateEngine.accumulate)),
        ):
            yield

    bug.__name__ = accumulate.__name__
    return bug


@changed
def losses_are_averaged_over_ranks(real: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Not multiplied by their number, though gradients are averaged."""

    def accumulate(self: Any, batches: Any, scored: Tensor, step: int) -> Tensor:
        ranks = torch.distributed.get_world_size()
        return real(self, batches, scored * ranks, step) * ranks

    return accumulate


@changed
def only_the_last_microbatch_counts(real: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def accumulate(self: Any, batches: Any, scored: Tensor, step: int) -> Tensor:
        with torch.no_grad():
            before = [self.model(batch.inputs_BS, **batch.forward_arguments()) / scored for batch in batches[:-1]]
        return torch.cat([*before, real(self, batches[-1:], scored, step)])

    return accumulate


@changed
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
        patch.object(DeepSpeedEngine, "update", late(DeepSpeedEngine.update)),
        patch.object(AccelerateEngine, "update", late(AccelerateEngine.update)),
    ):
        yield


def late(update: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def with_the_last(self: Any, lr: float, should_apply: Any) -> Tensor:
        norm = update(self, getattr(self, "before", self.config.optim.lr), should_apply)
        self.before = lr
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
