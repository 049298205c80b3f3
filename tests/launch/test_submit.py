"""A batch script says what was asked, to sbatch and to the run; what is wrong is known before anything is queued."""

import subprocess
from pathlib import Path

import pytest

from dist_llm.errors import ConfigError
from dist_llm.launch import submit as submitting
from dist_llm.launch.submit import SCRIPT, Job, directories, parse_sweep, render, submit

CONFIG = Path("configs/debug.yaml")


def options(script: str) -> list[str]:
    """Those that sbatch reads: up to the first command."""
    found = []
    for line in script.splitlines():
        if line.startswith("#SBATCH "):
            found.append(line.removeprefix("#SBATCH "))
        elif line and not line.startswith("#"):
            break
    return found


def arguments(script: str, number: str = "") -> list[str]:
    """What a run is given, by the shell's own reading of the script."""
    lines = [line for line in script.splitlines() if line.startswith(("run_", "declare -n arguments"))]
    program = "\n".join([*lines, 'printf "%s\\n" "${arguments[@]}"'])
    done = subprocess.run(
        ["bash", "-c", program], env={"SLURM_ARRAY_TASK_ID": number} if number else {}, capture_output=True, text=True
    )
    assert not done.stderr
    return done.stdout.splitlines()


def test_what_is_asked_comes_last_and_before_any_command() -> None:
    script = render(Job(CONFIG, nodes=4, tasks_per_node=8, options=("--time=1:00:00",)), ["runs/a"])
    assert options(script)[-3:] == ["--nodes=4", "--ntasks-per-node=8", "--time=1:00:00"]
    assert "--signal=USR1@180" in options(script)
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0


def test_overrides_reach_the_run_as_they_are() -> None:
    job = Job(CONFIG, ("eval.sample_prompt=a 'b' $HOME", "optim.lr=1e-3"))
    assert arguments(render(job, ["runs/a b"])) == [
        "configs/debug.yaml", "eval.sample_prompt=a 'b' $HOME", "optim.lr=1e-3", "run.dir=runs/a b"
    ]  # fmt: skip


def test_a_sweep_is_an_array_of_all_combinations() -> None:
    job = Job(CONFIG, ("run.steps=2",), sweep=parse_sweep(["optim.lr=1e-3,3e-4", "init_from=a/b"]))
    places = directories(job, "runs/x")
    assert places == ["runs/x/lr=1e-3_init_from=a-b", "runs/x/lr=3e-4_init_from=a-b"]
    script = render(job, places)
    assert options(script)[-2:] == ["--array=0-1", "--output=slurm-%A_%a.log"]
    assert arguments(script, "1") == [
        "configs/debug.yaml", "run.steps=2", "optim.lr=3e-4", "init_from=a/b", "run.dir=runs/x/lr=3e-4_init_from=a-b"
    ]  # fmt: skip


@pytest.mark.parametrize("word", ["optim.lr", "=1", "optim.lr="])
def test_a_sweep_without_values_is_refused(word: str) -> None:
    with pytest.raises(ConfigError, match="give a key and its values"):
        parse_sweep([word])


def test_without_slurm_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submitting.shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match="sbatch is not on PATH"):
        submit("")


def test_the_scripts_in_slurm_are_those_of_the_package() -> None:
    repository = SCRIPT.parents[3]
    for name in ("train.sbatch", "debug.sbatch"):
        assert (repository / "slurm" / name).read_text() == (SCRIPT.parent / name).read_text()
