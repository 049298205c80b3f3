"""The rows of `gpu.py` by value: checks of values first, then the most important training steps, then the rest.

`expected` estimates a row's seconds on an H200, compilation included: a row starts only if so many are left. After
`limit` seconds a row counts as hung.
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
    """A check, which fails on a wrong value, or a figure."""

    kind: str
    name: str
    work: Callable[..., Any]
    options: dict[str, Any] = field(default_factory=dict)
    expected: float = 5.0
    limit: float = 60.0


def check(name: str, work: Callable[..., Any], expected: float = 5.0, limit: float = 60.0, **options: Any) -> Row:
    return Row("check", name, work, options, expected, limit)


def train(
    model: str, seq_len: int, batch: int, *keys: str, sliced: bool = True, expected: float = 12.0, limit: float = 90.0
) -> Row:
    """Make a training row, named by what differs from the default: bf16, eager, the loss in slices."""
    labels = [model, f"{seq_len // K}k x {batch}"]
    labels += [label for label, key in (("fp8", "fp8=true"), ("compiled", "compile=true")) if key in keys]
    labels += [key.partition("=")[2] for key in keys if key.startswith("parallel.recompute=")]
    options = {"model": model, "seq_len": seq_len, "batch": batch, "keys": keys, "sliced": sliced}
    return Row("train", ", ".join([*labels, *([] if sliced else ["whole logits"])]), training, options, expected, limit)


def attention(mask: str, seq_len: int, batch: int) -> Row:
    options = {"mask": mask, "seq_len": seq_len, "batch": batch}
    return Row("attention", f"attention {mask} {seq_len // K}k x {batch}", attention_kernels, options, 12, 60)


FP8, COMPILED, FULL = "fp8=true", "compile=true", "parallel.recompute=full"


def rows() -> Iterator[Row]:
    """Yield all rows in their order."""
    yield check("environment", check_environment)
    yield check("step fp32", check_step, 15)
    yield check("step bf16", check_step_bf16)
    yield check("loss", check_loss, 8)
    for kernel in ("chosen", "math", "flash", "efficient", "cudnn"):
        yield check(f"attention {kernel}", check_attention, 8 if kernel == "chosen" else 3, kernel=kernel)
    for tokens in (256, 21):
        yield check(f"fp8 products, {tokens} tokens", check_fp8, 3, tokens=tokens)
    yield check("host syncs", check_host_syncs, 3, keys=())
    yield check("generation", check_generation)
    yield check("checkpoint", check_checkpoint)
    yield check("one rank", check_one_rank, 8)
    yield train("llama-1b", 4 * K, 4)
    yield Row("limits", "limits", limits)
    yield check("attention flex", check_attention, 10, kernel="flex")
    yield check("compile", check_compile, 20, 120)
    yield train("llama-1b", 4 * K, 4, COMPILED, expected=20)
    yield check("fp8 step, eager", check_fp8_step, 4, compiled=False)
    yield check("fp8 step, compiled", check_fp8_step, 10, compiled=True)
    yield check("host syncs, compiled", check_host_syncs, 8, keys=(COMPILED,))
    yield check("host syncs, fp8", check_host_syncs, 8, keys=(FP8, COMPILED))
    yield check("host syncs, documents", check_host_syncs, 8, keys=(), documents=True)
    yield from later_rows()


def later_rows() -> Iterator[Row]:
    """Yield the rows after the first two minutes."""
    options = {"model": "llama-1b", "seq_len": 4 * K, "batch": 4}
    yield Row("profile", "profile, compiled", profile_step, {**options, "keys": (COMPILED,)}, 15)
    yield train("llama-1b", 4 * K, 4, FP8, COMPILED, expected=20)
    yield train("llama-8b", 4 * K, 4, COMPILED, expected=15)
    yield train("llama-8b", 4 * K, 4, FP8, COMPILED, expected=15)
    yield train("llama-1b", 4 * K, 4, COMPILED, sliced=False)
    yield train("llama-1b", 16 * K, 1, COMPILED)
    yield Row("tests", "pytest -m gpu", tests, expected=60, limit=150)
    yield train("llama-8b", 16 * K, 1, COMPILED)
    yield train("llama-8b", 16 * K, 1, FP8, COMPILED)
    for mask in ("causal", "documents"):
        yield attention(mask, 4 * K, 4)
    yield Row("optimizer", "optimizer", optimizers, expected=15)
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
    yield Row("profile", "profile, eager", profile_step, {**options, "keys": ()}, 10)


ROWS = list(rows())
assert len({row.name for row in ROWS}) == len(ROWS)
