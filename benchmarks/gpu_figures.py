"""Measurements of `gpu.py`: training steps, attention, the optimizer, matrix products, and the tests that need a GPU.

A training case takes steps of the native engine on one batch, as train.py does. On a fake GPU it reports only the peak
memory that a step would need (memory.py).
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
from dist_llm.observe.flops import count_flops_per_token, find_peak_flops
from gpu_context import TINY_MODEL_OVERRIDES, TINY_SEQ_LEN_DIVISOR, TINY_VOCAB_SIZE, CaseContext, SkippedError
from measure import measure_copy_rate, measure_matmul_rate
from named_models import make_named_config
from train import make_native_stepper

REPOSITORY = Path(__file__).resolve().parents[1]
MEASURED_SECONDS, MIN_STEPS, MAX_STEPS = 4.0, 3, 20  # of a training case, after its warm-up
TEST_TIMEOUT_SECONDS = 60


def make_training_config(
    context: CaseContext, model: str, seq_len: int, batch: int, overrides: tuple[str, ...]
) -> Config:
    """Make the config of a training case; `batch` is the number of sequences in a step."""
    sizes = [f"data.global_batch={batch}", f"data.seq_len={seq_len}", f"model.max_seq_len={seq_len}"]
    if context.tiny:
        seq_len //= TINY_SEQ_LEN_DIVISOR
        sizes = [f"data.global_batch={batch}", f"data.seq_len={seq_len}", f"model.vocab_size={TINY_VOCAB_SIZE}"]
        sizes += [*TINY_MODEL_OVERRIDES, "model.n_layers=1"]
    return make_named_config(model, ["precision=bf16", *sizes, *overrides])


def measure_training(
    context: CaseContext, model: str, seq_len: int, batch: int, overrides: tuple[str, ...] = (), sliced: bool = True
) -> dict[str, Any]:
    """Measure training steps of one config; without `sliced` the loss is computed over all logits at once."""
    config = make_training_config(context, model, seq_len, batch, overrides)
    row_keys: dict[str, Any] = {"model": model, "seq_len": config.data.seq_len, "batch": batch, "sliced": sliced}
    row_keys |= {"compile": config.compile, "fp8": config.fp8, "recompute": config.parallel.recompute}
    with nullcontext() if sliced else memory.full_logits():
        if context.active_fake_gpu is not None:
            traced = memory.trace_steps(config, context.active_fake_gpu)
            return {**row_keys, "traced_peak": traced["peak"], "traced_at": traced["at"]}
        return {**row_keys, **measure_steps(config, context)}


def measure_steps(config: Config, context: CaseContext) -> dict[str, Any]:
    """Measure steps after two warm-up steps, and check that the first loss is that of an untrained model."""
    device, data = context.device, config.data
    run_steps = make_native_stepper(config, device)
    first_step, second_step = run_steps(1), run_steps(1)
    num_steps = max(MIN_STEPS, min(MAX_STEPS, int(MEASURED_SECONDS / 2 / second_step["seconds"])))
    if context.tiny:
        num_steps = 1
    turns = [run_steps(num_steps) for _ in range(2)]
    step_seconds = min(turn["seconds"] for turn in turns) / num_steps
    tokens_per_second = data.global_batch * data.seq_len / step_seconds
    if device.type == "cuda":
        peak_flops_per_second, peak_source = find_peak_flops(device, "bf16")
    else:
        peak_flops_per_second, peak_source = measure_matmul_rate(device, "bf16", size=256, tries=1), "matmul"
    uniform_loss = math.log(config.model.vocab_size)
    failures = []
    if not abs(first_step["loss"] - uniform_loss) < 1:
        failures = [f"loss of the first step {first_step['loss']:.4f}, not {uniform_loss:.2f}"]
    row = {
        "tokens_per_second": tokens_per_second,
        "step_seconds": step_seconds,
        "mfu": tokens_per_second * count_flops_per_token(config.model, data.seq_len) / peak_flops_per_second,
        "mfu_of": peak_source,
        "peak": turns[-1]["peak"],
        "first_step_seconds": first_step["seconds"],
        "loss": first_step["loss"],
        "steps": 2 * num_steps,
        "broken": failures,
    }
    if device.type == "cuda":
        row["reserved"] = torch.cuda.max_memory_reserved(device)
    return row


def measure_limits(context: CaseContext) -> dict[str, Any]:
    """Measure the limits of the device: FLOP/s of a matrix product in bf16 and fp32, and bytes/s of a copy."""
    size = 256 if context.tiny else 8192
    rates = {
        f"{precision}_matmul": measure_matmul_rate(context.device, precision, size, tries=2)
        for precision in ("bf16", "fp32")
    }
    copy_bytes = 1 << (20 if context.tiny else 30)
    return {**rates, "copy_bytes_per_second": measure_copy_rate(context.device, copy_bytes)}


def measure_attention_kernels(context: CaseContext, mask: str, seq_len: int, batch: int) -> list[dict[str, Any]]:
    """Measure each attention kernel, one row per kernel, with the heads of Llama 3 8B."""
    heads, kv_heads, head_dim = (4, 2, 16) if context.tiny else (32, 8, 128)
    seq_len //= TINY_SEQ_LEN_DIVISOR if context.tiny else 1
    sizes = {"batch": batch, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
    options = argparse.Namespace(**sizes, rounds=1 if context.tiny else 5)
    rows = attention.measure_case(mask, seq_len, "bf16", options, context.device)
    return [{"row": row["kernel"], "mask": mask, "seq_len": seq_len, **sizes, **row} for row in rows]


def measure_optimizers(context: CaseContext) -> list[dict[str, Any]]:
    """Measure each variant of the update (optimizer.py), one row per variant, for four layers of llama-1b."""
    overrides = [*TINY_MODEL_OVERRIDES, f"model.vocab_size={TINY_VOCAB_SIZE}"] if context.tiny else ["model.n_layers=4"]
    options = argparse.Namespace(overrides=overrides, rounds=1 if context.tiny else 3)
    return [{"row": row["way"], **row} for row in optimizer.measure_case("llama-1b", options, context.device)]


def run_gpu_tests(context: CaseContext) -> dict[str, Any]:
    """Run `pytest -m gpu` in its own process and return the counts of outcomes."""
    if context.device_kind != "cuda":
        raise SkippedError("these tests need a GPU")
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
        f"--timeout={TEST_TIMEOUT_SECONDS}",
        "tests/gpu/test_gpu.py",
    ]
    command = [sys.executable, "-m", "pytest", *options]
    completed = subprocess.run(command, cwd=REPOSITORY, env=os.environ, capture_output=True, text=True)
    counts = {word: int(count) for count, word in re.findall(r"(\d+) (passed|failed|error|skipped)", completed.stdout)}
    failures = []
    if completed.returncode != 0:
        failures = [line for line in completed.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
        failures = failures or [f"pytest ended with exit code {completed.returncode}"]
    output = {"output": (completed.stdout + completed.stderr)[-6000:]} if failures else {}
    return {**counts, "broken": failures, **output}
