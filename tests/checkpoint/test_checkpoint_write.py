"""What is written is the state as it was when the save began; what cannot be written says so on every rank."""

import errno
import json
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from fsspec.implementations.local import LocalFileSystem
from torch.distributed.checkpoint import filesystem

from dist_llm.checkpoint import checkpoint_write, store
from dist_llm.checkpoint.checkpoint_state import Progress
from dist_llm.checkpoint.folder import WRITEBACK_BYTES, Folder, FolderWriter, _HashingFileSystem
from dist_llm.checkpoint.store import CheckpointStore
from dist_llm.config.schema import CheckpointConfig
from dist_llm.engines.native import NativeEngine
from dist_llm.errors import CheckpointError
from dist_llm.parallel.mesh import to_local
from dist_llm.train.step import train_step
from tests.laws.law import copy_full_tensor, make_batches, make_config
from tests.laws.layouts import ADAMW
from tests.laws.worlds import world

CPU = torch.device("cpu")
CONFIG = make_config(1, {}, optim=ADAMW)


def step(engine: NativeEngine, number: int) -> None:
    train_step(engine, make_batches(engine.config, engine, number), 1e-3, number)


def engine_at(steps: int) -> NativeEngine:
    engine = NativeEngine(CONFIG, CPU)
    for number in range(steps):
        step(engine, number)
    return engine


def values(engine: NativeEngine) -> dict[str, torch.Tensor]:
    return {
        name: copy_full_tensor(tensor) for name, tensor in (engine.state.weights() | engine.state.moments()).items()
    }


def loaded(folder: Folder | Path) -> dict[str, torch.Tensor]:
    engine = NativeEngine(CONFIG, CPU)
    store.load(folder, engine.state)
    return values(engine)


