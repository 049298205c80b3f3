"""After a failure around a save, the next start resumes and ends with the results of an uninterrupted run."""

import contextlib
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest

from . import commands
from .compare_runs import assert_same_metrics, assert_same_weights
from .conftest import ONE_PROCESS, SHARDED, Layout

CHECKPOINT_EVERY, STEPS = 2, 20
MAX_DELAY_SECONDS = 0.1  # from the start of a save to the kill


def find_newest_committed_step(run: Path) -> int:
    """Return the step of the newest complete checkpoint; 0 without one."""
    return max((int(path.parent.name[5:]) for path in (run / "checkpoints").glob("step_*/COMMITTED")), default=0)


@pytest.mark.parametrize(
    ("layout", "num_kills"),
    [
        (ONE_PROCESS, 4),
        (SHARDED, 1),
        pytest.param(ONE_PROCESS, 80, marks=pytest.mark.slow),
        pytest.param(SHARDED, 20, marks=pytest.mark.slow),
    ],
    ids=str,
)
@pytest.mark.timeout(3600)
def test_a_kill_during_a_save_loses_at_most_this_save(
    layout: Layout, num_kills: int, uninterrupted_run: Callable[[Layout], Path], corpus: Path, tmp_path: Path
) -> None:
    """The kills (`kill -9`) happen within a tenth of a second after the start of a save."""
    rng, num_left = random.Random(num_kills), num_kills
    for run_index in count():
        directory = tmp_path / str(run_index)
        directory.mkdir()
        run = directory / "run"
        arguments = commands.make_train_arguments(corpus, *layout.overrides, f"checkpoint.every={CHECKPOINT_EVERY}")
        while num_left:
            step_before = find_newest_committed_step(run)
            save_step = step_before + CHECKPOINT_EVERY * rng.randint(1, 2)
            if save_step >= STEPS:
                break
            kill_during_save(
                run,
                save_step,
                delay_seconds=MAX_DELAY_SECONDS * rng.random(),
                arguments=arguments,
                ranks=layout.ranks,
                cwd=directory,
            )
            num_left -= 1
            assert find_newest_committed_step(run) >= save_step - CHECKPOINT_EVERY
            if step_before:
                assert f"resumed from run/checkpoints/step_{step_before:08d}" in (directory / "killed.txt").read_text()
        resumes = bool(find_newest_committed_step(run))
        completed = commands.run(*arguments, ranks=layout.ranks, cwd=directory)
        assert ("resumed from" in completed.stderr) == resumes
        expected = uninterrupted_run(layout)
        assert_same_metrics(run, expected, names=("step", "loss", "grad_norm"))
        assert_same_weights(run, expected)
        if not num_left:
            return


def kill_during_save(
    run: Path, step: int, *, delay_seconds: float, arguments: tuple[object, ...], ranks: int, cwd: Path
) -> None:
    """Start the command and kill it `delay_seconds` after it starts to save `step`."""
    folder, save_start_time = run / "checkpoints" / f"step_{step:08d}", 0.0
    previous_identity = read_folder_identity(folder)

    def is_time_to_kill() -> bool:
        nonlocal save_start_time
        if not save_start_time and read_folder_identity(folder) not in (None, previous_identity):
            save_start_time = time.monotonic()
        return bool(save_start_time) and time.monotonic() > save_start_time + delay_seconds

    commands.kill_when(is_time_to_kill, arguments, ranks=ranks, cwd=cwd)


def read_folder_identity(folder: Path) -> tuple[int, int] | None:
    """Return (inode, change time) of a folder, which differ from those of an earlier folder of the same name."""
    try:
        return (status := folder.stat()).st_ino, status.st_ctime_ns
    except FileNotFoundError:
        return None


