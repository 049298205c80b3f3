"""The four commands lead from raw text to a sample, and a run writes the files that other programs rely on."""

import re
from collections.abc import Callable
from pathlib import Path

import yaml

from . import commands
from .conftest import ONE_PROCESS, Layout

DOCUMENTED_KEYS = {
    "step", "loss", "grad_norm", "lr", "tokens", "tokens_per_second", "step_seconds", "data_wait_seconds", "mfu",
    "peak_memory_bytes",
}  # fmt: skip


def test_a_run_writes_its_files(uninterrupted_run: Callable[[Layout], Path], corpus: Path) -> None:
    run = uninterrupted_run(ONE_PROCESS)
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["run"]["steps"] == 20
    assert config["data"]["path"] == str(corpus)
    assert config["model"]["vocab_size"] == 512, "the stored config is not the resolved one"
    assert list((run / "tensorboard").glob("events.out.tfevents.*"))
    assert (run / "logs" / "rank_00000.log").stat().st_size > 0
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_00000020"]
    for name in ("config.yaml", "tokenizer.json", "environment.json"):
        assert (run / "checkpoints" / "step_00000020" / name).read_bytes() == (run / name).read_bytes()


def test_metrics_have_each_step_once_with_the_documented_keys(uninterrupted_run: Callable[[Layout], Path]) -> None:
    rows = commands.read_step_rows(uninterrupted_run(ONE_PROCESS))
    assert commands.get_column(rows, "step") == list(range(1, 21))
    assert commands.get_column(rows, "tokens") == [16 * 128 * step for step in range(1, 21)]
    for row in rows:
        assert set(row) >= DOCUMENTED_KEYS
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.5, "the loss does not fall"


def test_a_run_logs_its_progress(uninterrupted_run: Callable[[Layout], Path], corpus: Path, tmp_path: Path) -> None:
    completed = commands.run(*commands.make_train_arguments(corpus, "run.steps=2"), cwd=tmp_path)
    line = r"step +1/2 +loss \d+\.\d+ +lr \S+ +grad norm \S+ +[\d,]+ tokens/s +MFU \S+% +ETA \d+:\d\d:\d\d"
    assert re.search(line, completed.stderr), completed.stderr
    assert re.search(r"step +2 +held-out loss \d+\.\d+ +perplexity \S+ +bits per byte \d+\.\d+", completed.stderr)
    assert "tensorboard --logdir" in completed.stderr


def test_evaluate_prints_the_same_numbers_at_every_world_size(
    uninterrupted_run: Callable[[Layout], Path], tmp_path: Path
) -> None:
    one_process, two_ranks = (
        commands.run("evaluate", "--checkpoint", uninterrupted_run(ONE_PROCESS), ranks=ranks, cwd=tmp_path).stdout
        for ranks in (0, 2)
    )
    assert re.search(r"loss \d+\.\d{4}.*\nperplexity \d+\.\d+\nbits per byte \d+\.\d{4}", one_process), one_process
    assert two_ranks == one_process


def test_generate_prints_each_prompt_and_is_deterministic_by_seed(
    uninterrupted_run: Callable[[Layout], Path], tmp_path: Path
) -> None:
    prompts = ("--prompt", "def ", "--prompt", "import ")
    sampling = ("--max-tokens", 16, "--temperature", 0.8, "--top-p", 0.95)
    first, same_seed, other_seed = (
        commands.run(
            "generate",
            "--checkpoint",
            uninterrupted_run(ONE_PROCESS),
            *prompts,
            *sampling,
            "--seed",
            seed,
            cwd=tmp_path,
        ).stdout
        for seed in (1, 1, 2)
    )
    assert first.startswith("def ")
    assert "\nimport " in first
    assert len(first) > len("def import ") + 8
    assert same_seed == first
    assert other_seed != first
