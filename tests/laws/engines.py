"""Run steps of DeepSpeed and accelerate on the ranks of a world, and compare them with one native process.

    config = make_config(ranks=2, model=MODELS["tied"], optim=ADAMW, **ENGINE_SECTIONS["zero2"])
    assert_engine_matches_one_process(ranks=2, config=config, steps=3)

ENGINE_SECTIONS has the config sections of each engine. BUGS are planted bugs, which the comparison must detect.
Used by test_engines.py, test_engines_pipeline.py and run_space.py. The learning rate changes in each step, so that a
rate that is set too late is detected.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from dist_llm.checkpoint.checkpoint_state import GuardState, Progress
from dist_llm.checkpoint.load_checkpoint import load_checkpoint
from dist_llm.checkpoint.store import CheckpointStore
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
    save_checkpoint,
    trace_one_process,
)
from tests.laws.worlds import get_world

PlantedBug = Callable[[], AbstractContextManager[None]]
CPU = torch.device("cpu")
LR_DECAY = 0.7  # the learning rate of a step over that of the previous step
HELDOUT_STEP = 1000  # the number of a batch on which no test trains


def make_deepspeed_sections(*, stage: int, **options: Any) -> dict[str, Any]:
    """Return the config sections of DeepSpeed; `stage` is the ZeRO stage, `options` are keys of section `deepspeed`."""
    return {"engine": "deepspeed", "deepspeed": {"stage": stage, **options}}


def make_accelerate_sections(*, plugin: str, **sections: Any) -> dict[str, Any]:
    """Return the config sections of accelerate with a plugin; `sections` are further sections."""
    return {"engine": "accelerate", "accelerate": {"plugin": plugin}, **sections}


ENGINE_SECTIONS = {
    **{f"zero{stage}": make_deepspeed_sections(stage=stage) for stage in range(4)},
    "ddp": make_accelerate_sections(plugin="ddp"),
    "accelerate-zero2": make_accelerate_sections(plugin="deepspeed", deepspeed={"stage": 2}),
    "accelerate-zero3": make_accelerate_sections(plugin="deepspeed", deepspeed={"stage": 3}),
}
OFFLOADED_ENGINE_SECTIONS = {
    "zero2-offload": make_deepspeed_sections(stage=2, offload_optimizer="cpu"),
    "zero3-offload": make_deepspeed_sections(stage=3, offload_optimizer="cpu", offload_params="cpu"),
}


@dataclass
class EngineTrace:
    """What one rank records in a run of an engine.

    Of each step: loss, number of valid tokens, gradient norm and learning rates. After the first and the last step: the
    shards of weights and moments. After all steps: the loss of one more batch, without gradients.
    """

    losses: list[float] = field(default_factory=list)
    loss_denominators: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    learning_rates: list[list[float]] = field(default_factory=list)  # by parameter group, without lr_mult
    states: list[ShardsByName] = field(default_factory=list)
    heldout_loss: float = 0.0


def run_steps(
    config: Config,
    *,
    steps: Sequence[int],
    bug: str | None = None,
    load: Path | None = None,
    save: Path | None = None,
    skip_nonfinite: bool = False,
) -> EngineTrace:
    """Run the steps with the numbers `steps`, such as range(3), on this rank and return the trace.

    `bug` is the name of a planted bug or fault. The run starts from the checkpoint `load`, and saves a checkpoint to
    the directory `save` at its end. With `skip_nonfinite`, the guard (training/guard.py) skips steps whose gradients
    are not finite.
    """
    with open_engine(config) as engine, ExitStack() as planted:
        if bug:
            planted.enter_context((BUGS | FAULTS)[bug]())
        trace = EngineTrace()
        if load is not None:
            load_checkpoint(load, engine.state)
        guard = Guard(GuardConfig(not_finite="skip"), GuardState(), engine, Path("unused"))
        for step in steps:
            report = train_step(
                engine,
                make_batches(config, engine, step),
                lr=compute_learning_rate(config, step),
                step=step,
                should_apply=partial(guard.should_apply, step) if skip_nonfinite else None,
            )
            trace.losses.append(report.loss.item())
            trace.loss_denominators.append(report.loss_denominator.item())
            trace.grad_norms.append(report.grad_norm.item())
            groups = engine.optimizer.param_groups  # type: ignore[attr-defined]
            trace.learning_rates.append([group["lr"] / group["lr_mult"] for group in groups])
            if step in (steps[0], steps[-1]):
                trace.states.append(copy_local_shards((engine.state.weights() | engine.state.moments()).items()))
        (batch, *_) = make_batches(config, engine, step=HELDOUT_STEP)
        trace.heldout_loss = engine.all_reduce_over_dp_and_cp(engine.score(engine.to_local_batch(batch)).sum()).item()
        if save is not None:
            save_checkpoint(CheckpointStore(save), engine, Progress(steps[-1] + 1), {})
        return trace


def trace_native_process(config: Config, *, steps: int) -> Trace:
    """Return the trace of one process with the native engine and the learning rates of `run_steps`."""
    native = config.model_copy(update={"engine": "native"})
    return trace_one_process(native, steps=steps, lr_decay=LR_DECAY)


def assert_engine_matches_one_process(
    *, ranks: int, config: Config, steps: int, bug: str | None = None, first_tolerance: float = 1e-5
) -> None:
    """Run the engine on `ranks` ranks; raise AssertionError unless its steps match those of one native process.

    `first_tolerance` is the relative tolerance of the first step, as in `assert_traces_match`.
    """
    by_rank = get_world(ranks).run(run_steps, config, steps=range(steps), bug=bug)
    expected = trace_native_process(config, steps=steps)
    assert_traces_match(merge_engine_traces(by_rank, expected), expected, first_tolerance=first_tolerance)
    for step, learning_rates in enumerate(by_rank[0].learning_rates):
        assert set(learning_rates) == {compute_learning_rate(config, step)}, (
            f"step {step}: the parameter groups have the learning rates {learning_rates}"
        )


def compute_learning_rate(config: Config, step: int) -> float:
    """Return the learning rate of a step, counted from 0."""
    return config.optim.lr * LR_DECAY**step


@contextmanager
def open_engine(config: Config) -> Iterator[Engine]:
    """Build an engine for the block, and reset the global settings of its library afterwards."""
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
    """Merge the traces of all ranks into a trace that `assert_traces_match` compares.

    Third-party engines do not expose gradients. The trace gets the expected gradients, so only weights are compared.
    """
    rank_0 = by_rank[0]
    for rank, rank_trace in enumerate(by_rank[1:], 1):
        for name in ("losses", "loss_denominators", "grad_norms"):
            assert getattr(rank_trace, name) == getattr(rank_0, name), f"{name} of rank {rank} differ from rank 0"
    trace = Trace(rank_0.losses, rank_0.loss_denominators, rank_0.grad_norms)
    shapes = {f"model.{name}": tuple(value.shape) for name, value in expected.parameters[0].items()}
    for index in range(len(rank_0.states)):
        full_tensors = merge_shards([rank_trace.states[index] for rank_trace in by_rank], shapes)
        trace.parameters.append({name.removeprefix("model."): value for name, value in full_tensors.items()})
    trace.gradients = expected.gradients
    return trace


def write_json(path: Path, content: dict[str, Any]) -> str:
    """Write a JSON file and return its path."""
    path.write_text(json.dumps(content))
    return str(path)


def patch_accumulate(
    make_accumulate: Callable[..., Callable[..., Tensor]],
) -> PlantedBug:
    """Return a planted bug that replaces `accumulate` of both engines by `make_accumulate(original)`."""

    @contextmanager
    def bug() -> Iterator[None]:
        with (
            patch.object(DeepSpeedEngine, "accumulate", make_accumulate(DeepSpeedEngine.accumulate)),
            patch.object(AccelerateEngine, "accumulate", make_accumulate(AccelerateEngine.accumulate)),
        ):
            yield

    bug.__name__ = make_accumulate.__name__
    return bug


@patch_accumulate
def losses_are_averaged_over_ranks(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The loss is not multiplied by the number of ranks, although the engine averages gradients."""

    def accumulate(self: Any, batches: Any, denominator: Tensor, step: int) -> Tensor:
        ranks = torch.distributed.get_world_size()
        return original(self, batches, denominator * ranks, step) * ranks

    return accumulate


