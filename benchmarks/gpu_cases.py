"""The cases of `gpu.py` in the order in which they run: checks, the most important training steps, then the others.

A case is a function and its options; the results have one row per case, or several. `expected_seconds` estimates the
duration of a case on an H200, compilation included: the case starts only if that much time is left. After
`limit_seconds` the case counts as hung.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from gpu_environment import check_environment
from gpu_figures import (
    measure_attention_kernels,
    measure_limits,
    measure_optimizers,
    measure_training,
    run_gpu_tests,
)
from gpu_kernels import check_attention, check_fp8, check_loss
from gpu_profile import profile_step
from gpu_steps import (
    check_checkpoint,
    check_compile,
    check_experts,
    check_fp8_step,
    check_generation,
    check_host_syncs,
    check_one_rank,
    check_step,
    check_step_bf16,
)

K = 1024


@dataclass(frozen=True)
class BenchmarkCase:
    """A check, which fails if a value is wrong, or a measurement."""

    kind: str  # check, train, attention, optimizer, limits, profile or tests
    name: str
    function: Callable[..., Any]
    options: dict[str, Any] = field(default_factory=dict)
    expected_seconds: float = 5.0
    limit_seconds: float = 60.0


def make_check(
    name: str,
    function: Callable[..., Any],
    expected_seconds: float = 5.0,
    limit_seconds: float = 60.0,
    **options: Any,
) -> BenchmarkCase:
    """Make the case of a check; `options` are the keyword arguments of its function."""
    return BenchmarkCase("check", name, function, options, expected_seconds, limit_seconds)


def make_training_case(
    model: str,
    seq_len: int,
    batch: int,
    *overrides: str,
    sliced: bool = True,
    expected_seconds: float = 12.0,
    limit_seconds: float = 90.0,
) -> BenchmarkCase:
    """Make a training case with `batch` sequences in a step.

    The name lists what differs from the default: bf16, eager, the loss computed in slices.
    """
    labels = [model, f"{seq_len // K}k x {batch}"]
    labels += [label for label, key in (("fp8", "fp8=true"), ("compiled", "compile=true")) if key in overrides]
    labels += [key.partition("=")[2] for key in overrides if key.startswith("parallel.recompute=")]
    options = {"model": model, "seq_len": seq_len, "batch": batch, "overrides": overrides, "sliced": sliced}
    name = ", ".join([*labels, *([] if sliced else ["whole logits"])])
    return BenchmarkCase("train", name, measure_training, options, expected_seconds, limit_seconds)


def make_attention_case(mask: str, seq_len: int, batch: int) -> BenchmarkCase:
    """Make the case that times the attention kernels with one mask."""
    options = {"mask": mask, "seq_len": seq_len, "batch": batch}
    name = f"attention {mask} {seq_len // K}k x {batch}"
    return BenchmarkCase("attention", name, measure_attention_kernels, options, expected_seconds=12)


FP8, COMPILED, FULL_RECOMPUTE = "fp8=true", "compile=true", "parallel.recompute=full"


def iter_cases() -> Iterator[BenchmarkCase]:
    """Yield all cases in the order in which they run."""
    yield make_check("environment", check_environment)
    yield make_check("step fp32", check_step, expected_seconds=15)
    yield make_check("step bf16", check_step_bf16)
    yield make_check("experts", check_experts, expected_seconds=8)
    yield make_check("loss", check_loss, expected_seconds=8)
    for kernel in ("chosen", "math", "flash", "efficient", "cudnn"):
        yield make_check(
            f"attention {kernel}", check_attention, expected_seconds=8 if kernel == "chosen" else 3, kernel=kernel
        )
    for tokens in (256, 21):
        yield make_check(f"fp8 products, {tokens} tokens", check_fp8, expected_seconds=3, tokens=tokens)
    yield make_check("host syncs", check_host_syncs, expected_seconds=3, overrides=())
    yield make_check("generation", check_generation)
    yield make_check("checkpoint", check_checkpoint)
    yield make_check("one rank", check_one_rank, expected_seconds=8)
    yield make_training_case("llama-1b", 4 * K, batch=4)
    yield BenchmarkCase("limits", "limits", measure_limits)
    for kernel in ("flex", "sinks"):
        yield make_check(f"attention {kernel}", check_attention, expected_seconds=10, kernel=kernel)
    yield make_check("compile", check_compile, expected_seconds=20, limit_seconds=120)
    yield make_training_case("llama-1b", 4 * K, 4, COMPILED, expected_seconds=20)
    yield make_check("fp8 step, eager", check_fp8_step, expected_seconds=4, compiled=False)
    yield make_check("fp8 step, compiled", check_fp8_step, expected_seconds=10, compiled=True)
    yield make_check("host syncs, compiled", check_host_syncs, expected_seconds=8, overrides=(COMPILED,))
    yield make_check("host syncs, fp8", check_host_syncs, expected_seconds=8, overrides=(FP8, COMPILED))
    yield make_check("host syncs, documents", check_host_syncs, expected_seconds=8, overrides=(), documents=True)
    yield from iter_later_cases()


def iter_later_cases() -> Iterator[BenchmarkCase]:
    """Yield the cases that run after the first two minutes."""
    options = {"model": "llama-1b", "seq_len": 4 * K, "batch": 4}
    yield BenchmarkCase(
        "profile", "profile, compiled", profile_step, {**options, "overrides": (COMPILED,)}, expected_seconds=15
    )
    yield make_training_case("llama-1b", 4 * K, 4, FP8, COMPILED, expected_seconds=20)
    yield make_training_case("llama-8b", 4 * K, 4, COMPILED, expected_seconds=15)
    yield make_training_case("llama-8b", 4 * K, 4, FP8, COMPILED, expected_seconds=15)
    yield make_training_case("llama-1b", 4 * K, 4, COMPILED, sliced=False)
    yield make_training_case("llama-1b", 16 * K, 1, COMPILED)
    yield BenchmarkCase("tests", "pytest -m gpu", run_gpu_tests, expected_seconds=60, limit_seconds=150)
    yield make_training_case("llama-8b", 16 * K, 1, COMPILED)
    yield make_training_case("llama-8b", 16 * K, 1, FP8, COMPILED)
    for mask in ("causal", "documents"):
        yield make_attention_case(mask, 4 * K, batch=4)
    yield BenchmarkCase("optimizer", "optimizer", measure_optimizers, expected_seconds=15)
    yield make_training_case("llama-1b", 16 * K, 1, FP8, COMPILED)
    yield make_training_case("llama-8b", 4 * K, batch=4)
    yield make_training_case("llama-1b", 4 * K, 4, FP8)
    yield make_training_case("llama-8b", 4 * K, 4, FP8)
    yield make_training_case("llama-1b", 4 * K, batch=4, sliced=False)
    yield make_training_case("llama-1b", 16 * K, batch=1)
    yield make_training_case("llama-1b", 16 * K, 4, COMPILED, FULL_RECOMPUTE)
    for mask in ("prefix", "bidirectional"):
        yield make_attention_case(mask, 4 * K, batch=4)
    for mask in ("causal", "documents"):
        yield make_attention_case(mask, 16 * K, batch=1)
    yield make_training_case("llama-8b", 4 * K, 4, COMPILED, sliced=False)
    yield make_training_case("llama-8b", 16 * K, batch=1)
    yield BenchmarkCase("profile", "profile, eager", profile_step, {**options, "overrides": ()}, expected_seconds=10)


CASES = list(iter_cases())
assert len({case.name for case in CASES}) == len(CASES)
