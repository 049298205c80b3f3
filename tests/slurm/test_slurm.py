"""Jobs on a real Slurm train, are requeued before their time limit, and end with the results of a torchrun job."""

import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e import commands
from tests.e2e.compare_runs import assert_same_metrics, assert_same_weights
from tests.slurm.cluster import Cluster, find_obstacle, running_cluster

BATCH_SCRIPT = commands.REPOSITORY / "slurm" / "train.sbatch"
DEBUG_SCRIPT = commands.REPOSITORY / "slurm" / "debug.sbatch"

pytestmark = [pytest.mark.slurm, pytest.mark.skipif(bool(find_obstacle()), reason=find_obstacle() or "no obstacle")]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A Slurm cluster, started once for all tests."""
    base, work_dir = (tmp_path_factory.mktemp(name) for name in ("slurm", "work"))
    with running_cluster(base, work_dir=work_dir) as started_cluster:
        yield started_cluster


def make_python_command(*arguments: str) -> str:
    """Return a Python command that runs these arguments in place of the module dist_llm (substitute_module.py)."""
    return f"{sys.executable} {Path(__file__).with_name('substitute_module.py')} {','.join(arguments)}"


def make_paced_command(delay_seconds: float) -> str:
    """Return a Python command whose training steps take `delay_seconds` longer."""
    return make_python_command("tests.e2e.run_slowly", str(delay_seconds))


def make_script_arguments(corpus: Path, run: str, steps: int) -> tuple[object, ...]:
    """Return the arguments of the batch script."""
    return commands.make_train_arguments(corpus, f"run.dir={run}", f"run.steps={steps}")[1:]


def train_uninterrupted(corpus: Path, directory: Path, steps: int, ranks: int) -> Path:
    """Train the same configuration without interruption under torchrun; return the run directory."""
    return commands.train(directory, corpus, f"run.steps={steps}", ranks=ranks)


def assert_same_results(run: Path, expected: Path) -> None:
    """Raise AssertionError unless losses and weights are equal."""
    assert_same_metrics(run, expected)
    assert_same_weights(run, expected)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_nodes_stopped_by_their_time_limit_end_with_equal_results(
    cluster: Cluster, corpus: Path, tmp_path: Path
) -> None:
    steps, run = 60, "limited"  # 60 steps take longer than the time limit of the job on any machine
    limits = ("--nodes=2", "--ntasks-per-node=2", "--time=1", "--signal=USR1@40")
    job = cluster.submit(
        *limits, BATCH_SCRIPT, *make_script_arguments(corpus, run, steps), PYTHON=make_paced_command(1)
    )
    fields = cluster.wait(job, timeout_seconds=540)
    log = cluster.read_log(job)
    assert fields["JobState"] == "COMPLETED", log
    assert int(fields["Restarts"]) >= 2, log
    assert log.count("stopped by SIGUSR1") == int(fields["Restarts"]) == log.count("time limit; requeued"), (
        "a restart does not have one stop and one requeue in the log"
    )
    assert "ranks: 4 (dp_shard 4)" in log
    assert_same_results(cluster.work_dir / run, train_uninterrupted(corpus, tmp_path, steps, ranks=4))


@pytest.mark.timeout(400)
@pytest.mark.parametrize("launch", ["tasks", pytest.param("torchrun", marks=pytest.mark.slow)])
def test_a_signal_requeues_the_job_with_either_launcher(
    launch: str, cluster: Cluster, corpus: Path, tmp_path: Path
) -> None:
    steps, run = 60, f"by_{launch}"
    job = cluster.submit(
        "--nodes=2",
        "--ntasks-per-node=1",
        BATCH_SCRIPT,
        *make_script_arguments(corpus, run, steps),
        PYTHON=make_paced_command(0.15),
        LAUNCH=launch,
    )
    metrics = cluster.work_dir / run / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not metrics.exists() or metrics.read_text().count("\n") < 5:
        assert time.monotonic() < deadline, cluster.read_log(job)
        time.sleep(0.1)
    cluster.run_command("scancel", "--signal=USR1", job)
    fields = cluster.wait(job, timeout_seconds=200)
    log = cluster.read_log(job)
    assert (fields["JobState"], fields["Restarts"]) == ("COMPLETED", "1"), log
    assert log.count("stopped by SIGUSR1") == 1
    assert "resumed from" in log
    assert not list(cluster.work_dir.glob(".stopped-*"))
    assert_same_results(cluster.work_dir / run, train_uninterrupted(corpus, tmp_path, steps, ranks=2))


@pytest.mark.slow
def test_nodes_may_have_different_numbers_of_tasks(cluster: Cluster, corpus: Path) -> None:
    options = ("--nodes=2", "--ntasks=3", "--ntasks-per-node=2")
    job = cluster.submit(
        *options, BATCH_SCRIPT, *make_script_arguments(corpus, "uneven", steps=3), "data.global_batch=12"
    )
    assert cluster.wait(job, timeout_seconds=120)["JobState"] == "COMPLETED", cluster.read_log(job)
    assert "ranks: 3 (dp_shard 3)" in cluster.read_log(job)
    nodes = {
        path.read_text().split(" INFO ")[0].split()[-1] for path in (cluster.work_dir / "uneven/logs").glob("*.log")
    }
    assert nodes == {"n1", "n2"}


def test_a_rank_that_raises_ends_the_job_at_once_and_is_named(cluster: Cluster, corpus: Path) -> None:
    start_time = time.monotonic()
    options = ("--nodes=2", "--ntasks-per-node=1")
    python = make_python_command("tests.e2e.run_with_fault", "raise", "1", "3")
    job = cluster.submit(*options, BATCH_SCRIPT, *make_script_arguments(corpus, "raising", steps=9), PYTHON=python)
    fields = cluster.wait(job, timeout_seconds=100)
    assert fields["JobState"] == "FAILED"
    assert fields["Restarts"] == "0"
    assert time.monotonic() - start_time < 60
    assert "rank 1 on n2, in step 3: ValueError: planted" in cluster.read_log(job)


@pytest.mark.slow
def test_the_debug_script_runs(cluster: Cluster, corpus: Path) -> None:
    job = cluster.submit(DEBUG_SCRIPT, commands.DEBUG_CONFIG, f"data.path={corpus}")
    assert cluster.wait(job, timeout_seconds=100)["JobState"] == "COMPLETED", cluster.read_log(job)
    assert "first batch" in cluster.read_log(job)


@pytest.mark.slow
def test_tasks_without_a_rendezvous_address_are_refused(cluster: Cluster, corpus: Path) -> None:
    arguments = [sys.executable, "-m", "dist_llm", "train", *map(str, make_script_arguments(corpus, "lost", steps=1))]
    output = cluster.run_command("srun", "--ntasks=2", "bash", "-c", f"{' '.join(arguments)} 2>&1; true")
    assert "MASTER_ADDR and MASTER_PORT are not set; start with: dist-llm submit" in output


@pytest.mark.slow
def test_submit_trains_each_run_of_a_sweep_in_its_own_directory(cluster: Cluster, corpus: Path) -> None:
    arguments = [sys.executable, "-m", "dist_llm", "submit"]
    arguments += [commands.DEBUG_CONFIG, f"data.path={corpus}", "run.dir=swept"]
    arguments += ["run.steps=2", "eval.windows=8", "--nodes", "2", "--sweep", "optim.lr=1e-3,3e-4", "--time", "5"]
    output = cluster.run_command(*arguments)
    assert "#SBATCH --array=0-1" in output
    job = max(int(line.split()[0].split("_")[0]) for line in cluster.run_command("squeue", "-h", "-a").splitlines())
    runs = [cluster.work_dir / "swept" / name for name in ("lr=1e-3", "lr=3e-4")]
    deadline = time.monotonic() + 120
    while not all((run / "checkpoints/step_00000002/COMMITTED").exists() for run in runs):
        logs = [path.read_text() for path in cluster.work_dir.glob(f"slurm-{job}_*.log")]
        assert time.monotonic() < deadline, logs
        time.sleep(0.3)
    assert [commands.read_step_rows(run)[-1]["lr"] for run in runs] != [commands.read_step_rows(runs[0])[-1]["lr"]] * 2


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_commands_of_the_page_run(cluster: Cluster) -> None:
    text = (commands.REPOSITORY / "docs" / "slurm.md").read_text()
    (block,) = re.findall(r"<!-- slurm -->\n```sh\n(.*?)```", text, re.DOTALL)
    for folder in ("configs", "slurm"):
        (cluster.work_dir / folder).symlink_to(commands.REPOSITORY / folder)
    cluster.run_command("bash", "-euo", "pipefail", "-c", block, timeout_seconds=120)
    deadline = time.monotonic() + 250
    while cluster.run_command("squeue", "-h").strip():
        assert time.monotonic() < deadline, cluster.run_command("squeue")
        time.sleep(0.5)
    for run, step in {"two": 4, "by_hand": 4, "swept/lr=1e-3": 2, "swept/lr=3e-4": 2}.items():
        assert (cluster.work_dir / "runs" / run / f"checkpoints/step_{step:08d}/COMMITTED").exists(), run
    assert any("first batch" in path.read_text() for path in cluster.work_dir.glob("slurm-*.log")), (
        "no log has the output of the debug script"
    )
