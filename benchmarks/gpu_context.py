"""The context of a case of `gpu.py`: a device, sizes, and a comparison of values that also runs on a fake GPU.

There are three kinds of device:
  cuda  a GPU
  cpu   the CPU in place of a GPU: all cases run, at tiny sizes
  fake  the GPU of fake_gpu.py: tensors have shapes and devices but no values, so comparisons check only shapes
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

# Sizes are multiples of 16, as float8 matrix products require; there are two groups of heads.
SMALL = ("model.d_model=64", "model.n_layers=2", "model.n_heads=4", "model.n_kv_heads=2", "model.d_ff=128")
SMALL_VOCAB_SIZE = 512
TINY_SEQ_LEN_DIVISOR = 64  # --tiny divides sequence lengths by this number


class SkippedError(Exception):
    """Raised by a case that cannot run here; the message gives the reason."""


@dataclass(frozen=True)
class CaseContext:
    """The device and the sizes of a case.

    `device_kind` is cuda, cpu or fake. `tiny` asks for tiny sizes. `folder` is for files that the case writes.
    `fake_gpu` is the active fake GPU, or None on a real device.
    """

    device_kind: str
    tiny: bool
    folder: Path
    fake_gpu: Any = None

    @property
    def device(self) -> torch.device:
        return torch.device("cpu") if self.device_kind == "cpu" else fake_gpu.DEVICE

    @property
    def has_values(self) -> bool:
        """Whether tensors have values. On a fake GPU they have none, and reading one raises."""
        return self.device_kind != "fake"

    @contextmanager
    def process_group(self) -> Iterator[None]:
        """Make a process group of one process: NCCL on a GPU, gloo on a CPU, a fake group of torch on a fake GPU."""
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


def make_small_config(*overrides: str, model: str = "llama-cpu") -> Config:
    """Make the config of a model small enough to compare a GPU with a CPU in seconds."""
    heads = [key for key in SMALL if "n_kv_heads" not in key or model.startswith("llama")]
    sizes = [f"model.vocab_size={SMALL_VOCAB_SIZE}", "data.seq_len=64", "data.global_batch=4"]
    return make_config(model, [*heads, *sizes, *overrides])


class Comparison:
    """Collects the errors and failures of a check.

    A case fails if `failures` has an entry. The key of `failures` in the results is `broken`. Each method takes a
    `label`, which names the compared quantity in messages.
    """

    def __init__(self, context: CaseContext) -> None:
        self.context = context
        self.errors: dict[str, float] = {}
        self.failures: list[str] = []

    def check_close(self, label: str, actual: Tensor, expected: Tensor, tolerance: float) -> None:
        """Check that the largest difference, relative to the largest expected value, is at most `tolerance`.

        NaN fails. On a fake GPU, check only the shapes.
        """
        if actual.shape != expected.shape:
            self.failures.append(f"{label}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}")
        elif self.context.has_values:
            actual, expected = actual.detach().cpu().double(), expected.detach().cpu().double()
            error = (actual - expected).abs().max() / expected.abs().max().clamp(min=1e-30)
            self.check_at_most(label, error.item(), tolerance)

    def check_at_most(self, label: str, error: float, tolerance: float) -> None:
        """Check an error that the caller has computed, and record the largest error of each label. NaN fails."""
        largest_error = self.errors.get(label, error)
        self.errors[label] = error if not error <= largest_error else largest_error
        if not error <= tolerance:
            self.failures.append(f"{label}: error {error:.3g}, at most {tolerance:g} is allowed")

    def check_equal(self, label: str, actual: Tensor | Sequence[int], expected: Tensor | Sequence[int]) -> None:
        """Check that tensors have equal bits, or sequences equal numbers."""
        if isinstance(actual, Tensor) and isinstance(expected, Tensor):
            is_equal = actual.shape == expected.shape and actual.dtype == expected.dtype
            if is_equal and self.context.has_values:
                is_equal = torch.equal(actual.detach().cpu(), expected.detach().cpu())
        else:
            is_equal = list(actual) == list(expected)
        if not is_equal:
            self.failures.append(f"{label}: not the same")

    def check_true(self, failure: str, condition: bool) -> None:
        """Record the failure unless the condition is true."""
        if not condition:
            self.failures.append(failure)

    def make_result(self, **figures: Any) -> dict[str, Any]:
        """Return the result of the check: `figures`, the errors by label, and the failures."""
        errors = {label: float(f"{error:.3g}") for label, error in self.errors.items()}
        return {**figures, "errors": errors, "broken": self.failures}