@patch_accumulate
def only_the_last_microbatch_is_accumulated(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The losses of the other microbatches are computed without gradients, so that the reported loss is right."""

    def accumulate(self: Any, batches: Any, denominator: Tensor, step: int) -> Tensor:
        with torch.no_grad():
            scores = [self.model(batch.inputs_BS, **batch.forward_arguments()) / denominator for batch in batches[:-1]]
        return torch.cat([*scores, original(self, batches[-1:], denominator, step)])

    return accumulate


@patch_accumulate
def the_second_step_is_not_finite(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The losses and gradients of step 1, counted from 0, are NaN."""

    def accumulate(self: Any, batches: Any, denominator: Tensor, step: int) -> Tensor:
        return original(self, batches, denominator * (torch.nan if step == 1 else 1.0), step)

    return accumulate


@contextmanager
def losses_are_divided_by_the_microbatches() -> Iterator[None]:
    """The engines divide each loss by the number of microbatches, 3, although it is already normalized."""
    import accelerate
    import deepspeed

    deepspeed_backward, accelerate_backward = deepspeed.DeepSpeedEngine.backward, accelerate.Accelerator.backward
    with (
        patch.object(
            deepspeed.DeepSpeedEngine, "backward", lambda self, loss, **options: deepspeed_backward(self, loss)
        ),
        patch.object(accelerate.Accelerator, "backward", lambda self, loss: accelerate_backward(self, loss / 3)),
    ):
        yield


@contextmanager
def the_learning_rate_is_set_after_the_step() -> Iterator[None]:
    """Each step uses the learning rate of the previous step."""
    with (
        patch.object(DeepSpeedEngine, "update", delay_learning_rate(DeepSpeedEngine.update)),
        patch.object(AccelerateEngine, "update", delay_learning_rate(AccelerateEngine.update)),
    ):
        yield


def delay_learning_rate(update: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return an update that applies each learning rate one step late."""

    def update_with_previous_rate(self: Any, lr: float, should_apply: Any) -> Tensor:
        norm = update(self, getattr(self, "previous_lr", self.config.optim.lr), should_apply)
        self.previous_lr = lr
        return norm

    return update_with_previous_rate


BUGS: dict[str, PlantedBug] = {
    bug.__name__: bug
    for bug in (
        losses_are_averaged_over_ranks,
        losses_are_divided_by_the_microbatches,
        the_learning_rate_is_set_after_the_step,
        only_the_last_microbatch_is_accumulated,
    )
}
# Faults that may occur in a correct run, and that the guard handles.
FAULTS: dict[str, PlantedBug] = {"the_second_step_is_not_finite": the_second_step_is_not_finite}