def test_a_damaged_checkpoint_is_skipped_for_the_one_before_it(corpus: Path, tmp_path: Path) -> None:
    """The run has two ranks, each of which verifies half of the hashes."""
    layout = SHARDED
    arguments = ("run.steps=4", "schedule.decay_steps=6", "checkpoint.every=2", *layout.overrides)
    run = commands.train(tmp_path, corpus, *arguments, ranks=layout.ranks)
    before = commands.get_column(commands.read_step_rows(run), "loss")
    file = max(commands.find_latest_checkpoint(run).glob("*.distcp"), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[random.Random(0).randrange(len(content))] ^= 1
    file.write_bytes(content)

    longer_run = commands.make_train_arguments(corpus, *arguments, "run.steps=6")
    resumed = commands.run(*longer_run, ranks=layout.ranks, cwd=tmp_path)
    assert f"step_00000004: damaged: the hash of {file.name} differs from the saved one" in resumed.stderr
    assert "resumed from run/checkpoints/step_00000002" in resumed.stderr
    assert commands.get_column(commands.read_step_rows(run), "step") == [1, 2, 3, 4, 5, 6]
    assert commands.get_column(commands.read_step_rows(run), "loss")[:4] == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of 6 MB, with room for a few checkpoints of this model; needs root."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() or run_mount("-t", "tmpfs", "-o", "size=6m", "tmpfs", disk):
        pytest.skip(
            "a file system cannot be mounted here; a quota is tested in tests/checkpoint/test_checkpoint_write.py"
        )
    yield disk
    subprocess.run(["umount", disk], check=True)


def run_mount(*arguments: object) -> int:
    """Run `mount` and return its exit code."""
    return subprocess.run(["mount", *map(str, arguments)], capture_output=True).returncode


def test_a_full_disk_ends_the_run_on_all_ranks_until_space_is_freed(
    small_disk: Path, corpus: Path, tmp_path: Path
) -> None:
    arguments = commands.make_train_arguments(
        corpus, *SHARDED.overrides, f"checkpoint.dir={small_disk}", "checkpoint.every=2", "checkpoint.keep=99"
    )
    failed = commands.run(*arguments, ranks=2, cwd=tmp_path, succeed=False)
    assert failed.returncode != 0
    assert "No space left on device" in read_common_error(tmp_path / "run")
    saved = sorted(small_disk.glob("step_*"))
    assert saved
    assert all((path / "COMMITTED").exists() for path in saved), "an incomplete checkpoint remains"

    assert run_mount("-o", "remount,size=400m", small_disk) == 0
    resumed = commands.run(*arguments, ranks=2, cwd=tmp_path)
    assert f"resumed from {saved[-1]}" in resumed.stderr
    assert (small_disk / "step_00000020" / "COMMITTED").exists()


def read_common_error(run: Path) -> str:
    """Return the message of the failed save, which must be equal on both ranks."""
    pattern = r"step_\d+: cannot be written: .*"
    rank_0_message, rank_1_message = (
        re.findall(pattern, path.read_text())[-1] for path in sorted((run / "logs").iterdir())
    )
    assert rank_0_message == rank_1_message
    return str(rank_0_message)


def test_a_disk_without_room_for_a_checkpoint_is_refused_at_the_start(
    small_disk: Path, corpus: Path, tmp_path: Path
) -> None:
    arguments = commands.make_train_arguments(corpus, f"checkpoint.dir={small_disk}", "run.steps=2")
    for options, reason in (("ro", "cannot be written: Read-only file system"), ("rw,size=1m", "has room for ")):
        assert run_mount("-o", f"remount,{options}", small_disk) == 0
        failed = commands.run(*arguments, cwd=tmp_path, succeed=False)
        assert failed.returncode == 2
        assert re.search(rf"error: checkpoint\.dir: \S+ {reason}", failed.stderr), failed.stderr
        assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_full_disk_under_run_dir_ends_the_run_with_a_message(small_disk: Path, corpus: Path, tmp_path: Path) -> None:
    run, log = small_disk / "run", tmp_path / "log.txt"
    overrides = (f"run.dir={run}", f"checkpoint.dir={tmp_path}/saved", "run.steps=100000", "checkpoint.every=2")
    log.touch()
    arguments = commands.make_train_arguments(corpus, *overrides)
    (process,) = commands.start_processes("dist_llm", *arguments, ranks=0, cwd=tmp_path, output=log, errors=log)
    try:
        deadline = time.monotonic() + commands.TIMEOUT_SECONDS
        while not (run / "metrics.jsonl").exists() or len(commands.read_step_rows(run)) < 3:
            assert process.is_alive(), log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        with contextlib.suppress(OSError), (small_disk / "filler").open("wb", buffering=0) as filler:
            while True:
                filler.write(bytes(4096))
        process.join(commands.TIMEOUT_SECONDS)
        assert process.exitcode == 2, log.read_text()
    finally:
        commands.kill_processes(commands.list_process_tree(process.pid))
        process.join()
    output = log.read_text()
    assert re.search(
        r"error: (\S*/run/\S+|a file in run\.dir \S+/run): No space left on device; free disk space", output
    ), output
    assert "Traceback" not in output
    assert list((tmp_path / "saved").glob("step_*/COMMITTED"))


def test_a_changed_checkpoint_directory_does_not_restart_the_run(corpus: Path, tmp_path: Path) -> None:
    commands.train(tmp_path, corpus, "run.steps=2")
    arguments = commands.make_train_arguments(corpus, "run.steps=4", "checkpoint.dir=other")
    refused = commands.run(*arguments, cwd=tmp_path, succeed=False)
    assert refused.returncode == 2
    assert "has its checkpoints in run/checkpoints, and none in other" in refused.stderr


REMOTE_CHECKPOINT_SCRIPT = """
import sys
from dist_llm.cli import main
for steps in (2, 4):  # fsspec's memory file system lasts as long as its process
    assert main([*sys.argv[1:], f"run.steps={steps}"]) == 0
assert main(["generate", "--checkpoint", "run", "--max-tokens", "2"]) == 0
"""


def test_checkpoints_can_be_stored_at_a_url(corpus: Path, tmp_path: Path) -> None:
    arguments = commands.make_train_arguments(corpus, "checkpoint.dir=memory://bucket/run", "schedule.decay_steps=6")
    completed = subprocess.run(
        [sys.executable, "-c", REMOTE_CHECKPOINT_SCRIPT, *map(str, arguments)],
        cwd=tmp_path,
        env=commands.make_environment() | {"HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=commands.TIMEOUT_SECONDS,
    )
    assert completed.returncode == 0, completed.stderr
    assert "resumed from memory://bucket/run/step_00000002" in completed.stderr
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert list((tmp_path / ".cache" / "dist_llm" / "checkpoints").glob("*/step_00000004/COMMITTED"))


def test_an_extended_run_continues_at_the_minimum_learning_rate(corpus: Path, tmp_path: Path) -> None:
    run = commands.train(tmp_path, corpus, "run.steps=6", "schedule.warmup_steps=1")
    arguments = commands.make_train_arguments(corpus, "run.steps=9", "schedule.warmup_steps=1")
    extended = commands.run(*arguments, cwd=tmp_path)
    minimum_lr = commands.read_step_rows(run)[5]["lr"]
    assert [row["lr"] for row in commands.read_step_rows(run)[5:]] == pytest.approx([minimum_lr] * 4)
    assert "run.steps is now 9: step 7 has" in extended.stderr
    assert "decay_steps: 6" in (run / "config.yaml").read_text()
