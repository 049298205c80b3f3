"""The checks of `make gpu` pass with correct values and fail with a planted wrong value, here on the CPU."""

import itertools
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from dist_llm.engines.native import NativeEngine
from dist_llm.losses import fused_linear_cross_entropy
from dist_llm.models import softmax_attention
from dist_llm.parallel import fp8

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))  # its programs import each other by bare names

import gpu_figures
import gpu_kernels
import gpu_profile
import gpu_steps
from gpu_context import CaseContext, Comparison
from gpu_profile import Gap, Span

CPU = CaseContext("cpu", tiny=True, folder=Path("unused"))


@pytest.mark.parametrize(
    ("owner", "name", "bug", "check", "options"),
    [
        (
            fused_linear_cross_entropy,
            "_losses_and_logit_grads_",
            lambda correct: lambda *args: correct(*args) * 1.001,
            gpu_kernels.check_loss,
            {},
        ),
        (
            gpu_kernels,
            "scaled_dot_product",
            lambda correct: lambda *args, **kwargs: correct(*args, **kwargs, scale=0.13),
            gpu_kernels.check_attention,
            {"kernel": "chosen", "seq_len": 64},
        ),
        (
            softmax_attention,
            "cpu_flash_attention",
            lambda correct: lambda *args, **kwargs: correct(*args, **kwargs | {"scale": 0.13}),
            gpu_kernels.check_attention,
            {"kernel": "sinks", "seq_len": 64},
        ),
        (
            fp8,
            "scaled_matmul",
            lambda correct: lambda *args: correct(*args) * 1.02,
            gpu_kernels.check_fp8,
            {"tokens": 21},
        ),
        (
            gpu_steps.copy,
            "deepcopy",
            lambda correct: lambda model: correct(model).apply(_shift_norms),
            gpu_steps.check_generation,
            {},
        ),
        (
            gpu_steps,
            "load_checkpoint",
            lambda correct: lambda folder, state: _load_shifted(correct, folder, state),
            gpu_steps.check_checkpoint,
            {},
        ),
    ],
    ids=["loss", "attention", "sinks", "fp8", "generation", "checkpoint"],
)
def test_a_wrong_value_breaks_the_check(owner: Any, name: str, bug: Any, check: Any, options: dict[str, Any]) -> None:
    """The check passes without the bug and fails with it."""
    assert check(CPU, **options)["broken"] == []
    with patch.object(owner, name, bug(getattr(owner, name))):
        assert check(CPU, **options)["broken"]


def _shift_norms(module: torch.nn.Module) -> None:
    """Add 0.01 to the weights of a norm."""
    if isinstance(module, torch.nn.RMSNorm):
        module.weight.data += 0.01


def _load_shifted(load: Any, folder: Any, state: Any) -> None:
    """Planted bug: after loading, one element of a moment is 1 too large."""
    load(folder, state)
    next(iter(state.moments().values())).view(-1)[:1] += 1


class LongStepEngine(NativeEngine):
    """Planted bug: each second engine, the one on the device, has a learning rate that is too large by 0.1%."""

    instance_numbers = itertools.count()

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.lr_factor = 1.001 if next(self.instance_numbers) % 2 else 1.0

    def update(self, lr: float, should_apply: Any = None) -> torch.Tensor:
        return super().update(lr * self.lr_factor, should_apply)


@pytest.fixture
def long_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the engine of the GPU checks by LongStepEngine."""
    LongStepEngine.instance_numbers = itertools.count()
    monkeypatch.setattr(gpu_steps, "NativeEngine", LongStepEngine)


def test_correct_steps_pass() -> None:
    for check in (gpu_steps.check_step, gpu_steps.check_one_rank, gpu_steps.check_step_bf16):
        assert check(CPU)["broken"] == []


def test_a_wrong_step_of_one_rank_breaks_the_check(long_steps: None) -> None:
    assert any("FSDP2: updates: error 0.001" in line for line in gpu_steps.check_one_rank(CPU)["broken"])


def test_bf16_that_is_fp32_breaks_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    original = gpu_steps.make_tiny_config
    monkeypatch.setattr(gpu_steps, "make_tiny_config", lambda *overrides: original(*overrides, "precision=fp32"))
    assert gpu_steps.check_step_bf16(CPU)["broken"] == ["bf16 computed what fp32 computes"]


def test_a_wrong_step_breaks_the_check(long_steps: None) -> None:
    failures = gpu_steps.check_step(CPU)["broken"]
    assert any("llama-cpu sgd: updates: error 0.001" in line for line in failures)
    assert any("gpt2-cpu adamw: updates" in line for line in failures)


def test_a_loss_of_zero_breaks_a_training_case(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that computes nothing would be fast, so a training case checks the first loss."""
    measurement = {"seconds": 0.1, "peak": 1, "loss": 0.0}
    monkeypatch.setattr(gpu_figures, "make_native_stepper", lambda config, device: lambda steps: measurement)
    row = gpu_figures.measure_training(CPU, "llama-1b", seq_len=4096, batch=4)
    assert row["broken"]
    assert row["tokens_per_second"] == pytest.approx(4 * 64 / 0.1)


def test_nan_and_a_wrong_shape_break_a_comparison() -> None:
    comparison = Comparison(CPU)
    comparison.check_close("nan", torch.tensor([torch.nan]), torch.ones(1), 1e30)
    comparison.check_close("shape", torch.ones(2), torch.ones(1), 1e30)
    comparison.check_equal("bits", torch.ones(1), torch.ones(1, dtype=torch.float64))
    assert [line.partition(":")[0] for line in comparison.failures] == ["nan", "shape", "bits"]


def test_a_gap_begins_at_the_end_of_all_earlier_kernels() -> None:
    device_spans = [
        Span("a", start=0, end=10),
        Span("long", start=2, end=30),
        Span("short", start=5, end=6),
        Span("b", start=34, end=40),
        Span("c", start=40, end=50),
    ]
    host_spans = [
        Span("aten::mm", start=1, end=3),
        Span("aten::item", start=31, end=33),
        Span("aten::add", start=39, end=40),
    ]
    (gap,) = gpu_profile.find_gaps(device_spans, host_spans)
    assert gap == Gap(start=30, micros=4, previous_kernel="long", next_kernel="b", last_host_operator="aten::item")
    summary = gpu_profile.summarize_spans(device_spans, host_spans)
    assert (summary["kernel_window_micros"], summary["idle_micros"], summary["kernels"]) == (50, 4, 5)
    assert gpu_profile.summarize_spans([], [])["broken"] == ["the profile has no kernel"]
