"""The context of a case of `gpu.py`: its device and sizes, and a comparison of values that also runs on a fake GPU.

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

from dist_llm.config.schema import Config
from dist_llm.launch.process_group import process_group
from dist_llm.launch.world import World
from fake_gpu import FakeGpu
from named_models import make_named_config

# The sizes of --tiny, and of checks that compare a GPU with a CPU. Float8 matrix products need multiples of 16. With 4
# query heads and 2 key-value heads, the model has grouped-query attention.
TINY_MODEL_OVERRIDES = (
    "model.d_model=64",
    "model.n_layers=2",
    "model.n_heads=4",
    "model.n_kv_heads=2",
    "model.d_ff=128",
)
TINY_VOCAB_SIZE = 512
TINY_SEQ_LEN_DIVISOR = 64  # --tiny divides sequence lengths by this number


class SkippedError(Exception):
    """Raised by a case that cannot run here; the message gives the reason."""


@dataclass(frozen=True)
class CaseContext:
    """The device and the sizes of a case.

    `device_kind` is cuda, cpu or fake. If `tiny` is set, the case uses tiny sizes. `folder` is for files that the case
    writes. `active_fake_gpu` is the fake GPU of `fake_gpu.activate`, or None on a real device.
    """

    device_kind: str
    tiny: bool
    folder: Path
    active_fake_gpu: FakeGpu | None = None

    @property
    def device(self) -> torch.device:
        """The device of tensors: the CPU or cuda:0. A fake GPU also has the name cuda:0."""
        return torch.device("cpu") if self.device_kind == "cpu" else torch.device("cuda", 0)

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


def make_tiny_config(*overrides: str, model: str = "llama-cpu") -> Config:
    """Make a config of `model` (named_models.py) with tiny sizes, so that comparing a GPU with a CPU takes seconds."""
    # GPT-2 has no grouped-query attention.
    model_sizes = [key for key in TINY_MODEL_OVERRIDES if "n_kv_heads" not in key or model.startswith("llama")]
    data_sizes = [f"model.vocab_size={TINY_VOCAB_SIZE}", "data.seq_len=64", "data.global_batch=4"]
    return make_named_config(model, [*model_sizes, *data_sizes, *overrides])


class Comparison:
    """Compares values with expected values, and collects the deviations and the failures of a case.

    A case fails if `failures` has an entry. `label` names the compared quantity in messages. In the results, the keys
    of `deviations` and `failures` are `errors` and `broken`.
    """

    def __init__(self, context: CaseContext) -> None:
        self.context = context
        self.deviations: dict[str, float] = {}  # the largest deviation by label
        self.failures: list[str] = []

    def check_close(self, label: str, actual: Tensor, expected: Tensor, tolerance: float) -> None:
        """Check that the largest difference is at most `tolerance` times the largest expected absolute value.

        A NaN is a failure. On a fake GPU, only the shapes are compared.
        """
        if actual.shape != expected.shape:
            self.failures.append(f"{label}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}")
        elif self.context.has_values:
            actual, expected = actual.detach().cpu().double(), expected.detach().cpu().double()
            deviation = (actual - expected).abs().max() / expected.abs().max().clamp(min=1e-30)  # avoids 0 / 0
            self.check_at_most(label, deviation.item(), tolerance)

    def check_at_most(self, label: str, deviation: float, tolerance: float) -> None:
        """Check a deviation that the caller has computed, and record the largest one of each label.

        A NaN is a failure and counts as the largest deviation.
        """
        largest_deviation = self.deviations.get(label, deviation)
        self.deviations[label] = deviation if not deviation <= largest_deviation else largest_deviation
        if not deviation <= tolerance:
            self.failures.append(f"{label}: error {deviation:.3g}, at most {tolerance:g} is allowed")

    def check_equal(self, label: str, actual: Tensor | Sequence[int], expected: Tensor | Sequence[int]) -> None:
        """Check that two tensors have the same dtype and values, or two sequences the same numbers.

        On a fake GPU, only shapes and dtypes of tensors are compared.
        """
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

    def make_result(self, **measurements: Any) -> dict[str, Any]:
        """Return the result of the case: `measurements`, the largest deviation by label, and the failures."""
        deviations = {label: float(f"{deviation:.3g}") for label, deviation in self.deviations.items()}
        return {**measurements, "errors": deviations, "broken": self.failures}
