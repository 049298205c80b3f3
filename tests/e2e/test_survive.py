"""Whatever befalls a run around its saves, the next start goes on, and ends as if nothing had happened."""

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

EVERY, STEPS = 2, 20


def committed(run: Path) -> int:
    """The newest step that is saved; 0 if there is none."""
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
    layout: Layout, kills: int, straight: Callable[[Layout], Path], corpus: Path, tmp_path: Path
) -> None:
    """`kill -9` between the begin of a save and a tenth of a second later; at most the save on its way is lost."""
    draw, left = random.Random(kills), kills
    for number in count():
        directory = tmp_path / str(number)
        directory.mkdir()
        run = directory / "run"
        arguments = commands.train_arguments(corpus, *layout.overrides, f"checkpoint.every={EVERY}")
        while left and (target := committed(run) + EVERY * draw.randint(1, 2)) < STEPS:
            before = committed(run)
            kill_after(draw.random() * 0.1, run, target, arguments, layout.ranks, directory)
            left -= 1
            assert committed(run) >= target - EVERY
            if before:
                assert f"resumed from run/checkpoints/step_{before:08d}" in (directory / "killed.txt").read_text()
        resumes = bool(committed(run))
        done = commands.run(*arguments, ranks=layout.ranks, cwd=directory)
        assert ("resumed from" in done.stderr) == resumes
        want = straight(layout)
        for name in ("step", "loss", "grad_norm"):
            assert commands.column(commands.metrics(run), name) == commands.column(commands.metrics(want), name), name
        assert_same_weights(run, want)
        if not left:
            return


def kill_after(
    seconds: float, run: Path, step: int, arguments: tuple[object, ...], ranks: int, directory: Path
) -> None:
    """Kill the command so long after it began to save `step`."""
    folder, seen = run / "checkpoints" / f"step_{step:08d}", 0.0
    left_by_another = made(folder)

    def ready() -> bool:
        nonlocal seen
        if not seen and made(folder) not in (None, left_by_another):
            seen = time.monotonic()
        return bool(seen) and time.monotonic() > seen + seconds

    commands.kill_when(ready, arguments, ranks, directory)


