"""The programs in benchmarks/ run, and print what they promise. No figure is asserted: machines are noisy."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from . import commands
from .commands import REPOSITORY

OVERHEAD = REPOSITORY / "benchmarks" / "overhead.py"
PREPARE = REPOSITORY / "benchmarks" / "prepare.py"
DATA = REPOSITORY / "benchmarks" / "data.py"
RECOVERY = REPOSITORY / "benchmarks" / "recovery.py"
ENGINES = REPOSITORY / "benchmarks" / "engines.py"
CHECKPOINT = REPOSITORY / "benchmarks" / "checkpoint.py"
TRAIN = REPOSITORY / "benchmarks" / "train.py"
LOSS = REPOSITORY / "benchmarks" / "loss.py"
ATTENTION = REPOSITORY / "benchmarks" / "attention.py"
OPTIMIZER = REPOSITORY / "benchmarks" / "optimizer.py"
LAYOUTS = REPOSITORY / "benchmarks" / "layouts.py"
STARTUP = REPOSITORY / "benchmarks" / "startup.py"
MEMORY = REPOSITORY / "benchmarks" / "memory.py"
COLLECTIVES = REPOSITORY / "benchmarks" / "collectives.py"
# Keys that make a named model tiny.
TINY = ("model.d_model=32", "model.n_layers=1", "model.n_heads=2", "model.n_kv_heads=1", "model.vocab_size=128")


@pytest.mark.slow
def test_overhead_prints_a_line_per_pair_and_a_table() -> None:
    done = benchmark(OVERHEAD, "--config", str(commands.DEBUG_CONFIG), "--pairs", "2", "--steps", "2")
    pairs = [json.loads(line) for line in done.stdout.splitlines()]
    assert [pair["pair"] for pair in pairs] == [1, 2]
    for pair in pairs:
        assert pair["ratio"] == pytest.approx(pair["ours"] / pair["bare"], rel=1e-3)
    assert "the claim, a ratio of at least 0.98: median" in done.stderr


@pytest.mark.slow
def test_prepare_prints_a_line_per_case_and_pair_and_a_table() -> None:
    done = benchmark(PREPARE, "--megabytes", "1", "--pairs", "2", "--tokenizer", "byte", "--workers", "1")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(row["case"], row["pair"]) for row in rows] == [("jsonl", 1), ("jsonl", 2), ("text", 1), ("text", 2)]
    for row in rows:
        assert row["ratio"] == pytest.approx(row["ours"] / row["bare"], rel=0.02)
    assert "the claim: a ratio of at least 0.8" in done.stderr


@pytest.mark.slow
def test_data_prints_a_line_per_case_and_a_table() -> None:
    done = benchmark(DATA, "--rows", "2", "3", "--seq-len", "64", "--tokens", "10000", "--turns", "3")
    cases = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(case["rows"], case["order"]) for case in cases] == [
        (2, "shuffle"),
        (2, "random"),
        (3, "shuffle"),
        (3, "random"),
    ]
    for case in cases:
        assert min(case[name] for name in ("ours", "nanogpt", "copy", "over_nanogpt", "over_copy")) > 0
    assert "the goal: at least 5.0 over nanogpt" in done.stderr


@pytest.mark.slow
def test_checkpoint_prints_a_line_per_save_and_a_table() -> None:
    done = benchmark(CHECKPOINT, "--saves", "2", "--d-model", "64", "--layers", "2", "--tokens", "512")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["save"] for row in rows] == [1, 2]
    assert all(row[name] > 0 for row in rows for name in ("stall", "slower", "bandwidth", "megabytes"))
    assert "stall" in done.stderr


@pytest.mark.slow
def test_train_prints_a_line_per_case_and_a_table() -> None:
    sizes = ("--rounds", "1", "--steps", "1", "--batch", "2", "--seq-len", "16", "24")
    done = benchmark(TRAIN, "--models", "llama-cpu", "--precision", "fp32", *sizes, *TINY)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(row["model"], row["seq_len"], row["batch"]) for row in rows] == [
        ("llama-cpu", 16, 2),
        ("llama-cpu", 24, 2),
    ]
    for row in rows:
        assert row["loss"] == pytest.approx(row["bare_loss"], rel=1e-5), "the same model"
        assert row["ratio"] == pytest.approx(row["ours"] / row["bare"], rel=1e-3)
        assert row["memory"] == pytest.approx(row["peak"] / row["bare_peak"], rel=1e-3)
        assert row["of_matmul"] / row["bare_of_matmul"] == pytest.approx(row["ratio"], rel=1e-3)
    assert "bare tok/s" in done.stderr


@pytest.mark.slow
def test_a_profile_has_a_table_for_each_of_the_two() -> None:
    sizes = ("--rounds", "1", "--steps", "1", "--batch", "2", "--seq-len", "16")
    keys = [key for key in TINY if "kv" not in key]
    done = benchmark(TRAIN, "--models", "gpt2-cpu", "--precision", "bf16", "--profile", *sizes, *keys)
    (row,) = [json.loads(line) for line in done.stdout.splitlines()]
    assert row["loss"] == pytest.approx(row["bare_loss"], rel=1e-3)
    assert all(f"gpt2-cpu, bf16, {who}\noperator" in done.stderr for who in ("ours", "bare"))


def test_loss_prints_a_line_per_case_and_a_table() -> None:
    sizes = ("--tokens", "64", "--d-model", "16", "--vocabulary", "200")
    done = benchmark(LOSS, *sizes, "--rounds", "1", "--precision", "fp32")
    whole, head = [json.loads(line) for line in done.stdout.splitlines()]
    assert (whole["case"], head["case"]) == ("whole", "head")
    assert head["ratio"] == pytest.approx(whole["seconds"] / head["seconds"], rel=1e-3)
    assert (head["loss"], head["grad_norm"]) == pytest.approx((whole["loss"], whole["grad_norm"]), rel=1e-5)
    assert "of matmul" in done.stderr


@pytest.mark.slow
def test_attention_prints_a_line_per_kernel_and_marks_the_chosen_one() -> None:
    sizes = ("--seq-len", "16", "--precision", "fp32", "--batch", "2", "--heads", "2", "--kv-heads", "1")
    done = benchmark(ATTENTION, *sizes, "--head-dim", "16", "--rounds", "1")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    masks = ("causal", "prefix", "documents", "bidirectional")
    by_mask = {mask: {row["kernel"]: row for row in rows if row["mask"] == mask} for mask in masks}
    assert sum(map(len, by_mask.values())) == len(rows)
    for kernels in by_mask.values():
        (chosen,) = [row for row in kernels.values() if row["chosen"]]
        assert kernels["math"]["ratio"] == pytest.approx(chosen["seconds"] / kernels["math"]["seconds"], rel=1e-3)
    pairs = {"causal": 136, "prefix": 136 + 6, "documents": 4 * 10, "bidirectional": 256}
    for mask, count in pairs.items():
        row = by_mask[mask]["math"]
        assert row["tflops"] * row["seconds"] * 1e12 == pytest.approx(14 * 16 * 2 * 2 * count, rel=1e-3)
    assert "*: what the model chooses" in done.stderr


def test_optimizer_prints_a_line_per_way_and_a_table() -> None:
    done = benchmark(OPTIMIZER, "--models", "llama-cpu", "--rounds", "1", *TINY)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    ways = ["fused", "foreach", "for-loop", "bf16 moments", "muon", "norm", "scale", "clip_grad_norm_"]
    assert [row["way"] for row in rows] == ways
    for row in rows:
        assert row["ratio"] == pytest.approx(rows[0]["seconds"] / row["seconds"], rel=1e-3)
        assert row["of_copy"] == pytest.approx(row["bytes_per_second"] / row["copy"], rel=1e-3)
    assert rows[0]["bytes_per_second"] * rows[0]["seconds"] == pytest.approx(28 * rows[0]["parameters"], rel=1e-3)
    assert "copy's GB/s" in done.stderr


@pytest.mark.slow
def test_layouts_prints_a_line_per_layout_with_its_share_of_the_ideal() -> None:
    cases = ("--layouts", "dp_shard", "muon", "--rounds", "1", "--steps", "1")
    done = benchmark(LAYOUTS, *cases, *TINY, "model.n_kv_heads=2", "data.seq_len=32")
    rows = {row["layout"]: row for row in map(json.loads, done.stdout.splitlines())}
    assert list(rows) == ["ideal", "ideal muon", "dp_shard", "muon"]
    for layout, ideal in (("dp_shard", "ideal"), ("muon", "ideal muon")):
        ratio = rows[layout]["tokens_per_second"] / rows[ideal]["tokens_per_second"]
        assert rows[layout]["ratio"] == pytest.approx(ratio, rel=1e-3)
    assert "of ideal" in done.stderr


@pytest.mark.slow
def test_startup_prints_a_line_per_stage_and_what_is_imported() -> None:
    done = benchmark(STARTUP, "--rounds", "1", "--top", "3")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    stages = {row["stage"]: row for row in rows if "stage" in row}
    assert list(stages)[:3] == ["interpreter", "torch", "imports"]
    first = list(stages).index("first_step") + 1
    summary = rows[-1]
    assert summary["to_first_step"] == pytest.approx(
        sum(row["seconds"] for row in list(stages.values())[:first]), rel=1e-3
    )
    assert 0 < summary["ours"] < summary["own"] < summary["to_first_step"]
    assert next(row["package"] for row in rows if "package" in row) == "torch"
    assert len([row for row in rows if "module" in row]) == 3
    assert "our own code" in done.stderr


def test_write_keeps_the_rows_with_the_machine_and_the_command(tmp_path: Path) -> None:
    done = benchmark(OPTIMIZER, "--models", "gpt2-cpu", "--rounds", "1", "--write", str(tmp_path), "model.n_layers=1")
    (kept,) = tmp_path.glob("optimizer-*.json")
    written = json.loads(kept.read_text())
    assert written["rows"] == [json.loads(line) for line in done.stdout.splitlines()]
    assert written["command"].startswith("python benchmarks/optimizer.py --models gpt2-cpu")
    assert {"cpu", "cores", "torch", "python", "git_commit"} <= set(written["machine"])
    assert str(REPOSITORY) not in json.dumps(written)


def benchmark(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, program, *arguments],
        env=commands.environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=commands.LIMIT_SECONDS,
        check=True,
    )


@pytest.mark.slow
def test_engines_prints_a_line_per_case_and_a_table() -> None:
    small = {"rounds": 1, "steps": 1, "d-model": 48, "layers": 1, "vocabulary": 64, "seq-len": 16}
    done = benchmark(ENGINES, *(word for name, value in small.items() for word in (f"--{name}", str(value))))
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(rows) == 8
    assert len({round(row["loss"], 4) for row in rows}) == 1, "the same work"
    assert all(row["wire_bytes"] > 0 for row in rows)
    assert "| deepspeed, stage 3 |" in done.stderr


@pytest.mark.slow
def test_recovery_prints_a_line_per_fault_and_a_table() -> None:
    done = benchmark(RECOVERY, "--faults", "kill", "--steps", "30", "--at", "8")
    (row,) = [json.loads(line) for line in done.stdout.splitlines()]
    assert row["fault"] == "kill"
    assert row["steps_lost"] == 3
    assert row["recovery_seconds"] > 0
    assert 0 < row["goodput"] < 1
    assert "to the next step, s" in done.stderr


@pytest.mark.skipif(torch.version.cuda is not None, reason="a GPU is pretended by torch's CPU build alone")
@pytest.mark.parametrize("ranks", [1, 8])
def test_memory_traces_a_rank_of_any_layout(ranks: int) -> None:
    """Weights and moments in fp32 are 12 bytes a parameter, over the ranks; the rest is what a step needs besides."""
    keys = (*TINY, "model.d_ff=96", "model.vocab_size=4096", "data.global_batch=8", "data.seq_len=64")
    done = benchmark(MEMORY, "--models", "llama-cpu", "--ranks", str(ranks), "--recompute", "none", "full", *keys)
    none, full = (json.loads(line) for line in done.stdout.splitlines())
    # Embedding and head; q and out; k and v, with half the heads; three matrices of the feed-forward; three norms.
    parameters = 2 * 4096 * 32 + 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 96 + 3 * 32
    for row in (none, full):
        assert row["weights"] == pytest.approx(12 * parameters / ranks, rel=0.01)
        assert row["weights"] < row["peak"] < row["whole"]
        assert row["tokens"] == 8 * 64 // ranks
    assert full["peak"] < none["peak"]
    assert f"one of {ranks} GPUs, traced" in done.stderr


def test_collectives_prints_a_line_per_kind_and_size() -> None:
    done = benchmark(COLLECTIVES, "--megabytes", "0.01", "0.1", "--rounds", "1")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    kinds = ["all_reduce", "all_gather", "reduce_scatter", "gather by messages", "reduce by messages"]
    assert [(row["kind"], row["bytes"]) for row in rows] == [(kind, size) for size in (10**4, 10**5) for kind in kinds]
    for row in rows:
        twice = 2 if row["kind"] == "all_reduce" else 1
        assert row["rate"] == pytest.approx(twice * row["bytes"] / 2 / row["seconds"] / 1e9, rel=1e-3)
