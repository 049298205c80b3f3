"""Figures of `gpu.py`: training steps, attention, the optimizer, a matrix product, and the tests that need a GPU.

A training row takes the native engine's step on one batch, as train.py does. On a fake GPU it reports the peak
memory that the step would need (memory.py) in place of figures.
"""

import argparse
import math
import os
import re
import subprocess
import sys
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

import attention
import memory
import optimizer
from dist_llm.config.schema import Config
from dist_llm.observe.flops import flops_per_token, peak_flops
from gpu_context import SMALL, SMALL_VOCABULARY, TINY_SEQ_LEN, Context, SkippedError
from measure import copy_rate, matmul_rate
from models import make_config
from train import make_native_stepper

REPOSITORY = Path(__file__).resolve().parents[1]
MEASURED_SECONDS, MIN_STEPS, MAX_STEPS = 4.0, 3, 20  # of a training row, after its warm-up
PYTEST_SECONDS = 60  # of one test


def training_config(context: Context, model: str, seq_len: int, batch: int, overrides: tuple[str, ...]) -> Config:
    """Make the config of a training row."""
    sizes = [f"data.global_batch={batch}", f"data.seq_len={seq_len}", f"model.max_seq_len={seq_len}"]
    if context.tiny:
        seq_len //= TINY_SEQ_LEN
        sizes = [f"data.global_batch={batch}", f"data.seq_len={seq_len}", f"model.vocab_size={SMALL_VOCABULARY}"]
        sizes += [*SMALL, "model.n_layers=1"]
    return make_config(model, ["precision=bf16", *sizes, *overrides])


def training(
    context: Context, model: str, seq_len: int, batch: int, overrides: tuple[str, ...] = (), sliced: bool = True
) -> dict[str, Any]:
    """Train steps of one config; `sliced` says whether the loss is computed in slices or over all logits."""
    config = training_config(context, model, seq_len, batch, overrides)
    row_keys: dict[str, Any] = {"model": model, "seq_len": config.data.seq_len, "batch": batch, "sliced": sliced}
    row_keys |= {"compile": config.compile, "fp8": config.fp8, "recompute": config.parallel.recompute}
    with nullcontext() if sliced else memory.full_logits():
        if context.fake_gpu is not None:
            traced = memory.trace_steps(config, context.fake_gpu)
            return {**row_keys, "traced_peak": traced["peak"], "traced_at": traced["at"]}
        return {**row_keys, **measure_steps(config, context)}


def measure_steps(config: Config, context: Context) -> dict[str, Any]:
    """Warm up, measure, and check that the first loss is that of an untrained model."""
    device, data = context.device, config.data
    run_steps = make_native_stepper(config, device)
    first, second = run_steps(1), run_steps(1)
    steps = max(MIN_STEPS, min(MAX_STEPS, int(MEASURED_SECONDS / 2 / second["seconds"])))
    if context.tiny:
        steps = 1
    measurements = [run_steps(steps) for _ in range(2)]
    seconds = min(each["seconds"] for each in measurements) / steps
    tokens_per_second = data.global_batch * data.seq_len / seconds
    peak, source = (
        peak_flops(device, "bf16") if device.type == "cuda" else (matmul_rate(device, "bf16", 256, 1), "matmul")
    )
    uniform_loss = math.log(config.model.vocab_size)
    failures = (
        []
        if abs(first["loss"] - uniform_loss) < 1
        else [f"loss of the first step {first['loss']:.4f}, not {uniform_loss:.2f}"]
    )
    row = {
        "tokens_per_second": tokens_per_second,
        "step_seconds": seconds,
        "mfu": tokens_per_second * flops_per_token(config.model, data.seq_len) / peak,
        "mfu_of": source,
        "peak": measurements[-1]["peak"],
        "first_step_seconds": first["seconds"],
        "loss": first["loss"],
        "steps": 2 * steps,
        "broken": failures,
    }
    if device.type == "cuda":
        row["reserved"] = torch.cuda.max_memory_reserved(device)
    return row


def limits(context: Context) -> dict[str, Any]:
    """Measure rates to compare other figures with: a matrix product in bf16 and fp32, and a copy."""
    size = 256 if context.tiny else 8192
    rates = {f"{each}_matmul": matmul_rate(context.device, each, size, 2) for each in ("bf16", "fp32")}
    return {**rates, "copy_bytes_per_second": copy_rate(context.device, 1 << (20 if context.tiny else 30))}


def attention_kernels(context: Context, mask: str, seq_len: int, batch: int) -> list[dict[str, Any]]:
    """Measure one row per kernel, with the heads of Llama 3 8B."""
    heads, kv_heads, head_dim = (4, 2, 16) if context.tiny else (32, 8, 128)
    seq_len //= TINY_SEQ_LEN if context.tiny else 1
    sizes = {"batch": batch, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
    options = argparse.Namespace(**sizes, rounds=1 if context.tiny else 5)
    rows = attention.measure_case(mask, seq_len, "bf16", options, context.device)
    return [{"row": row["kernel"], "mask": mask, "seq_len": seq_len, **sizes, **row} for row in rows]


def optimizers(context: Context) -> list[dict[str, Any]]:
    """Measure one row per way to update four layers of llama-1b."""
    overrides = [*SMALL, f"model.vocab_size={SMALL_VOCABULARY}"] if context.tiny else ["model.n_layers=4"]
    options = argparse.Namespace(overrides=overrides, rounds=1 if context.tiny else 3)
    return [{"row": row["way"], **row} for row in optimizer.measure_case("llama-1b", options, context.device)]


def tests(context: Context) -> dict[str, Any]:
    """Run `pytest -m gpu` in its own process."""
    if context.kind != "cuda":
        raise SkippedError("the tests that need a GPU: not without one")
    if missing := [name for name in ("pytest", "pytest_timeout") if find_spec(name) is None]:
        raise SkippedError(f"not installed: {', '.join(missing)}")
    torch.cuda.empty_cache()
    options = [
        "-m",
        "gpu",
        "-p",
        "no:cacheprovider",
        "-rfE",
        "--tb=short",
        f"--timeout={PYTEST_SECONDS}",
        "tests/gpu/test_gpu.py",
    ]
    command = [sys.executable, "-m", "pytest", *options]
    completed = subprocess.run(command, cwd=REPOSITORY, env=os.environ, capture_output=True, text=True)
    counts = {word: int(count) for count, word in re.findall(r"(\d+) (passed|failed|error|skipped)", completed.stdout)}
    failures = (
        []
        if completed.returncode == 0
        else [line for line in completed.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    )
    if completed.returncode and not failures:
        failures = [f"pytest ended with {completed.returncode}"]
    return {
        **counts,
        "broken": failures,
        **({"output": (completed.stdout + completed.stderr)[-6000:]} if failures else {}),
    }
