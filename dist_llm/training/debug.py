"""Debug a config (`train --debug`): one process, eager, synchronous and deterministic; stop at the first failure.

It prints the data, writes no files, and uses no threads or compiled code, so that breakpoints work.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

from dist_llm.config.schema import Config
from dist_llm.data.data_history import build_fresh_plan
from dist_llm.data.loader import build_loader
from dist_llm.engines.native import NativeEngine
from dist_llm.launch.group import make_synchronous, select_device
from dist_llm.launch.world import World
from dist_llm.losses.cross_entropy import IGNORE_INDEX
from dist_llm.objectives.batch import Batch
from dist_llm.objectives.objective_vocabulary import ObjectiveVocabulary
from dist_llm.text.tokenizer import Tokenizer
from dist_llm.training.settings import read_vocabulary
from dist_llm.training.step import train_step

STEPS = 3
OVERFIT_STEPS = 30
OVERFIT_SHARE = 0.9  # overfitting must lower the loss below this share of the first loss
SHOWN_TOKENS = 24


class DebugError(RuntimeError):
    """The debug run found an error."""


def debug(config: Config) -> None:
    """Print a batch, take a few steps with all values checked, and overfit one batch. Raises DebugError."""
    make_synchronous()
    console = Console()
    rows = min(config.data.micro_batch, config.data.global_batch)
    config = config.model_copy(
        update={
            "compile": False,
            "data": config.data.model_copy(update={"global_batch": rows, "micro_batch": rows, "prefetch": 0}),
        }
    )
    device = select_device(World())
    plan = build_fresh_plan(config)
    directory = plan.sources[0].corpus.directory
    vocabulary = read_vocabulary(config, directory)
    loader = build_loader(config, plan, vocabulary, 0, 1, pin=False)
    show(console, loader.load_batches(0)[0], Tokenizer.load(directory), vocabulary)

    engine = NativeEngine(config, device)
    with finite(engine.model_parts[0]):
        for step in range(STEPS):
            report = train_step(engine, loader.load_batches(step * rows), config.optim.lr, step)
            _check_parameters(engine.model_parts[0])
            console.print(f"step {step + 1}: loss {report.loss:.4f}  grad norm {report.grad_norm:.4f}")
        overfit(console, config, device, loader.load_batches(0))
    console.print("debug run passed")


def show(console: Console, batch: Batch, tokenizer: Tokenizer, vocabulary: ObjectiveVocabulary) -> None:
    """Print the first row of the batch, token by token: inputs, targets, and which tokens attend to which."""

    def named(token: int) -> str:
        return escape(f"{token} {vocabulary.describe_added_id(token) or repr(tokenizer.decode([token]))}")

    if batch.encoder_input is not None:
        console.print(
            "the encoder reads:", escape(" ".join(map(named, batch.encoder_input.tokens_BT[0, :SHOWN_TOKENS].tolist())))
        )
    table = Table(
        title=f"first batch: {tuple(batch.inputs_BS.shape)}, row 0, {batch.num_valid_tokens} scored targets in all"
    )
    for column in ("position", "input", "sees", "target", "scored"):
        table.add_column(column)
    inputs, targets = batch.inputs_BS[0].tolist(), batch.targets_BS[0].tolist()
    seen_ST = seen(batch)
    for position, (token, target) in enumerate(zip(inputs, targets, strict=True)):
        if position == SHOWN_TOKENS:
            table.add_row("...", "", "", "", "")
            break
        aim = "" if target == IGNORE_INDEX else named(target)
        table.add_row(
            str(position), named(token), ranges(seen_ST[position]), aim, "no" if target == IGNORE_INDEX else "yes"
        )
    console.print(table)


def seen(batch: Batch) -> Tensor:
    """Return which tokens of the first row attend to which, [S, S]."""
    S = batch.inputs_BS.shape[1]
    positions = torch.arange(S)
    return batch.mask.allows(S, S, torch.tensor(0), positions[:, None], positions)


def ranges(seen_T: Tensor) -> str:
    """Format the indices of true values as `0..4, 7..9`."""
    positions = torch.nonzero(seen_T).flatten().tolist()
    starts = [position for position in positions if position - 1 not in positions]
    ends = [position for position in positions if position + 1 not in positions]
    return ", ".join(f"{start}..{end}" for start, end in zip(starts, ends, strict=True))


@contextmanager
def finite(model: nn.Module) -> Iterator[None]:
    """Within the block, raise at the first module output or parameter gradient that is not finite."""

    def on_output(name: str) -> Any:
        def check(module: nn.Module, inputs: Any, output: Any) -> None:
            _refuse(output, f"output of module {name or 'model'} ({type(module).__name__})")

        return check

    def on_gradient(name: str) -> Any:
        return lambda gradient: _refuse(gradient, f"gradient of parameter {name}")

    handles = [module.register_forward_hook(on_output(name)) for name, module in model.named_modules()]
    for name, parameter in model.named_parameters():
        handles.append(parameter.register_hook(on_gradient(name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def overfit(console: Console, config: Config, device: torch.device, batches: list[Batch]) -> None:
    """Train a fresh model on one batch. Raises DebugError if the loss does not fall."""
    engine = NativeEngine(config.model_copy(update={"model": config.model.model_copy(update={"dropout": 0.0})}), device)
    first = last = float("nan")
    with finite(engine.model_parts[0]):
        for step in range(OVERFIT_STEPS):
            last = float(train_step(engine, batches, config.optim.lr).loss)
            first = last if step == 0 else first
    console.print(f"one batch, {OVERFIT_STEPS} steps at lr {config.optim.lr:g}: loss {first:.4f} -> {last:.4f}")
    if not last < OVERFIT_SHARE * first:
        raise DebugError(
            f"the loss on one repeated batch went from {first:.4f} to {last:.4f} in {OVERFIT_STEPS} steps, and should "
            f"fall below {OVERFIT_SHARE * first:.4f}. Check optim.lr ({config.optim.lr:g}), the targets printed "
            "above, and whether every parameter gets a gradient."
        )


def _check_parameters(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        _refuse(parameter.detach(), f"value of parameter {name} after the step")


def _refuse(value: Any, what: str) -> None:
    if isinstance(value, Tensor) and value.is_floating_point() and not torch.isfinite(value).all():
        bad = int((~torch.isfinite(value)).sum())
        raise DebugError(f"not finite: {what}, shape {tuple(value.shape)}, {bad} of {value.numel()} elements")
