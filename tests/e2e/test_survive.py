"""After any failure around a save, the next start resumes and ends with the results of an uninterrupted run."""

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
from .conftest import ONE, SHARDED, Layout
from .test_kill import assert_same_weights

CHECKPOINT_EVERY, STEPS = 2, 20


def newest_committed(run: Path) -> int:
    """Return the newest saved step; 0 if there is none."""
    return max((int(path.parent.name[5:]) for path in (run / "checkpoints").glob("step_*/COMMITTED")), default=0)


@pytest.mark.parametrize(
    ("layout", "kills"),
    [
        (ONE, 4),
        (SHARDED, 1),
        pytest.param(ONE, 80, marks=pytest.mark.slow),
        pytest.param(SHARDED, 20, marks=pytest.mark.slow),
    ],
    ids=str,
)
@pytest.mark.timeout(3600)
def test_kills_around_saves(
    layout: Layout, kills: int, uninterrupted_run: Callable[[Layout], Path], corpus: Path, tmp_path: Path
) -> None:
    """`kill -9` within a tenth of a second after the start of a save loses at most this save."""
    draw, num_left = random.Random(kills), kills
    for number in count():
        directory = tmp_path / str(number)
        directory.mkdir()
        run = directory / "run"
        arguments = commands.train_arguments(corpus, *layout.overrides, f"checkpoint.every={CHECKPOINT_EVERY}")
        while num_left and (target := newest_committed(run) + CHECKPOINT_EVERY * draw.randint(1, 2)) < STEPS:
            before = newest_committed(run)
            kill_after(draw.random() * 0.1, run, target, arguments, layout.ranks, directory)
            num_left -= 1
            assert newest_committed(run) >= target - CHECKPOINT_EVERY
            if before:
                assert f"resumed from run/checkpoints/step_{before:08d}" in (directory / "killed.txt").read_text()
        resumes = bool(newest_committed(run))
        completed = commands.run(*arguments, ranks=layout.ranks, cwd=directory)
        assert ("resumed from" in completed.stderr) == resumes
        expected = uninterrupted_run(layout)
        for name in ("step", "loss", "grad_norm"):
            assert commands.column(commands.read_metrics(run), name) == commands.column(
                commands.read_metrics(expected), name
            ), name
        assert_same_weights(run, expected)
        if not num_left:
            return


def kill_after(
    seconds: float, run: Path, step: int, arguments: tuple[object, ...], ranks: int, directory: Path
) -> None:
    """Kill the command this many seconds after it starts to save `step`."""
    folder, start_time = run / "checkpoints" / f"step_{step:08d}", 0.0
    previous_folder = folder_identity(folder)

    def ready() -> bool:
        nonlocal start_time
        if not start_time and folder_identity(folder) not in (None, previous_folder):
            start_time = time.monotonic()
        return bool(start_time) and time.monotonic() > start_time + seconds

    commands.kill_when(ready, arguments, ranks, directory)


def folder_identity(folder: Path) -> tuple[int, int] | None:
    """Return the identity of a folder, which differs from an earlier folder of the same name."""
    try:
        return (status := folder.stat()).st_ino, status.st_ctime_ns
    except FileNotFoundError:
        return None


