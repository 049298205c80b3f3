"""The context of a row of `gpu.py`: a device, sizes, and a comparison of values that also runs on a fake GPU.

There are three kinds of device. `cuda` is a GPU. `cpu` uses the CPU instead: every row runs, at tiny sizes.
`fake` is the GPU of fake_gpu.py: tensors have shapes and devices but no values, and comparisons check only shapes
and devices.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import fake_gpu
from dist_llm.config.schema import Config
from dist_llm.launch.process_group import process_group
from dist_llm.launch.world import World
from models import make_config

# Sizes are multiples of 16, as products in float8 require; there are two groups of heads.
SMALL = ("model.d_model=64", "model.n_layers=2", "model.n_heads=4", "model.n_kv_heads=2", "model.d_ff=128")
SMALL_VOCABULARY = 512
TINY_SEQ_LEN = 64  # by which --tiny divides the length of a sequence


class SkippedError(Exception):
    """A row that cannot run here; the message gives the reason."""


@dataclass(frozen=True)
class Context:
    """The device of a row. `folder` is for files of the row. `fake_gpu` is the fake GPU, or None on a real device."""

    kind: str
    tiny: bool
    folder: Path
    fake_gpu: Any = None

    @property
    def device(self) -> torch.device:
        return torch.device("cpu") if self.kind == "cpu" else fake_gpu.DEVICE

    @property
    def has_values(self) -> bool:
        """Whether tensors have values; those of a fake GPU must not be read."""
        return self.kind != "fake"

    @contextmanager
    def process_group(self) -> Iterator[None]:
        """Make a process group of one process: NCCL on a GPU, gloo on a CPU, torch's fake one on a fake GPU."""
        if self.has_values:
            with process_group(World(), self.device, even_if_single=True):
                yield
            return
        from torch.testing._internal.distributed.fake_pg import FakeStore

        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()


def small_config(*overrides: str, model: str = "llama-cpu") -> Config:
    """Make the config of a model small enough to compare a GPU with a CPU in seconds."""
    heads = [key for key in SMALL if "n_kv_heads" not in key or model.startswith("llama")]
    sizes = [f"model.vocab_size={SMALL_VOCABULARY}", "data.seq_len=64", "data.global_batch=4"]
    return make_config(model, [*heads, *sizes, *overrides])


class Comparison:
    """Collects the errors of a check; a row fails if `failures` has an entry; its key in the results is `broken`."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.errors: dict[str, float] = {}
        self.failures: list[str] = []

    def close(self, what: str, actual: Tensor, expected: Tensor, tolerance: float) -> None:
        """Check that the largest difference, relative to the largest expected value, is at most `tolerance`.

        NaN fails.
        """
        if actual.shape != expected.shape:
            self.failures.append(f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}")
        elif self.context.has_values:
            actual, expected = actual.detach().cpu().double(), expected.detach().cpu().double()
            error = (actual - expected).abs().max() / expected.abs().max().clamp(min=1e-30)
            self.at_most(what, error.item(), tolerance)

    def at_most(self, what: str, error: float, tolerance: float) -> None:
        """Check an error that the caller has computed."""
        self.errors[what] = error if not error <= self.errors.get(what, error) else self.errors.get(what, error)
        if not error <= tolerance:
            self.failures.append(f"{what}: error {error:.3g}, at most {tolerance:g} is allowed")

    def equal(self, what: str, actual: Tensor | Sequence[int], expected: Tensor | Sequence[int]) -> None:
        """Check that tensors have equal bits, or sequences equal numbers."""
        if isinstance(actual, Tensor) and isinstance(expected, Tensor):
            same = actual.shape == expected.shape and actual.dtype == expected.dtype
            if same and self.context.has_values:
                same = torch.equal(actual.detach().cpu(), expected.detach().cpu())
        else:
            same = list(actual) == list(expected)
        if not same:
            self.failures.append(f"{what}: not the same")

    def is_true(self, what: str, holds: bool) -> None:
        """Check any other condition."""
        if not holds:
            self.failures.append(what)

    def row(self, **figures: Any) -> dict[str, Any]:
        """Return the result of the check."""
        errors = {what: float(f"{error:.3g}") for what, error in self.errors.items()}
        return {**figures, "errors": errors, "broken": self.failures}