def equal(result: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> bool:
    assert result.keys() == want.keys()
    return all(torch.equal(result[name], want[name]) for name in want)


@pytest.fixture
def write_gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Tensors are written only once this is set."""
    go, write = threading.Event(), FolderWriter.write_data

    def late(self: FolderWriter, *arguments: object) -> object:
        assert go.wait(60)
        return write(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(FolderWriter, "write_data", late)
    yield go
    go.set()


def saved_while_training(directory: Path, write_gate: threading.Event) -> tuple[dict[str, torch.Tensor], Path]:
    """(the state when the save began, what was written after two more steps)."""
    engine, checkpoints = engine_at(2), CheckpointStore(directory)
    want = values(engine)
    checkpoints.save(engine.state, Progress(2), {})
    for number in (2, 3):
        step(engine, number)
        checkpoints.poll()
        assert checkpoints.current_write is not None, "it cannot have been written yet"
    write_gate.set()
    checkpoints.finish()
    assert not equal(values(engine), want)
    return want, directory / "step_00000002"


def test_background_save_contains_the_values_of_its_step(tmp_path: Path, write_gate: threading.Event) -> None:
    want, path = saved_while_training(tmp_path, write_gate)
    assert equal(loaded(path), want)


def test_background_save_without_staging_has_later_values(
    tmp_path: Path, write_gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        checkpoint_write.StagingBuffers,
        "copy",
        lambda _, state: {name: to_local(tensor) for name, tensor in state.items()},
    )
    want, path = saved_while_training(tmp_path, write_gate)
    assert not equal(loaded(path), want)


def test_two_saves_in_a_row_differ(tmp_path: Path) -> None:
    engine, checkpoints, want = engine_at(1), CheckpointStore(tmp_path), {}
    for number in (1, 2):
        want[number] = values(engine)
        checkpoints.save(engine.state, Progress(number), {})
        step(engine, number)
    checkpoints.finish()
    for number in (1, 2):
        assert equal(loaded(tmp_path / f"step_{number:08d}"), want[number])


def test_foreground_save_is_committed_on_return(tmp_path: Path) -> None:
    engine, checkpoints = engine_at(1), CheckpointStore(tmp_path, CheckpointConfig(background=False))
    checkpoints.save(engine.state, Progress(1), {})
    assert checkpoints.latest_verified() is not None
    assert not checkpoints.staging.buffers
    assert equal(loaded(tmp_path / "step_00000001"), values(engine))


def test_checkpoints_at_a_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "CACHE", str(tmp_path / "cache"))
    url = f"memory://{tmp_path.name}/checkpoints"
    engine, checkpoints = engine_at(1), CheckpointStore(url, CheckpointConfig(keep=2))
    for number in (1, 2, 3):
        checkpoints.save(engine.state, Progress(number), {"config.yaml": b"run: {}\n"})
        checkpoints.finish()
    assert [folder.name for folder in checkpoints.list_committed()] == ["step_00000002", "step_00000003"]
    newest = checkpoints.latest_verified()
    assert newest is not None
    assert equal(loaded(newest), values(engine))

    result = store.open_checkpoint(str(newest))
    assert result.is_relative_to(tmp_path / "cache")
    assert equal(loaded(result), values(engine))

    memory = fsspec.filesystem("memory")
    name = f"{newest.path}/__0_0.distcp"
    content = bytearray(memory.cat_file(name))
    content[len(content) // 2] ^= 1
    memory.pipe_file(name, bytes(content))
    assert checkpoints.latest_verified() == checkpoints.list_committed()[-2]


def limited_save(directory: Path, limited_rank: int) -> str:
    """The error of a save in which one rank may write no more than 4 KiB a file, and of the one after without that."""
    engine = NativeEngine(make_config(2, {}, optim=ADAMW), CPU)
    step(engine, 0)
    checkpoints = CheckpointStore(directory)
    checkpoints.save(engine.state, Progress(1), {})
    checkpoints.finish()
    _, limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    if torch.distributed.get_rank() == limited_rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit))
    begin, message = time.monotonic(), ""
    checkpoints.save(engine.state, Progress(2), {})
    try:
        checkpoints.finish()
    except CheckpointError as error:
        message = str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    assert time.monotonic() - begin < 60
    assert [folder.name for folder in checkpoints.list_committed()] == ["step_00000001"]
    checkpoints.save(engine.state, Progress(2), {})
    checkpoints.finish()
    assert [folder.name for folder in checkpoints.list_committed()] == ["step_00000001", "step_00000002"]
    return message


@pytest.mark.parametrize("rank", [0, 1])
def test_all_ranks_report_the_rank_that_cannot_write(rank: int, tmp_path: Path) -> None:
    """A quota that one rank meets. The older checkpoint stays, and the step is saved once there is room."""
    first, second = world(2).run(limited_save, tmp_path, rank)
    assert first == second
    assert f"step_00000002: cannot be written: rank {rank}: [Errno 27] File too large" in first
    assert "Free some space" in first
    assert sorted(os.listdir(tmp_path)) == ["step_00000001", "step_00000002"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_writers_thread_that_fails_is_not_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch starts more threads than the one it looks at; what one of them lacks, the others' files do not make up."""
    real, checkpoints, tried = filesystem._write_item, CheckpointStore(tmp_path), threading.Event()

    def failing(*args: Any, **keywords: Any) -> Any:
        if not threading.current_thread().name.startswith("writes "):
            tried.set()
            raise ValueError("no such luck")
        tried.wait(10)  # until the other has a file
        return real(*args, **keywords)

    monkeypatch.setattr(filesystem, "_write_item", failing)
    checkpoints.save(engine_at(1).state, Progress(1), {})
    with pytest.raises(CheckpointError, match="a thread that writes tensors failed; its error is above"):
        checkpoints.finish()
    assert tried.is_set()
    assert not checkpoints.list_committed()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_failing_thread_stops_the_other_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor makes again what the failed save has removed."""
    real, checkpoints, wrote = filesystem._write_item, CheckpointStore(tmp_path), list[float]()

    def failing(*args: Any, **keywords: Any) -> Any:
        if threading.current_thread().name.startswith("writes "):
            time.sleep(0.1)  # the other is at work
            raise ValueError("no such luck")
        time.sleep(0.02)
        result = real(*args, **keywords)
        wrote.append(time.monotonic())
        return result

    monkeypatch.setattr(filesystem, "_write_item", failing)
    checkpoints.save(engine_at(1).state, Progress(1), {})
    with pytest.raises(CheckpointError, match="no such luck"):
        checkpoints.finish()
    ended = time.monotonic()
    time.sleep(0.2)
    assert wrote
    assert max(wrote) < ended
    assert not list(tmp_path.iterdir())


def test_impossible_directory_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    engine, checkpoints = engine_at(1), CheckpointStore(tmp_path / "file" / "checkpoints")
    checkpoints.save(engine.state, Progress(1), {})
    with pytest.raises(CheckpointError, match=r"cannot be written: .*Not a directory"):
        checkpoints.finish()


MEMORY = """
import json, resource, sys
from pathlib import Path
import torch
from torch import nn
from dist_llm.checkpoint.checkpoint_state import Progress, TorchState
from dist_llm.checkpoint.store import CheckpointStore

model = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(24)))
optimizer = torch.optim.AdamW(model.parameters())
for parameter in model.parameters():
    parameter.grad = torch.zeros_like(parameter)
optimizer.step()
optimizer.zero_grad()
warm = nn.Linear(8, 8)
kept = CheckpointStore(Path(sys.argv[1]) / "warm")
kept.save(TorchState(warm, torch.optim.AdamW(warm.parameters())), Progress(1), {})
kept.finish()
before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
kept = CheckpointStore(Path(sys.argv[1]) / "large")
kept.save(TorchState(model, optimizer), Progress(1), {})
kept.finish()
peak = int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024
print(json.dumps([peak - before, 3 * sum(p.numel() * 4 for p in model.parameters())]))
"""


def test_a_save_takes_no_more_than_one_and_a_half_times_the_shard(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", MEMORY, tmp_path], capture_output=True, text=True, check=True)
    extra, shard = json.loads(done.stdout)
    assert 0.5 * shard < extra < 1.5 * shard, "copies are taken, and nothing beside them"


def test_writeback_of_a_large_file_is_advised_and_may_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    advised = []

    def decline(file: int, offset: int, length: int, advice: int) -> None:
        advised.append((offset, length, os.fstat(file).st_size))
        raise OSError(errno.EINVAL, "planted")

    monkeypatch.setattr(os, "posix_fadvise", decline)
    content = os.urandom(5 * WRITEBACK_BYTES // 2)
    files = _HashingFileSystem(LocalFileSystem())
    with files.create_stream(tmp_path / "file", "wb") as stream:
        stream.write(content)
    assert (tmp_path / "file").read_bytes() == content
    assert advised == [(0, WRITEBACK_BYTES, WRITEBACK_BYTES), (WRITEBACK_BYTES, WRITEBACK_BYTES, 2 * WRITEBACK_BYTES)]