def test_a_damaged_checkpoint_is_skipped_for_the_one_before_it(corpus: Path, tmp_path: Path) -> None:
    """With two ranks, each of which verifies a part of the hashes."""
    layout = SHARDED
    arguments = ("run.steps=4", "schedule.decay_steps=6", "checkpoint.every=2", *layout.overrides)
    run = commands.train(tmp_path, corpus, *arguments, ranks=layout.ranks)
    before = commands.column(commands.read_metrics(run), "loss")
    file = max(commands.latest_checkpoint(run).glob("*.distcp"), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[random.Random(0).randrange(len(content))] ^= 1
    file.write_bytes(content)

    longer_run = commands.train_arguments(corpus, *arguments, "run.steps=6")
    resumed = commands.run(*longer_run, ranks=layout.ranks, cwd=tmp_path)
    assert f"step_00000004: damaged: the hash of {file.name} differs from the saved one" in resumed.stderr
    assert "resumed from run/checkpoints/step_00000002" in resumed.stderr
    assert commands.column(commands.read_metrics(run), "step") == [1, 2, 3, 4, 5, 6]
    assert commands.column(commands.read_metrics(run), "loss")[:4] == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a small file system with room for a few checkpoints of this model; needs root."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() or run_mount("-t", "tmpfs", "-o", "size=6m", "tmpfs", disk):
        pytest.skip(
            "a file system cannot be mounted here; a quota is tested in tests/checkpoint/test_checkpoint_write.py"
        )
    yield disk
    subprocess.run(["umount", disk], check=True)


def run_mount(*arguments: object) -> int:
    return subprocess.run(["mount", *map(str, arguments)], capture_output=True).returncode


def test_a_full_disk_ends_the_run_on_all_ranks_until_space_is_freed(
    small_disk: Path, corpus: Path, tmp_path: Path
) -> None:
    arguments = commands.train_arguments(
        corpus, *SHARDED.overrides, f"checkpoint.dir={small_disk}", "checkpoint.every=2", "checkpoint.keep=99"
    )
    failed = commands.run(*arguments, ranks=2, cwd=tmp_path, succeed=False)
    assert failed.returncode != 0
    assert "No space left on device" in common_error(tmp_path / "run")
    saved = sorted(small_disk.glob("step_*"))
    assert saved
    assert all((path / "COMMITTED").exists() for path in saved), (
        "older checkpoints are complete, and the failed one is removed"
    )

    assert run_mount("-o", "remount,size=400m", small_disk) == 0
    resumed = commands.run(*arguments, ranks=2, cwd=tmp_path)
    assert f"resumed from {saved[-1]}" in resumed.stderr
    assert (small_disk / "step_00000020" / "COMMITTED").exists()


def common_error(run: Path) -> str:
    """Return the message of the failed save, which must be the same on both ranks."""
    first, second = (path.read_text() for path in sorted((run / "logs").iterdir()))
    pattern = r"step_\d+: cannot be written: .*"
    assert re.findall(pattern, first)[-1] == re.findall(pattern, second)[-1]
    return str(re.findall(pattern, first)[-1])


def test_a_disk_without_room_for_a_checkpoint_is_refused_at_the_start(
    small_disk: Path, corpus: Path, tmp_path: Path
) -> None:
    arguments = commands.train_arguments(corpus, f"checkpoint.dir={small_disk}", "run.steps=2")
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
    arguments = commands.train_arguments(corpus, *overrides)
    (process,) = commands.start_processes("dist_llm", *arguments, ranks=0, cwd=tmp_path, output=log, errors=log)
    try:
        deadline = time.monotonic() + commands.LIMIT_SECONDS
        while not (run / "metrics.jsonl").exists() or len(commands.read_metrics(run)) < 3:
            assert process.is_alive(), log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        with contextlib.suppress(OSError), (small_disk / "filler").open("wb", buffering=0) as filler:
            while True:
                filler.write(bytes(4096))
        process.join(commands.LIMIT_SECONDS)
        assert process.exitcode == 2, log.read_text()
    finally:
        commands.kill_processes(commands.process_tree(process.pid))
        process.join()
    output = log.read_text()
    assert re.search(
        r"error: (\S*/run/\S+|a file in run\.dir \S+/run): No space left on device; free disk space", output
    ), output
    assert "Traceback" not in output
    assert list((tmp_path / "saved").glob("step_*/COMMITTED"))


def test_a_changed_checkpoint_directory_does_not_restart_the_run(corpus: Path, tmp_path: Path) -> None:
    commands.train(tmp_path, corpus, "run.steps=2")
    arguments = commands.train_arguments(corpus, "run.steps=4", "checkpoint.dir=other")
    refused = commands.run(*arguments, cwd=tmp_path, succeed=False)
    assert refused.returncode == 2
    assert "has its checkpoints in run/checkpoints, and none in other" in refused.stderr


REMOTE = """
import sys
from dist_llm.cli import main
for steps in (2, 4):  # fsspec's memory file system lasts as long as its process
    assert main([*sys.argv[1:], f"run.steps={steps}"]) == 0
assert main(["generate", "--checkpoint", "run", "--max-tokens", "2"]) == 0
"""


def test_checkpoints_can_be_stored_at_a_url(corpus: Path, tmp_path: Path) -> None:
    arguments = commands.train_arguments(corpus, "checkpoint.dir=memory://bucket/run", "schedule.decay_steps=6")
    completed = subprocess.run(
        [sys.executable, "-c", REMOTE, *map(str, arguments)],
        cwd=tmp_path,
        env=commands.environment() | {"HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=commands.LIMIT_SECONDS,
    )
    assert completed.returncode == 0, completed.stderr
    assert "resumed from memory://bucket/run/step_00000002" in completed.stderr
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert list((tmp_path / ".cache" / "dist_llm" / "checkpoints").glob("*/step_00000004/COMMITTED"))


def test_an_extended_run_continues_at_the_minimum_learning_rate(corpus: Path, tmp_path: Path) -> None:
    run = commands.train(tmp_path, corpus, "run.steps=6", "schedule.warmup_steps=1")
    arguments = commands.train_arguments(corpus, "run.steps=9", "schedule.warmup_steps=1")
    extended = commands.run(*arguments, cwd=tmp_path)
    floor = commands.read_metrics(run)[5]["lr"]
    assert [row["lr"] for row in commands.read_metrics(run)[5:]] == pytest.approx([floor] * 4)
    assert "run.steps is now 9: step 7 has" in extended.stderr
    assert "decay_steps: 6" in (run / "config.yaml").read_text()
