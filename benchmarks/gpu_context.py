"""What a row of `gpu.py` is given: a device, sizes, and a comparison of values that a pretended GPU can run, too.

A device is one of three kinds. `cuda` is a GPU. `cpu` is the CPU in its place: every row runs, at tiny sizes.
`pretended` is the GPU of pretend.py: tensors have shapes and devices but no values, so that a comparison checks those.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import pretend
from dist_llm.config.schema import Config
from dist_llm.launch.group import process_group
from dist_llm.launch.world import World
from models import config_of

# Each divides by 16, as products in float8 want it; two groups of heads.
SMALL = ("model.d_model=64", "model.n_layers=2", "model.n_heads=4", "model.n_kv_heads=2", "model.d_ff=128")
SMALL_VOCABULARY = 512
TINY_SEQ_LEN = 64  # by which --tiny divides the length of a sequence


class SkippedError(Exception):
    """A row that cannot run here; the message says why."""


@dataclass(frozen=True)
class Context:
    """The device of a row. `folder` is where a row may leave files; `gpu` is the pretended GPU, if it is on."""

    kind: str
    tiny: bool
    folder: Path
    gpu: Any = None

    @property
    def device(self) -> torch.device:
        return torch.device("cpu") if self.kind == "cpu" else pretend.DEVICE

    @property
    def has_values(self) -> bool:
        """False on a pretended GPU, whose tensors must not be read."""
        return self.kind != "pretended"

    @contextmanager
    def process_group(self) -> Iterator[None]:
        """A process group of this process alone: NCCL on a GPU, gloo on a CPU, torch's fake one on a pretended GPU."""
        if self.has_values:
            with process_group(World(), self.device, alone=True):
                yield
            return
        from torch.testing._internal.distributed.fake_pg import FakeStore

        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()


def small_config(*overrides: str, model: str = "llama-cpu") -> Config:
    """A model small enough to compare a GPU with a CPU in seconds."""
    heads = [key for key in SMALL if "n_kv_heads" not in key or model.startswith("llama")]
    sizes = [f"model.vocab_size={SMALL_VOCABULARY}", "data.seq_len=64", "data.global_batch=4"]
    return config_of(model, [*heads, *sizes, *overrides])


class Comparison:
    """Collects the errors of a check; a row with anything in `broken` has failed."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.errors: dict[str, float] = {}
        self.broken: list[str] = []

    def close(self, what: str, actual: Tensor, expected: Tensor, tolerance: float) -> None:
        """The largest difference over the largest expected value is at most `tolerance`; NaN is not."""
        if actual.shape != expected.shape:
            self.broken.append(f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}")
        elif self.context.has_values:
            actual, expected = actual.detach().cpu().double(), expected.detach().cpu().double()
            error = (actual - expected).abs().max() / expected.abs().max().clamp(min=1e-30)
            self.at_most(what, error.item(), tolerance)

    def at_most(self, what: str, error: float, tolerance: float) -> None:
        """An error that the caller has computed."""
        self.errors[what] = error if not error <= self.errors.get(what, error) else self.errors.get(what, error)
        if not error <= tolerance:
            self.broken.append(f"{what}: error {error:.3g}, at most {tolerance:g} is allowed")

    def equal(self, what: str, actual: Tensor | Sequence[int], expected: Tensor | Sequence[int]) -> None:
        """The same bits, or the same numbers."""
        if isinstance(actual, Tensor) and isinstance(expected, Tensor):
            same = actual.shape == expected.shape and actual.dtype == expected.dtype
            if same and self.context.has_values:
                same = torch.equal(actual.detach().cpu(), expected.detach().cpu())
        else:
            same = list(actual) == list(expected)
        if not same:
            self.broken.append(f"{what}: not the same")

    def is_true(self, what: str, holds: bool) -> None:
        """Any other condition."""
        if not holds:
            self.broken.append(what)

    def row(self, **figures: Any) -> dict[str, Any]:
        """The result of the check."""
        errors = {what: float(f"{error:.3g}") for what, error in self.errors.items()}
        return {**figures, "errors": errors, "broken": self.broken}