def made(folder: Path) -> tuple[int, int] | None:
    """What tells a folder from one of the same name before it."""
    try:
        return (found := folder.stat()).st_ino, found.st_ctime_ns
    except FileNotFoundError:
        return None


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(corpus: Path, tmp_path: Path) -> None:
    """Of two ranks, each of which reads a part of the hashes."""
    layout = SHARDED
    arguments = ("run.steps=4", "schedule.decay_steps=6", "checkpoint.every=2", *layout.overrides)
    run = commands.train(tmp_path, corpus, *arguments, ranks=layout.ranks)
    before = commands.column(commands.metrics(run), "loss")
    file = max(commands.newest(run).glob("*.distcp"), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[random.Random(0).randrange(len(content))] ^= 1
    file.write_bytes(content)

    again = commands.train_arguments(corpus, *arguments, "run.steps=6")
    resumed = commands.run(*again, ranks=layout.ranks, cwd=tmp_path)
    assert f"step_00000004: damaged: {file.name} is not what was saved" in resumed.stderr
    assert "resumed from run/checkpoints/step_00000002" in resumed.stderr
    assert commands.column(commands.metrics(run), "step") == [1, 2, 3, 4, 5, 6]
    assert commands.column(commands.metrics(run), "loss")[:4] == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system that has room for a few checkpoints of this model; root alone can make one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() or mount("-t", "tmpfs", "-o", "size=6m", "tmpfs", disk):
        pytest.skip("a file system cannot be mounted here; a quota is met in tests/checkpoint/test_checkpoint_write.py")
    yield disk
    subprocess.run(["umount", disk], check=True)


def mount(*arguments: object) -> int:
    return subprocess.run(["mount", *map(str, arguments)], capture_output=True).returncode


def test_a_full_disk_ends_the_run_on_all_ranks_and_room_lets_it_go_on(
    small_disk: Path, corpus: Path, tmp_path: Path
) -> None:
    arguments = commands.train_arguments(
        corpus, *SHARDED.overrides, f"checkpoint.dir={small_disk}", "checkpoint.every=2", "checkpoint.keep=99"
    )
    failed = commands.run(*arguments, ranks=2, cwd=tmp_path, succeed=False)
    assert failed.returncode != 0
    assert "No space left on device" in said_by_both(tmp_path / "run")
    saved = sorted(small_disk.glob("step_*"))
    assert saved
    assert all((path / "COMMITTED").exists() for path in saved), "older ones are whole, and the failed one is gone"

    assert mount("-o", "remount,size=400m", small_disk) == 0
    resumed = commands.run(*arguments, ranks=2, cwd=tmp_path)
    assert f"resumed from {saved[-1]}" in resumed.stderr
    assert (small_disk / "step_00000020" / "COMMITTED").exists()


def said_by_both(run: Path) -> str:
    """Why two ranks could not save, which is the same."""
    first, second = (path.read_text() for path in sorted((run / "logs").iterdir()))
    pattern = r"step_\d+: cannot be written: .*"
    assert re.findall(pattern, first)[-1] == re.findall(pattern, second)[-1]
    return str(re.findall(pattern, first)[-1])


def test_a_disk_that_cannot_take_one_checkpoint_is_refused_at_the_start(
    small_disk: Path, corpus: Path, tmp_path: Path
) -> None:
    arguments = commands.train_arguments(corpus, f"checkpoint.dir={small_disk}", "run.steps=2")
    for options, reason in (("ro", "cannot be written: Read-only file system"), ("rw,size=1m", "has room for ")):
        assert mount("-o", f"remount,{options}", small_disk) == 0
        failed = commands.run(*arguments, cwd=tmp_path, succeed=False)
        assert failed.returncode == 2
        assert re.search(rf"error: checkpoint\.dir: \S+ {reason}", failed.stderr), failed.stderr
        assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_full_disk_under_run_dir_alone_ends_the_run_with_a_message(
    small_disk: Path, corpus: Path, tmp_path: Path
) -> None:
    run, log = small_disk / "run", tmp_path / "log.txt"
    overrides = (f"run.dir={run}", f"checkpoint.dir={tmp_path}/saved", "run.steps=100000", "checkpoint.every=2")
    log.touch()
    arguments = commands.train_arguments(corpus, *overrides)
    (process,) = commands.start("dist_llm", *arguments, ranks=0, cwd=tmp_path, output=log, errors=log)
    try:
        until = time.monotonic() + commands.LIMIT_SECONDS
        while not (run / "metrics.jsonl").exists() or len(commands.metrics(run)) < 3:
            assert process.is_alive(), log.read_text()
            assert time.monotonic() < until
            time.sleep(0.01)
        with contextlib.suppress(OSError), (small_disk / "filler").open("wb", buffering=0) as filler:
            while True:
                filler.write(bytes(4096))
        process.join(commands.LIMIT_SECONDS)
        assert process.exitcode == 2, log.read_text()
    finally:
        commands._kill(commands._family(process.pid))
        process.join()
    said = log.read_text()
    assert re.search(
        r"error: (\S*/run/\S+|a file in run\.dir \S+/run): No space left on device; free disk space", said
    ), said
    assert "Traceback" not in said
    assert list((tmp_path / "saved").glob("step_*/COMMITTED"))


def test_checkpoints_elsewhere_are_not_begun_over(corpus: Path, tmp_path: Path) -> None:
    commands.train(tmp_path, corpus, "run.steps=2")
    arguments = commands.train_arguments(corpus, "run.steps=4", "checkpoint.dir=other")
    refused = commands.run(*arguments, cwd=tmp_path, succeed=False)
    assert refused.returncode == 2
    assert "has its checkpoints in run/checkpoints, and none in other" in refused.stderr


REMOTE = """
import sys
from dist_llm.cli import main
for steps in (2, 4):  # fsspec's memory lives as long as its process
    assert main([*sys.argv[1:], f"run.steps={steps}"]) == 0
assert main(["generate", "--checkpoint", "run", "--max-tokens", "2"]) == 0
"""


def test_checkpoints_may_lie_at_a_url(corpus: Path, tmp_path: Path) -> None:
    arguments = commands.train_arguments(corpus, "checkpoint.dir=memory://bucket/run", "schedule.decay_steps=6")
    done = subprocess.run(
        [sys.executable, "-c", REMOTE, *map(str, arguments)],
        cwd=tmp_path,
        env=commands.environment() | {"HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=commands.LIMIT_SECONDS,
    )
    assert done.returncode == 0, done.stderr
    assert "resumed from memory://bucket/run/step_00000002" in done.stderr
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert list((tmp_path / ".cache" / "dist_llm" / "checkpoints").glob("*/step_00000004/COMMITTED"))


def test_a_longer_run_goes_on_at_the_floor_of_its_rate(corpus: Path, tmp_path: Path) -> None:
    run = commands.train(tmp_path, corpus, "run.steps=6", "schedule.warmup_steps=1")
    arguments = commands.train_arguments(corpus, "run.steps=9", "schedule.warmup_steps=1")
    extended = commands.run(*arguments, cwd=tmp_path)
    floor = commands.metrics(run)[5]["lr"]
    assert [row["lr"] for row in commands.metrics(run)[5:]] == pytest.approx([floor] * 4)
    assert "run.steps is 9 now: step 7 has" in extended.stderr
    assert "decay_steps: 6" in (run / "config.yaml").read_text()
