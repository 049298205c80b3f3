"""Figures of `gpu.py`: training steps, attention, the optimizer, a matrix product, and the tests that need a GPU.

A training row takes the native engine's step on one batch, as train.py does. On a pretended GPU it has the peak of the
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
from models import config_of
from train import make_ours

REPOSITORY = Path(__file__).resolve().parents[1]
MEASURED_SECONDS, LEAST_STEPS, MOST_STEPS = 4.0, 3, 20  # of a training row, after its warm-up
PYTEST_SECONDS = 60  # of one test


def training_config(context: Context, model: str, seq_len: int, batch: int, keys: tuple[str, ...]) -> Config:
    """The config of a training row."""
    sizes = [f"data.global_batch={batch}", f"data.seq_len={seq_len}", f"model.max_seq_len={seq_len}"]
    if context.tiny:
        seq_len //= TINY_SEQ_LEN
        sizes = [f"data.global_batch={batch}", f"data.seq_len={seq_len}", f"model.vocab_size={SMALL_VOCABULARY}"]
        sizes += [*SMALL, "model.n_layers=1"]
    return config_of(model, ["precision=bf16", *sizes, *keys])


def training(
    context: Context, model: str, seq_len: int, batch: int, keys: tuple[str, ...] = (), sliced: bool = True
) -> dict[str, Any]:
    """Steps of one config; `sliced`: whether the loss is computed in slices, or over whole logits."""
    config = training_config(context, model, seq_len, batch, keys)
    described: dict[str, Any] = {"model": model, "seq_len": config.data.seq_len, "batch": batch, "sliced": sliced}
    described |= {"compile": config.compile, "fp8": config.fp8, "recompute": config.parallel.recompute}
    with nullcontext() if sliced else memory.whole_logits():
        if context.gpu is not None:
            traced = memory.steps(config, context.gpu)
            return {**described, "traced_peak": traced["peak"], "traced_at": traced["at"]}
        return {**described, **measured_steps(config, context)}


def measured_steps(config: Config, context: Context) -> dict[str, Any]:
    """Warm up, measure, and see whether the loss of the first step is that of a model that knows nothing."""
    device, data = context.device, config.data
    turn = make_ours(config, device)
    first, second = turn(1), turn(1)
    steps = max(LEAST_STEPS, min(MOST_STEPS, int(MEASURED_SECONDS / 2 / second["seconds"])))
    if context.tiny:
        steps = 1
    turns = [turn(steps) for _ in range(2)]
    seconds = min(each["seconds"] for each in turns) / steps
    tokens_per_second = data.global_batch * data.seq_len / seconds
    peak, source = (
        peak_flops(device, "bf16") if device.type == "cuda" else (matmul_rate(device, "bf16", 256, 1), "matmul")
    )
    chance = math.log(config.model.vocab_size)
    broken = (
        [] if abs(first["loss"] - chance) < 1 else [f"loss of the first step {first['loss']:.4f}, not {chance:.2f}"]
    )
    found = {
        "tokens_per_second": tokens_per_second,
        "step_seconds": seconds,
        "mfu": tokens_per_second * flops_per_token(config.model, data.seq_len) / peak,
        "mfu_of": source,
        "peak": turns[-1]["peak"],
        "first_step_seconds": first["seconds"],
        "loss": first["loss"],
        "steps": 2 * steps,
        "broken": broken,
    }
    if device.type == "cuda":
        found["reserved"] = torch.cuda.max_memory_reserved(device)
    return found


def limits(context: Context) -> dict[str, Any]:
    """Rates that other figures are held against: a matrix product in bf16 and fp32, and a copy."""
    size = 256 if context.tiny else 8192
    rates = {f"{each}_matmul": matmul_rate(context.device, each, size, 2) for each in ("bf16", "fp32")}
    return {**rates, "copy_bytes_per_second": copy_rate(context.device, 1 << (20 if context.tiny else 30))}


def attention_kernels(context: Context, mask: str, seq_len: int, batch: int) -> list[dict[str, Any]]:
    """A row per kernel, with the heads of Llama 3's 8B."""
    heads, kv_heads, head_dim = (4, 2, 16) if context.tiny else (32, 8, 128)
    seq_len //= TINY_SEQ_LEN if context.tiny else 1
    sizes = {"batch": batch, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
    options = argparse.Namespace(**sizes, rounds=1 if context.tiny else 5)
    rows = attention.case(mask, seq_len, "bf16", options, context.device)
    return [{"row": row["kernel"], "mask": mask, "seq_len": seq_len, **sizes, **row} for row in rows]


def optimizers(context: Context) -> list[dict[str, Any]]:
    """A row per way to update four layers of llama-1b."""
    keys = [*SMALL, f"model.vocab_size={SMALL_VOCABULARY}"] if context.tiny else ["model.n_layers=4"]
    options = argparse.Namespace(overrides=keys, rounds=1 if context.tiny else 3)
    return [{"row": row["way"], **row} for row in optimizer.case("llama-1b", options, context.device)]


def tests(context: Context) -> dict[str, Any]:
    """`pytest -m gpu`, in a process of its own."""
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
    done = subprocess.run(command, cwd=REPOSITORY, env=os.environ, capture_output=True, text=True)
    counts = {word: int(count) for count, word in re.findall(r"(\d+) (passed|failed|error|skipped)", done.stdout)}
    broken = (
        []
        if done.returncode == 0
        else [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    )
    if done.returncode and not broken:
        broken = [f"pytest ended with {done.returncode}"]
    return {**counts, "broken": broken, **({"output": (done.stdout + done.stderr)[-6000:]} if broken else {})}
