"""The programs in benchmarks/ print the documented rows and tables. The tests check no figure, since times vary."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from . import commands
from .commands import REPOSITORY

OVERHEAD_PROGRAM = REPOSITORY / "benchmarks" / "overhead.py"
PREPARE_PROGRAM = REPOSITORY / "benchmarks" / "prepare.py"
DATA_PROGRAM = REPOSITORY / "benchmarks" / "data.py"
RECOVERY_PROGRAM = REPOSITORY / "benchmarks" / "recovery.py"
ENGINES_PROGRAM = REPOSITORY / "benchmarks" / "engines.py"
CHECKPOINT_PROGRAM = REPOSITORY / "benchmarks" / "checkpoint.py"
TRAIN_PROGRAM = REPOSITORY / "benchmarks" / "train.py"
LOSS_PROGRAM = REPOSITORY / "benchmarks" / "loss.py"
ATTENTION_PROGRAM = REPOSITORY / "benchmarks" / "attention.py"
OPTIMIZER_PROGRAM = REPOSITORY / "benchmarks" / "optimizer.py"
LAYOUTS_PROGRAM = REPOSITORY / "benchmarks" / "layouts.py"
STARTUP_PROGRAM = REPOSITORY / "benchmarks" / "startup.py"
MEMORY_PROGRAM = REPOSITORY / "benchmarks" / "memory.py"
COLLECTIVES_PROGRAM = REPOSITORY / "benchmarks" / "collectives.py"
FAMILIES_PROGRAM = REPOSITORY / "benchmarks" / "families.py"
COORDINATE_CHECK_PROGRAM = REPOSITORY / "benchmarks" / "coordinate_check.py"
EXPERTS_PROGRAM = REPOSITORY / "benchmarks" / "experts.py"
EXPERT_CURVES_PROGRAM = REPOSITORY / "benchmarks" / "expert_curves.py"
# Overrides that make a named model tiny.
TINY = ("model.d_model=32", "model.n_layers=1", "model.n_heads=2", "model.n_kv_heads=1", "model.vocab_size=128")
WINDOW_PROGRAM = REPOSITORY / "benchmarks" / "window.py"


@pytest.mark.slow
def test_overhead_prints_a_line_per_pair_and_a_table() -> None:
    completed = run_benchmark(OVERHEAD_PROGRAM, "--config", str(commands.DEBUG_CONFIG), "--pairs", "2", "--steps", "2")
    pairs = [json.loads(line) for line in completed.stdout.splitlines()]
    assert [pair["pair"] for pair in pairs] == [1, 2]
    for pair in pairs:
        assert pair["ratio"] == pytest.approx(pair["tokens_per_second"] / pair["plain_tokens_per_second"], rel=1e-3)
    assert "the claim, a ratio of at least 0.98: median" in completed.stderr


@pytest.mark.slow
def test_prepare_prints_a_line_per_case_and_pair_and_a_table() -> None:
    completed = run_benchmark(
        PREPARE_PROGRAM, "--megabytes", "1", "--pairs", "2", "--tokenizer", "byte", "--workers", "1"
    )
    rows = [json.loads(line) for line in completed.stdout.splitlines()]
    assert [(row["case"], row["pair"]) for row in rows] == [("jsonl", 1), ("jsonl", 2), ("text", 1), ("text", 2)]
    for row in rows:
        assert row["ratio"] == pytest.approx(row["ours"] / row["bare"], rel=0.02)
    assert "the claim: a ratio of at least 0.8" in completed.stderr


@pytest.mark.slow
def test_data_prints_a_line_per_case_and_a_table() -> None:
    completed = run_benchmark(DATA_PROGRAM, "--rows", "2", "3", "--seq-len", "64", "--tokens", "10000", "--turns", "3")
    cases = [json.loads(line) for line in completed.stdout.splitlines()]
    assert [(case["rows"], case["order"]) for case in cases] == [
        (2, "shuffle"),
        (2, "random"),
        (3, "shuffle"),
        (3, "random"),
    ]
    for case in cases:
        assert min(case[name] for name in ("ours", "nanogpt", "copy", "over_nanogpt", "over_copy")) > 0
    assert "the goal: at least 5.0 over nanogpt" in completed.stderr


@pytest.mark.slow
def test_checkpoint_prints_a_line_per_save_and_a_table() -> None:
    completed = run_benchmark(CHECKPOINT_PROGRAM, "--saves", "2", "--d-model", "64", "--layers", "2", "--tokens", "512")
    rows = [json.loads(line) for line in completed.stdout.splitlines()]
    assert [row["save"] for row in rows] == [1, 2]
    assert all(row[name] > 0 for row in rows for name in ("stall", "slower", "bandwidth", "megabytes"))
    assert "stall" in completed.stderr


@pytest.mark.slow
def test_train_prints_a_line_per_case_and_a_table() -> None:
    sizes = ("--rounds", "1", "--steps", "1", "--batch", "2", "--seq-len", "16", "24")
    completed = run_benchmark(TRAIN_PROGRAM, "--models", "llama-cpu", "--precision", "fp32", *sizes, *TINY)
    rows = [json.loads(line) for line in completed.stdout.splitlines()]
    assert [(row["model"], row["seq_len"], row["batch"]) for row in rows] == [
        ("llama-cpu", 16, 2),
        ("llama-cpu", 24, 2),
    ]
    for row in rows:
        assert row["loss"] == pytest.approx(row["plain_loss"], rel=1e-5), "the plain loop computes another loss"
        assert row["ratio"] == pytest.approx(row["tokens_per_second"] / row["plain_tokens_per_second"], rel=1e-3)
        assert row["memory"] == pytest.approx(row["peak"] / row["plain_peak"], rel=1e-3)
        assert row["of_matmul"] / row["plain_of_matmul"] == pytest.approx(row["ratio"], rel=1e-3)
    assert "plain tok/s" in completed.stderr


@pytest.mark.slow
def test_a_profile_has_a_table_for_each_model() -> None:
    sizes = ("--rounds", "1", "--steps", "1", "--batch", "2", "--seq-len", "16")
    keys = [key for key in TINY if "kv" not in key]
    completed = run_benchmark(TRAIN_PROGRAM, "--models", "gpt2-cpu", "--precision", "bf16", "--profile", *sizes, *keys)
    (row,) = [json.loads(line) for line in completed.stdout.splitlines()]
    assert row["loss"] == pytest.approx(row["plain_loss"], rel=1e-3)
    assert all(f"gpt2-cpu, bf16, {source}\noperator" in completed.stderr for source in ("native", "plain"))


def test_loss_prints_a_line_per_case_and_a_table() -> None:
    sizes = ("--tokens", "64", "--d-model", "16", "--vocabulary", "200")
    completed = run_benchmark(LOSS_PROGRAM, *sizes, "--rounds", "1", "--precision", "fp32")
    full_logits, sliced_head = [json.loads(line) for line in completed.stdout.splitlines()]
    assert (full_logits["case"], sliced_head["case"]) == ("whole", "head")
    assert sliced_head["ratio"] == pytest.approx(full_logits["seconds"] / sliced_head["seconds"], rel=1e-3)
    assert (sliced_head["loss"], sliced_head["grad_norm"]) == pytest.approx(
        (full_logits["loss"], full_logits["grad_norm"]), rel=1e-5
    )
    assert "of matmul" in completed.stderr


@pytest.mark.slow
def test_attention_prints_a_line_per_kernel_and_marks_the_chosen_one() -> None:
    sizes = ("--seq-len", "16", "--precision", "fp32", "--batch", "2", "--heads", "2", "--kv-heads", "1")
    completed = run_benchmark(ATTENTION_PROGRAM, *sizes, "--head-dim", "16", "--rounds", "1")
    rows = [json.loads(line) for line in completed.stdout.splitlines()]
    masks = ("causal", "prefix", "documents", "bidirectional")
    by_mask = {mask: {row["kernel"]: row for row in rows if row["mask"] == mask} for mask in masks}
    assert sum(map(len, by_mask.values())) == len(rows)
    for kernels in by_mask.values():
        (chosen_row,) = [row for row in kernels.values() if row["chosen"]]
        assert kernels["math"]["ratio"] == pytest.approx(chosen_row["seconds"] / kernels["math"]["seconds"], rel=1e-3)
    pairs = {"causal": 136, "prefix": 136 + 6, "documents": 4 * 10, "bidirectional": 256}
    for mask, count in pairs.items():
        row = by_mask[mask]["math"]
        assert row["tflops"] * row["seconds"] * 1e12 == pytest.approx(14 * 16 * 2 * 2 * count, rel=1e-3)
    assert "*: the choice of the model" in completed.stderr


def test_coordinate_check_prints_a_table_per_parametrization() -> None:
    for option, label in (("--widths", "width"), ("--depths", "depth")):
        sizes = ("32", "64") if label == "width" else ("1", "2")
        output = run_benchmark(COORDINATE_CHECK_PROGRAM, option, *sizes).stdout
        for name in ("standard", "mup", "completep"):
            assert f"{name}, {label}" in output
        assert output.count("last block.attention") == 3


def test_window_prints_a_line_per_case_and_marks_the_chosen_one() -> None:
    sizes = ("--seq-len", "64", "128", "--windows", "8", "S/2", "50", "100", "--rounds", "1")
    completed = run_benchmark(WINDOW_PROGRAM, *sizes, "--heads", "2", "--kv-heads", "1", "--head-dim", "8")
    rows = [json.loads(line) for line in completed.stdout.splitlines()]
    for seq_len in (64, 128):
        causal, *window_rows = [row for row in rows if row["seq_len"] == seq_len]
        assert (causal["case"], causal["window"], causal["ratio"]) == ("causal", 0, 1)
        windows = [8, 32, 50] if seq_len == 64 else [8, 50, 64, 100]
        cases = [(kernel, window) for window in windows for kernel in ("dense", "bands")]
        assert [(row["case"], row["window"]) for row in window_rows] == cases
        for row in window_rows:
            assert row["ratio"] == pytest.approx(row["seconds"] / causal["seconds"], rel=1e-3)
            assert row["chosen"] == ((row["case"] == "bands") == (2 * row["window"] <= seq_len))
        for dense, bands in zip(window_rows[::2], window_rows[1::2], strict=True):
            assert dense["of_dense"] == 1
            assert bands["of_dense"] == pytest.approx(bands["cpu_ratio"] / dense["cpu_ratio"], rel=1e-3)
    assert "*: the choice of the model" in completed.stderr


def test_window_measures_context_parallel_ranks() -> None:
    sizes = ("--cp", "2", "--seq-len", "64", "--windows", "8", "S/2", "50", "--rounds", "1", "--heads", "2")
    completed = run_benchmark(WINDOW_PROGRAM, *sizes, "--kv-heads", "1", "--head-dim", "8")
    rows = [json.loads(line) for line in completed.stdout.splitlines()]
    assert [(row["case"], row["window"]) for row in rows] == [
        ("causal", 0),
        *[(kernel, window) for window in (8, 32, 50) for kernel in ("dense", "bands")],
    ]
    assert [row["chosen"] for row in rows[1:]] == [False, True] * 3, "bands are chosen for each window"


@pytest.mark.slow
def test_experts_prints_a_line_per_case_of_each_part() -> None:
    sizes = ("model.d_model=32", "model.n_layers=1", "data.seq_len=16")
    completed = run_benchmark(EXPERTS_PROGRAM, "--rounds", "1", "--rows", "64", *sizes)
    rows = [json.loads(line) for line in completed.stdout.splitlines()]
    assert [row["part"] for row in rows] == ["products"] * 2 + ["model"] * 3 + ["bytes"] * 2
    dense, *moe_rows = rows[2:5]
    for row in moe_rows:
        assert row["ratio"] == pytest.approx(dense["seconds"] / row["seconds"], rel=1e-3)
        assert row["tokens_per_second"] * row["seconds"] == pytest.approx(4 * 16, rel=1e-3)
    for row in rows[5:]:
        assert row["ratio"] == pytest.approx(row["row_bytes"] / row["balanced_row_bytes"], rel=1e-3)
        assert row["count_bytes"] == row["balanced_count_bytes"]
    assert "rows, bytes" in completed.stderr


@pytest.mark.slow
def test_expert_curves_prints_the_held_out_losses_of_both_configs(tmp_path: Path) -> None:
    keys = ("run.steps=2", "eval.every=1", "eval.windows=4", "model.n_layers=1")
    completed = run_benchmark(EXPERT_CURVES_PROGRAM, "--data", str(tmp_path / "data"), *keys)
    dense, moe = [json.loads(line) for line in completed.stdout.splitlines() if line.startswith("{")]
    assert (dense["config"], moe["config"]) == ("demo", "demo-moe")
    assert moe["active"] == dense["parameters"] + 192 * 8
    assert list(dense["heldout_losses"]) == list(moe["heldout_losses"]) == ["1", "2"]
    assert "step" in completed.stderr


@pytest.mark.slow
def test_families_prints_a_line_per_family_and_a_table_for_the_document() -> None:
    pytest.importorskip("transformers")
    completed = run_benchmark(FAMILIES_PROGRAM)
    rows = [json.loads(line) for line in completed.stdout.splitlines()]
    assert len(rows) == 35
    assert all(row["difference"] < 1e-5 for row in rows)
    assert "| `gemma3_text` | `norm_order: sandwich`" in completed.stderr


def test_optimizer_prints_a_line_per_variant_and_a_table() -> None:
    completed = run_benchmark(OPTIMIZER_PROGRAM, "--models", "llama-cpu", "--rounds", "1", *TINY)
    rows = [json.loads(line) for line in completed.stdout.splitlines()]
    variants = ["fused", "foreach", "for-loop", "bf16 moments", "muon", "norm", "scale", "clip_grad_norm_"]
    assert [row["way"] for row in rows] == variants
    for row in rows:
        assert row["ratio"] == pytest.approx(rows[0]["seconds"] / row["seconds"], rel=1e-3)
        assert row["of_copy"] == pytest.approx(row["bytes_per_second"] / row["copy"], rel=1e-3)
    assert rows[0]["bytes_per_second"] * rows[0]["seconds"] == pytest.approx(28 * rows[0]["parameters"], rel=1e-3)
    assert "copy's GB/s" in completed.stderr


@pytest.mark.slow
def test_layouts_prints_a_line_per_layout_with_its_share_of_the_ideal() -> None:
    cases = ("--layouts", "dp_shard", "muon", "--rounds", "1", "--steps", "1")
    completed = run_benchmark(LAYOUTS_PROGRAM, *cases, *TINY, "model.n_kv_heads=2", "data.seq_len=32")
    rows = {row["layout"]: row for row in map(json.loads, completed.stdout.splitlines())}
    assert list(rows) == ["ideal", "ideal muon", "dp_shard", "muon"]
    for layout, ideal in (("dp_shard", "ideal"), ("muon", "ideal muon")):
        ratio = rows[layout]["tokens_per_second"] / rows[ideal]["tokens_per_second"]
        assert rows[layout]["ratio"] == pytest.approx(ratio, rel=1e-3)
    assert "of ideal" in completed.stderr


@pytest.mark.slow
def test_startup_prints_a_line_per_stage_and_per_imported_package() -> None:
    completed = run_benchmark(STARTUP_PROGRAM, "--rounds", "1", "--top", "3")
    rows = [json.loads(line) for line in completed.stdout.splitlines()]
    stages = {row["stage"]: row for row in rows if "stage" in row}
    assert list(stages)[:3] == ["interpreter", "torch", "imports"]
    first = list(stages).index("first_step") + 1
    summary = rows[-1]
    assert summary["to_first_step_seconds"] == pytest.approx(
        sum(row["seconds"] for row in list(stages.values())[:first]), rel=1e-3
    )
    assert 0 < summary["dist_llm_import_seconds"] < summary["dist_llm_seconds"] < summary["to_first_step_seconds"]
    assert next(row["package"] for row in rows if "package" in row) == "torch"
    assert len([row for row in rows if "module" in row]) == 3
    assert "our own code" in completed.stderr


def test_write_stores_the_rows_with_the_machine_and_the_command(tmp_path: Path) -> None:
    completed = run_benchmark(
        OPTIMIZER_PROGRAM, "--models", "gpt2-cpu", "--rounds", "1", "--write", str(tmp_path), "model.n_layers=1"
    )
    (result_file,) = tmp_path.glob("optimizer-*.json")
    written = json.loads(result_file.read_text())
    assert written["rows"] == [json.loads(line) for line in completed.stdout.splitlines()]
    assert written["command"].startswith("python benchmarks/optimizer.py --models gpt2-cpu")
    assert {"cpu", "cores", "torch", "python", "git_commit"} <= set(written["machine"])
    assert str(REPOSITORY) not in json.dumps(written)


def run_benchmark(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a benchmark program, which must succeed; return its output."""
    return subprocess.run(
        [sys.executable, program, *arguments],
        env=commands.make_environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=commands.TIMEOUT_SECONDS,
        check=True,
    )


