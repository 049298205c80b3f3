"""Debug a config (`dist-llm train --debug`) in one process, with eager, synchronous and deterministic kernels.

The debug run prints a batch, takes a few steps, and stops at the first value that is not finite. It uses no threads
and no compiled code, so breakpoints work. It writes no files.
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
from dist_llm.launch.process_group import make_synchronous, select_device
from dist_llm.launch.world import World
from dist_llm.losses.cross_entropy import IGNORE_INDEX
from dist_llm.objectives.batch import Batch
from dist_llm.objectives.objective_vocabulary import ObjectiveVocabulary
from dist_llm.text.tokenizer import Tokenizer
from dist_llm.training.settings import read_vocabulary
from dist_llm.training.step import train_step

NUM_STEPS = 3
NUM_OVERFIT_STEPS = 30
MAX_OVERFIT_LOSS_RATIO = 0.9  # upper bound of (last loss / first loss) when one batch is repeated
MAX_PRINTED_TOKENS = 24  # tokens of a row that `print_first_row` prints


class DebugError(RuntimeError):
    """The debug run found a value that is not finite, or a loss that does not fall."""


def debug(config: Config) -> None:
    """Print a batch, take a few steps with all values checked, and overfit one batch.

    Raises DebugError at the first problem.
    """
    make_synchronous()
    console = Console()
    num_rows = min(config.data.micro_batch, config.data.global_batch)
    config = config.model_copy(
        update={
            "compile": False,
            "data": config.data.model_copy(update={"global_batch": num_rows, "micro_batch": num_rows, "prefetch": 0}),
        }
    )
    device = select_device(World())
    plan = build_fresh_plan(config)
    directory = plan.sources[0].corpus.directory
    vocabulary = read_vocabulary(config, directory)
    loader = build_loader(config, plan, vocabulary, dp_rank=0, dp_size=1, pin=False)
    print_first_row(console, loader.load_batches(0)[0], Tokenizer.load(directory), vocabulary)

    engine = NativeEngine(config, device)
    with check_finite(engine.model_parts[0]):
        for step in range(NUM_STEPS):
            report = train_step(engine, loader.load_batches(step * num_rows), config.optim.lr, step)
            _check_parameters_finite(engine.model_parts[0])
            console.print(f"step {step + 1}: loss {report.loss:.4f}  grad norm {report.grad_norm:.4f}")
        overfit_one_batch(console, config, device, loader.load_batches(0))
    console.print("debug run passed")


def print_first_row(console: Console, batch: Batch, tokenizer: Tokenizer, vocabulary: ObjectiveVocabulary) -> None:
    """Print the first row of the batch, one token per line: input, target, and the positions that it attends to."""

    def describe_token(token: int) -> str:
        return escape(f"{token} {vocabulary.describe_added_id(token) or repr(tokenizer.decode([token]))}")

    if batch.encoder_input is not None:
        encoder_tokens = batch.encoder_input.tokens_BT[0, :MAX_PRINTED_TOKENS].tolist()
        console.print("the encoder reads:", escape(" ".join(map(describe_token, encoder_tokens))))
    table = Table(
        title=f"first batch: {tuple(batch.inputs_BS.shape)}, row 0, {batch.num_valid_tokens} targets with a loss in all"
    )
    for column in ("position", "input", "attends to", "target", "has loss"):
        table.add_column(column)
    inputs, targets = batch.inputs_BS[0].tolist(), batch.targets_BS[0].tolist()
    mask_ST = compute_first_row_mask(batch)
    for position, (token, target) in enumerate(zip(inputs, targets, strict=True)):
        if position == MAX_PRINTED_TOKENS:
            table.add_row("...", "", "", "", "")
            break
        has_loss = target != IGNORE_INDEX
        target_text = describe_token(target) if has_loss else ""
        attended_positions = format_ranges(mask_ST[position])
        cells = str(position), describe_token(token), attended_positions, target_text, "yes" if has_loss else "no"
        table.add_row(*cells)
    console.print(table)


def compute_first_row_mask(batch: Batch) -> Tensor:
    """Return the attention mask of the first row, [S, T] with T = S: true where query s attends to key t."""
    S = batch.inputs_BS.shape[1]
    positions = torch.arange(S)
    return batch.mask.allows(S, S, torch.tensor(0), positions[:, None], positions)


def format_ranges(mask_T: Tensor) -> str:
    """Format the indices of the true values as ranges, such as `0..4, 7..9`."""
    positions = torch.nonzero(mask_T).flatten().tolist()
    starts = [position for position in positions if position - 1 not in positions]
    ends = [position for position in positions if position + 1 not in positions]
    return ", ".join(f"{start}..{end}" for start, end in zip(starts, ends, strict=True))


@contextmanager
def check_finite(model: nn.Module) -> Iterator[None]:
    """Within the block, raise DebugError at the first module output or parameter gradient that is not finite."""

    def make_output_hook(name: str) -> Any:
        def check_output(module: nn.Module, inputs: Any, output: Any) -> None:
            for value in output if isinstance(output, tuple) else (output,):
                _raise_unless_finite(value, f"output of module {name or 'model'} ({type(module).__name__})")

        return check_output

    def make_gradient_hook(name: str) -> Any:
        return lambda gradient: _raise_unless_finite(gradient, f"gradient of parameter {name}")

    handles = [module.register_forward_hook(make_output_hook(name)) for name, module in model.named_modules()]
    for name, parameter in model.named_parameters():
        handles.append(parameter.register_hook(make_gradient_hook(name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def overfit_one_batch(console: Console, config: Config, device: torch.device, batches: list[Batch]) -> None:
    """Train a new model without dropout on one repeated batch. Raises DebugError if the loss does not fall."""
    engine = NativeEngine(config.model_copy(update={"model": config.model.model_copy(update={"dropout": 0.0})}), device)
    with check_finite(engine.model_parts[0]):
        losses = [float(train_step(engine, batches, config.optim.lr).loss) for _ in range(NUM_OVERFIT_STEPS)]
    first_loss, last_loss, max_loss = losses[0], losses[-1], MAX_OVERFIT_LOSS_RATIO * losses[0]
    console.print(
        f"one batch, {NUM_OVERFIT_STEPS} steps at lr {config.optim.lr:g}: loss {first_loss:.4f} -> {last_loss:.4f}"
    )
    if not last_loss < max_loss:
        raise DebugError(
            f"the loss on one repeated batch went from {first_loss:.4f} to {last_loss:.4f} in {NUM_OVERFIT_STEPS} "
            f"steps, and should fall below {max_loss:.4f}. Check optim.lr ({config.optim.lr:g}), the targets printed "
            "above, and whether every parameter gets a gradient."
        )


def _check_parameters_finite(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        _raise_unless_finite(parameter.detach(), f"value of parameter {name} after the step")


def _raise_unless_finite(value: Any, description: str) -> None:
    if isinstance(value, Tensor) and value.is_floating_point() and not torch.isfinite(value).all():
        num_bad = int((~torch.isfinite(value)).sum())
        shape = tuple(value.shape)
        raise DebugError(f"not finite: {description}, shape {shape}, {num_bad} of {value.numel()} elements")
