"""The eight-rank configs of configs/layouts, started as commands, train to the losses of one process."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dist_llm.config.check import check
from dist_llm.config.load import load_config

from . import commands
from .commands import REPOSITORY

FOLDER = REPOSITORY / "configs" / "layouts"
LAYOUTS = sorted(path.stem for path in FOLDER.glob("*.yaml") if path.stem != "one")
TIMEOUT_SECONDS = 900  # eight interpreters may share two cores


@pytest.fixture(autouse=True)
def _longer_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight ranks share the cores, so each command may take longer."""
    monkeypatch.setattr(commands, "TIMEOUT_SECONDS", TIMEOUT_SECONDS)


@pytest.fixture(scope="module")
def reference_runs(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """A cache of the runs of one process, by number of steps."""
    return {}


def train(name: str, steps: int, corpus: Path, directory: Path, ranks: int) -> Path:
    """Train configs/layouts/NAME.yaml on `ranks` processes (0: one process) and return the run directory."""
    overrides = ("run.dir=run", f"data.path={corpus}", f"run.steps={steps}", "schedule.decay_steps=50")
    commands.run("train", "--config", FOLDER / f"{name}.yaml", *overrides, ranks=ranks, cwd=directory)
    return directory / "run"


@pytest.mark.parametrize("name", ["one", *LAYOUTS])
def test_the_configs_differ_only_in_their_layout(name: str) -> None:
    config, violations = load_config(FOLDER / f"{name}.yaml")
    reference_config, _ = load_config(FOLDER / "one.yaml")
    assert config is not None
    assert reference_config is not None
    assert violations + check(config, 1 if name == "one" else 8, tokenizer_size=4096) == []
    assert config.run.dir == f"runs/layouts/{name}"
    data = config.data.model_copy(update={"micro_batch": reference_config.data.micro_batch})
    layout_sections = {"run": reference_config.run, "parallel": reference_config.parallel, "data": data}
    assert config.model_copy(update=layout_sections) == reference_config


def test_each_layout_has_three_axes() -> None:
    axes_of_layouts = [re.findall(r"([a-z]+)(\d)", name) for name in LAYOUTS]
    assert all([size for _, size in axes] == ["2", "2", "2"] for axes in axes_of_layouts)
    assert {"shard2-tp2-pp2", "replicate2-shard2-tp2", "shard2-cp2-tp2"} <= set(LAYOUTS)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("shard2-tp2-pp2", 4),
        *(pytest.param(name, 50, marks=pytest.mark.slow) for name in LAYOUTS),
    ],
)
def test_losses_are_those_of_one_process(
    name: str, steps: int, reference_runs: dict[int, Path], corpus: Path, tmp_path: Path
) -> None:
    if steps not in reference_runs:
        (tmp_path / "one").mkdir()
        reference_runs[steps] = train("one", steps, corpus, tmp_path / "one", ranks=0)
    expected = commands.read_step_rows(reference_runs[steps])
    actual = commands.read_step_rows(train(name, steps, corpus, tmp_path, ranks=8))
    assert commands.get_column(actual, "step") == commands.get_column(expected, "step") == list(range(1, steps + 1))
    assert commands.get_column(actual, "loss") == pytest.approx(commands.get_column(expected, "loss"), rel=1e-4, abs=0)
    actual_norms, expected_norms = commands.get_column(actual, "grad_norm"), commands.get_column(expected, "grad_norm")
    assert actual_norms[:20] == pytest.approx(expected_norms[:20], rel=1e-4, abs=0)
    assert actual_norms == pytest.approx(expected_norms, rel=1e-3, abs=0), (
        "the gradient norms differ by more than rounding errors"
    )
    if steps == 50:
        assert expected[-1]["loss"] < expected[0]["loss"] - 0.5, "the loss does not fall"


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_curves_writes_the_page_and_the_picture(corpus: Path, tmp_path: Path) -> None:
    completed = subprocess.run(
        [sys.executable, REPOSITORY / "benchmarks" / "curves.py", "--data", corpus, "--docs", tmp_path, "run.steps=2"],
        env=commands.make_environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=4 * TIMEOUT_SECONDS,
    )
    assert completed.returncode == 0, completed.stderr
    lines = [json.loads(line) for line in completed.stdout.splitlines()]
    assert [line["layout"] for line in lines] == LAYOUTS
    assert all(line["ranks"] == 8 and 0 <= line["loss"] < 1e-4 for line in lines)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    rows = re.findall(r"^\| ([\w-]+) \| \d \| ", (tmp_path / "curves.md").read_text(), re.MULTILINE)
    assert rows == ["one", *LAYOUTS]