@pytest.mark.slow
def test_engines_prints_a_line_per_case_and_a_table() -> None:
    small = {"rounds": 1, "steps": 1, "d-model": 48, "layers": 1, "vocabulary": 64, "seq-len": 16}
    completed = run_benchmark(
        ENGINES_PROGRAM, *(argument for name, value in small.items() for argument in (f"--{name}", str(value)))
    )
    rows = [json.loads(line) for line in completed.stdout.splitlines() if line.startswith("{")]
    assert len(rows) == 8
    assert len({round(row["loss"], 4) for row in rows}) == 1, "engines compute different losses"
    assert all(row["wire_bytes"] > 0 for row in rows)
    assert "| deepspeed, stage 3 |" in completed.stderr


@pytest.mark.slow
def test_recovery_prints_a_line_per_fault_and_a_table() -> None:
    completed = run_benchmark(RECOVERY_PROGRAM, "--faults", "kill", "--steps", "30", "--at", "8")
    (row,) = [json.loads(line) for line in completed.stdout.splitlines()]
    assert row["fault"] == "kill"
    assert row["steps_lost"] == 3
    assert row["recovery_seconds"] > 0
    assert 0 < row["goodput"] < 1
    assert "to the next step, s" in completed.stderr


@pytest.mark.skipif(torch.version.cuda is not None, reason="the fake GPU needs torch's CPU build")
@pytest.mark.parametrize("ranks", [1, 8])
def test_memory_traces_a_rank_of_any_layout(ranks: int) -> None:
    """Weights and moments in fp32 take 12 bytes per parameter, divided by the ranks; a step needs more memory."""
    keys = (*TINY, "model.d_ff=96", "model.vocab_size=4096", "data.global_batch=8", "data.seq_len=64")
    completed = run_benchmark(
        MEMORY_PROGRAM, "--models", "llama-cpu", "--ranks", str(ranks), "--recompute", "none", "full", *keys
    )
    none, full = (json.loads(line) for line in completed.stdout.splitlines())
    # Embedding and head; q and out; k and v with half the heads; three feed-forward matrices; three norms.
    parameters = 2 * 4096 * 32 + 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 96 + 3 * 32
    for row in (none, full):
        assert row["weights"] == pytest.approx(12 * parameters / ranks, rel=0.01)
        assert row["weights"] < row["peak"] < row["whole"]
        assert row["tokens"] == 8 * 64 // ranks
    assert full["peak"] < none["peak"]
    assert f"one of {ranks} GPUs, traced" in completed.stderr


def test_collectives_prints_a_line_per_kind_and_size() -> None:
    completed = run_benchmark(COLLECTIVES_PROGRAM, "--megabytes", "0.01", "0.1", "--rounds", "1")
    rows = [json.loads(line) for line in completed.stdout.splitlines()]
    kinds = ["all_reduce", "all_gather", "reduce_scatter", "gather by messages", "reduce by messages"]
    assert [(row["kind"], row["bytes"]) for row in rows] == [(kind, size) for size in (10**4, 10**5) for kind in kinds]
    for row in rows:
        ring_factor = 2 if row["kind"] == "all_reduce" else 1
        assert row["rate"] == pytest.approx(ring_factor * row["bytes"] / 2 / row["seconds"] / 1e9, rel=1e-3)
