"""The rows of `gpu.py` in order of importance: checks of values, the most important training steps, then the rest.

A row is one case of the benchmark: a function and its options. It is called a row because it fills one row of the
table of results, or several. `expected_seconds` estimates its time on an H200 with compilation: it starts only if so
much time is left. After `limit_seconds` it counts as hung.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from gpu_environment import check_environment
from gpu_figures import attention_kernels, limits, optimizers, tests, training
from gpu_kernels import check_attention, check_fp8, check_loss
from gpu_profile import profile_step
from gpu_steps import (
    check_checkpoint,
    check_compile,
    check_fp8_step,
    check_generation,
    check_host_syncs,
    check_one_rank,
    check_step,
    check_step_bf16,
)

K = 1024


@dataclass(frozen=True)
class Row:
    """A case: a check, which fails if a value is wrong, or a measurement."""

    kind: str
    name: str
    function: Callable[..., Any]
    options: dict[str, Any] = field(default_factory=dict)
    expected_seconds: float = 5.0
    limit_seconds: float = 60.0


def check(
    name: str,
    function: Callable[..., Any],
    expected_seconds: float = 5.0,
    limit_seconds: float = 60.0,
    **options: Any,
) -> Row:
    """Make the row of a check; `options` are the arguments of its function."""
    return Row("check", name, function, options, expected_seconds, limit_seconds)


def train(
    model: str,
    seq_len: int,
    batch: int,
    *overrides: str,
    sliced: bool = True,
    expected_seconds: float = 12.0,
    limit_seconds: float = 90.0,
) -> Row:
    """Make a training row, named by what differs from the default: bf16, eager, the loss in slices."""
    labels = [model, f"{seq_len // K}k x {batch}"]
    labels += [label for label, key in (("fp8", "fp8=true"), ("compiled", "compile=true")) if key in overrides]
    labels += [key.partition("=")[2] for key in overrides if key.startswith("parallel.recompute=")]
    options = {"model": model, "seq_len": seq_len, "batch": batch, "overrides": overrides, "sliced": sliced}
    name = ", ".join([*labels, *([] if sliced else ["whole logits"])])
    return Row("train", name, training, options, expected_seconds, limit_seconds)


def attention(mask: str, seq_len: int, batch: int) -> Row:
    """Make the row of the attention kernels with a mask."""
    options = {"mask": mask, "seq_len": seq_len, "batch": batch}
    return Row("attention", f"attention {mask} {seq_len // K}k x {batch}", attention_kernels, options, 12, 60)


FP8, COMPILED, FULL = "fp8=true", "compile=true", "parallel.recompute=full"


def rows() -> Iterator[Row]:
    """Yield all rows in the order in which they run."""
    yield check("environment", check_environment)
    yield check("step fp32", check_step, 15)
    yield check("step bf16", check_step_bf16)
    yield check("loss", check_loss, 8)
    for kernel in ("chosen", "math", "flash", "efficient", "cudnn"):
        yield check(f"attention {kernel}", check_attention, 8 if kernel == "chosen" else 3, kernel=kernel)
    for tokens in (256, 21):
        yield check(f"fp8 products, {tokens} tokens", check_fp8, 3, tokens=tokens)
    yield check("host syncs", check_host_syncs, 3, overrides=())
    yield check("generation", check_generation)
    yield check("checkpoint", check_checkpoint)
    yield check("one rank", check_one_rank, 8)
    yield train("llama-1b", 4 * K, 4)
    yield Row("limits", "limits", limits)
    yield check("attention flex", check_attention, 10, kernel="flex")
    yield check("compile", check_compile, 20, 120)
    yield train("llama-1b", 4 * K, 4, COMPILED, expected_seconds=20)
    yield check("fp8 step, eager", check_fp8_step, 4, compiled=False)
    yield check("fp8 step, compiled", check_fp8_step, 10, compiled=True)
    yield check("host syncs, compiled", check_host_syncs, 8, overrides=(COMPILED,))
    yield check("host syncs, fp8", check_host_syncs, 8, overrides=(FP8, COMPILED))
    yield check("host syncs, documents", check_host_syncs, 8, overrides=(), documents=True)
    yield from later_rows()


def later_rows() -> Iterator[Row]:
    """Yield the rows that run after the first two minutes."""
    options = {"model": "llama-1b", "seq_len": 4 * K, "batch": 4}
    yield Row("profile", "profile, compiled", profile_step, {**options, "overrides": (COMPILED,)}, 15)
    yield train("llama-1b", 4 * K, 4, FP8, COMPILED, expected_seconds=20)
    yield train("llama-8b", 4 * K, 4, COMPILED, expected_seconds=15)
    yield train("llama-8b", 4 * K, 4, FP8, COMPILED, expected_seconds=15)
    yield train("llama-1b", 4 * K, 4, COMPILED, sliced=False)
    yield train("llama-1b", 16 * K, 1, COMPILED)
    yield Row("tests", "pytest -m gpu", tests, expected_seconds=60, limit_seconds=150)
    yield train("llama-8b", 16 * K, 1, COMPILED)
    yield train("llama-8b", 16 * K, 1, FP8, COMPILED)
    for mask in ("causal", "documents"):
        yield attention(mask, 4 * K, 4)
    yield Row("optimizer", "optimizer", optimizers, expected_seconds=15)
    yield train("llama-1b", 16 * K, 1, FP8, COMPILED)
    yield train("llama-8b", 4 * K, 4)
    yield train("llama-1b", 4 * K, 4, FP8)
    yield train("llama-8b", 4 * K, 4, FP8)
    yield train("llama-1b", 4 * K, 4, sliced=False)
    yield train("llama-1b", 16 * K, 1)
    yield train("llama-1b", 16 * K, 4, COMPILED, FULL)
    for mask in ("prefix", "bidirectional"):
        yield attention(mask, 4 * K, 4)
    for mask in ("causal", "documents"):
        yield attention(mask, 16 * K, 1)
    yield train("llama-8b", 4 * K, 4, COMPILED, sliced=False)
    yield train("llama-8b", 16 * K, 1)
    yield Row("profile", "profile, eager", profile_step, {**options, "overrides": ()}, 10)


ROWS = list(rows())
assert len({row.name for row in ROWS}) == len(ROWS)
