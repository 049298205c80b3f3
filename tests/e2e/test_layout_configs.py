"""The eight-rank configs of configs/layouts train what one process trains, as the command starts them."""

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
LIMIT_SECONDS = 900  # eight interpreters may share two cores


@pytest.fixture(autouse=True)
def _more_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "LIMIT_SECONDS", LIMIT_SECONDS)


@pytest.fixture(scope="module")
def one(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The runs of one process, by number of steps: made once, only to be read."""
    return {}


def train(name: str, steps: int, corpus: Path, directory: Path, ranks: int) -> Path:
    overrides = ("run.dir=run", f"data.path={corpus}", f"run.steps={steps}", "schedule.decay_steps=50")
    commands.run("train", "--config", FOLDER / f"{name}.yaml", *overrides, ranks=ranks, cwd=directory)
    return directory / "run"


@pytest.mark.parametrize("name", ["one", *LAYOUTS])
def test_a_layout_fits_its_world_and_differs_from_one_in_the_layout_alone(name: str) -> None:
    config, violations = load_config(FOLDER / f"{name}.yaml")
    one, _ = load_config(FOLDER / "one.yaml")
    assert config is not None
    assert one is not None
    assert violations + check(config, 1 if name == "one" else 8, 4096) == []
    assert config.run.dir == f"runs/layouts/{name}"
    micro = {"micro_batch": one.data.micro_batch}
    same = {"run": one.run, "parallel": one.parallel, "data": config.data.model_copy(update=micro)}
    assert config.model_copy(update=same) == one


def test_three_axes_each() -> None:
    words = [re.findall(r"([a-z]+)(\d)", name) for name in LAYOUTS]
    assert all([size for _, size in word] == ["2", "2", "2"] for word in words)
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
    name: str, steps: int, one: dict[int, Path], corpus: Path, tmp_path: Path
) -> None:
    if steps not in one:
        (tmp_path / "one").mkdir()
        one[steps] = train("one", steps, corpus, tmp_path / "one", ranks=0)
    want = commands.metrics(one[steps])
    got = commands.metrics(train(name, steps, corpus, tmp_path, ranks=8))
    assert commands.column(got, "step") == commands.column(want, "step") == list(range(1, steps + 1))
    assert commands.column(got, "loss") == pytest.approx(commands.column(want, "loss"), rel=1e-4, abs=0)
    got_norms, want_norms = commands.column(got, "grad_norm"), commands.column(want, "grad_norm")
    assert got_norms[:20] == pytest.approx(want_norms[:20], rel=1e-4, abs=0)
    assert got_norms == pytest.approx(want_norms, rel=1e-3, abs=0), "rounding grows with the steps"
    if steps == 50:
        assert want[-1]["loss"] < want[0]["loss"] - 0.5, "it learns"


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_program_that_draws_the_curves(corpus: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, REPOSITORY / "benchmarks" / "curves.py", "--data", corpus, "--docs", tmp_path, "run.steps=2"],
        env=commands.environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=4 * LIMIT_SECONDS,
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["layout"] for line in lines] == LAYOUTS
    assert all(line["ranks"] == 8 and 0 <= line["loss"] < 1e-4 for line in lines)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    rows = re.findall(r"^\| ([\w-]+) \| \d \| ", (tmp_path / "curves.md").read_text(), re.MULTILINE)
    assert rows == ["one", *LAYOUTS]
