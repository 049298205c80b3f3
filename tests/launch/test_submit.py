"""The batch script passes the options to sbatch and the overrides to the run; errors are reported before submission."""

import shutil
import subprocess
from pathlib import Path

import pytest

from dist_llm.errors import ConfigError
from dist_llm.launch.submit import (
    SCRIPT_FILE,
    SlurmJob,
    list_run_directories,
    parse_sweep,
    render_batch_script,
    submit_script,
)

CONFIG_FILE = Path("configs/debug.yaml")


def read_sbatch_options(script: str) -> list[str]:
    """Return the options that sbatch reads, which stand before the first command."""
    sbatch_options = []
    for line in script.splitlines():
        if line.startswith("#SBATCH "):
            sbatch_options.append(line.removeprefix("#SBATCH "))
        elif line and not line.startswith("#"):
            break
    return sbatch_options


def read_run_arguments(script: str, number: str = "") -> list[str]:
    """Return the arguments of the run, as the shell evaluates the script."""
    lines = [line for line in script.splitlines() if line.startswith(("run_", "declare -n arguments"))]
    program = "\n".join([*lines, 'printf "%s\\n" "${arguments[@]}"'])
    completed = subprocess.run(
        ["bash", "-c", program], env={"SLURM_ARRAY_TASK_ID": number} if number else {}, capture_output=True, text=True
    )
    assert not completed.stderr
    return completed.stdout.splitlines()


def test_sbatch_options_come_before_the_first_command() -> None:
    script = render_batch_script(
        SlurmJob(CONFIG_FILE, nodes=4, tasks_per_node=8, sbatch_options=("--time=1:00:00",)), ["runs/a"]
    )
    assert read_sbatch_options(script)[-3:] == ["--nodes=4", "--ntasks-per-node=8", "--time=1:00:00"]
    assert "--signal=USR1@180" in read_sbatch_options(script)
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0


def test_overrides_are_passed_to_the_run_unchanged() -> None:
    job = SlurmJob(CONFIG_FILE, ("eval.sample_prompt=a 'b' $HOME", "optim.lr=1e-3"))
    assert read_run_arguments(render_batch_script(job, ["runs/a b"])) == [
        "configs/debug.yaml", "eval.sample_prompt=a 'b' $HOME", "optim.lr=1e-3", "run.dir=runs/a b"
    ]  # fmt: skip


def test_a_sweep_becomes_a_job_array() -> None:
    job = SlurmJob(CONFIG_FILE, ("run.steps=2",), sweep=parse_sweep(["optim.lr=1e-3,3e-4", "init_from=a/b"]))
    run_dirs = list_run_directories(job, "runs/x")
    assert run_dirs == ["runs/x/lr=1e-3_init_from=a-b", "runs/x/lr=3e-4_init_from=a-b"]
    script = render_batch_script(job, run_dirs)
    assert read_sbatch_options(script)[-2:] == ["--array=0-1", "--output=slurm-%A_%a.log"]
    assert read_run_arguments(script, "1") == [
        "configs/debug.yaml", "run.steps=2", "optim.lr=3e-4", "init_from=a/b", "run.dir=runs/x/lr=3e-4_init_from=a-b"
    ]  # fmt: skip


@pytest.mark.parametrize("argument", ["optim.lr", "=1", "optim.lr="])
def test_a_sweep_without_values_is_refused(argument: str) -> None:
    with pytest.raises(ConfigError, match="give a key and its values"):
        parse_sweep([argument])


def test_a_missing_sbatch_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match="sbatch is not on PATH"):
        submit_script("")


def test_the_slurm_scripts_equal_those_of_the_package() -> None:
    repository = SCRIPT_FILE.parents[3]
    for name in ("train.sbatch", "debug.sbatch"):
        assert (repository / "slurm" / name).read_text() == (SCRIPT_FILE.parent / name).read_text()
