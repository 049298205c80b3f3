"""A checkpoint contains the state at the start of the save; a failed write is reported on every rank."""

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
from dist_llm.checkpoint.checkpoint_folder import WRITEBACK_BYTES, CheckpointFolder, FolderWriter, _HashingFileSystem
from dist_llm.checkpoint.checkpoint_state import Progress
from dist_llm.checkpoint.store import CheckpointStore
from dist_llm.config.schema import CheckpointConfig
from dist_llm.engines.native import NativeEngine
from dist_llm.errors import CheckpointError
from dist_llm.sharded import to_local
from dist_llm.training.step import train_step
from tests.laws.law import copy_full_tensor, make_batches, make_config
from tests.laws.layouts import ADAMW
from tests.laws.worlds import get_world

CPU = torch.device("cpu")
CONFIG = make_config(ranks=1, optim=ADAMW)


def take_step(engine: NativeEngine, step: int) -> None:
    """Take a training step; `step` counts from 0."""
    train_step(engine, make_batches(engine.config, engine, step), lr=1e-3, step=step)


def build_engine_at_step(steps: int) -> NativeEngine:
    """Build an engine that has taken `steps` training steps."""
    engine = NativeEngine(CONFIG, CPU)
    for step in range(steps):
        take_step(engine, step)
    return engine


def copy_state(engine: NativeEngine) -> dict[str, torch.Tensor]:
    """Return copies of all full weights and moments by name."""
    return {
        name: copy_full_tensor(tensor) for name, tensor in (engine.state.weights() | engine.state.moments()).items()
    }


def load_state(folder: CheckpointFolder | Path) -> dict[str, torch.Tensor]:
    """Load a checkpoint into a new engine and return its full weights and moments."""
    engine = NativeEngine(CONFIG, CPU)
    store.load_checkpoint(folder, engine.state)
    return copy_state(engine)


def are_states_equal(result: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    """Return whether all tensors are equal bit for bit. The names must be equal."""
    assert result.keys() == expected.keys()
    return all(torch.equal(result[name], expected[name]) for name in expected)


@pytest.fixture
def write_gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Tensors are written only after this event is set."""
    gate, write = threading.Event(), FolderWriter.write_data

    def write_after_gate(self: FolderWriter, *arguments: object) -> object:
        assert gate.wait(60)
        return write(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(FolderWriter, "write_data", write_after_gate)
    yield gate
    gate.set()


def save_while_training(directory: Path, write_gate: threading.Event) -> tuple[dict[str, torch.Tensor], Path]:
    """Return (the state at the start of the save, the path of the checkpoint written after two more steps)."""
    engine, checkpoints = build_engine_at_step(2), CheckpointStore(directory)
    expected = copy_state(engine)
    checkpoints.save(engine.state, Progress(2), {})
    for step in (2, 3):
        take_step(engine, step)
        checkpoints.poll()
        assert checkpoints.current_write is not None, "the write has ended before its gate opened"
    write_gate.set()
    checkpoints.finish()
    assert not are_states_equal(copy_state(engine), expected)
    return expected, directory / "step_00000002"


def test_a_background_save_contains_the_values_of_its_step(tmp_path: Path, write_gate: threading.Event) -> None:
    expected, path = save_while_training(tmp_path, write_gate)
    assert are_states_equal(load_state(path), expected)


def test_a_background_save_without_staging_has_later_values(
    tmp_path: Path, write_gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        checkpoint_write.StagingBuffers,
        "copy",
        lambda _, state: {name: to_local(tensor) for name, tensor in state.items()},
    )
    expected, path = save_while_training(tmp_path, write_gate)
    assert not are_states_equal(load_state(path), expected)


def test_consecutive_saves_contain_different_values(tmp_path: Path) -> None:
    engine, checkpoints, expected = build_engine_at_step(1), CheckpointStore(tmp_path), {}
    for step in (1, 2):
        expected[step] = copy_state(engine)
        checkpoints.save(engine.state, Progress(step), {})
        take_step(engine, step)
    checkpoints.finish()
    for step in (1, 2):
        assert are_states_equal(load_state(tmp_path / f"step_{step:08d}"), expected[step])


def test_a_foreground_save_is_committed_on_return(tmp_path: Path) -> None:
    engine, checkpoints = build_engine_at_step(1), CheckpointStore(tmp_path, CheckpointConfig(background=False))
    checkpoints.save(engine.state, Progress(1), {})
    assert checkpoints.find_latest_verified() is not None
    assert not checkpoints.staging.buffers
    assert are_states_equal(load_state(tmp_path / "step_00000001"), copy_state(engine))


def test_checkpoints_can_be_at_a_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "CACHE", str(tmp_path / "cache"))
    url = f"memory://{tmp_path.name}/checkpoints"
    engine, checkpoints = build_engine_at_step(1), CheckpointStore(url, CheckpointConfig(keep=2))
    for step in (1, 2, 3):
        checkpoints.save(engine.state, Progress(step), {"config.yaml": b"run: {}\n"})
        checkpoints.finish()
    assert [folder.name for folder in checkpoints.list_committed()] == ["step_00000002", "step_00000003"]
    newest = checkpoints.find_latest_verified()
    assert newest is not None
    assert are_states_equal(load_state(newest), copy_state(engine))

    result = store.fetch_verified_checkpoint(str(newest))
    assert result.is_relative_to(tmp_path / "cache")
    assert are_states_equal(load_state(result), copy_state(engine))

    memory = fsspec.filesystem("memory")
    name = f"{newest.path}/__0_0.distcp"
    content = bytearray(memory.cat_file(name))
    content[len(content) // 2] ^= 1
    memory.pipe_file(name, bytes(content))
    assert checkpoints.find_latest_verified() == checkpoints.list_committed()[-2]


def save_with_limit(directory: Path, limited_rank: int) -> str:
    """Return the error of a save in which one rank may write at most 4 KiB per file; the next save has no limit."""
    engine = NativeEngine(make_config(ranks=2, optim=ADAMW), CPU)
    take_step(engine, step=0)
    checkpoints = CheckpointStore(directory)
    checkpoints.save(engine.state, Progress(1), {})
    checkpoints.finish()
    _, limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    if torch.distributed.get_rank() == limited_rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit))
    start_time, message = time.monotonic(), ""
    checkpoints.save(engine.state, Progress(2), {})
    try:
        checkpoints.finish()
    except CheckpointError as error:
        message = str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    assert time.monotonic() - start_time < 60
    assert [folder.name for folder in checkpoints.list_committed()] == ["step_00000001"]
    checkpoints.save(engine.state, Progress(2), {})
    checkpoints.finish()
    assert [folder.name for folder in checkpoints.list_committed()] == ["step_00000001", "step_00000002"]
    return message


@pytest.mark.parametrize("rank", [0, 1])
def test_all_ranks_name_the_rank_that_cannot_write(rank: int, tmp_path: Path) -> None:
    """One rank reaches its quota. The older checkpoint stays, and the step is saved once there is space."""
    first, second = get_world(2).run(save_with_limit, tmp_path, rank)
    assert first == second
    assert f"step_00000002: cannot be written: rank {rank}: [Errno 27] File too large" in first
    assert "Free some space" in first
    assert sorted(os.listdir(tmp_path)) == ["step_00000001", "step_00000002"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_failed_writer_thread_fails_the_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch starts more writer threads than it checks.

    The files of the other threads do not make a complete checkpoint.
    """
    original, checkpoints, failure = filesystem._write_item, CheckpointStore(tmp_path), threading.Event()

    def write_or_fail(*args: Any, **keywords: Any) -> Any:
        if not threading.current_thread().name.startswith("writes "):
            failure.set()
            raise ValueError("no such luck")
        failure.wait(10)  # until the other thread has a file
        return original(*args, **keywords)

    monkeypatch.setattr(filesystem, "_write_item", write_or_fail)
    checkpoints.save(build_engine_at_step(1).state, Progress(1), {})
    with pytest.raises(CheckpointError, match="a thread that writes tensors failed; its error is above"):
        checkpoints.finish()
    assert failure.is_set()
    assert not checkpoints.list_committed()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_failing_thread_stops_the_other_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other threads do not create files that the failed save has removed."""
    original, checkpoints, write_times = filesystem._write_item, CheckpointStore(tmp_path), list[float]()

    def write_or_fail(*args: Any, **keywords: Any) -> Any:
        if threading.current_thread().name.startswith("writes "):
            time.sleep(0.1)  # the other thread writes
            raise ValueError("no such luck")
        time.sleep(0.02)
        result = original(*args, **keywords)
        write_times.append(time.monotonic())
        return result

    monkeypatch.setattr(filesystem, "_write_item", write_or_fail)
    checkpoints.save(build_engine_at_step(1).state, Progress(1), {})
    with pytest.raises(CheckpointError, match="no such luck"):
        checkpoints.finish()
    end_time = time.monotonic()
    time.sleep(0.2)
    assert write_times
    assert max(write_times) < end_time
    assert not list(tmp_path.iterdir())


def test_a_directory_that_cannot_be_created_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    engine, checkpoints = build_engine_at_step(1), CheckpointStore(tmp_path / "file" / "checkpoints")
    checkpoints.save(engine.state, Progress(1), {})
    with pytest.raises(CheckpointError, match=r"cannot be written: .*Not a directory"):
        checkpoints.finish()


MEMORY_SCRIPT = """
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
checkpoints = CheckpointStore(Path(sys.argv[1]) / "warm")
checkpoints.save(TorchState(warm, torch.optim.AdamW(warm.parameters())), Progress(1), {})
checkpoints.finish()
before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
Path("/proc/self/clear_refs").write_text("5")  # resets the peak
checkpoints = CheckpointStore(Path(sys.argv[1]) / "large")
checkpoints.save(TorchState(model, optimizer), Progress(1), {})
checkpoints.finish()
peak = int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024
print(json.dumps([peak - before, 3 * sum(p.numel() * 4 for p in model.parameters())]))
"""


def test_a_save_needs_at_most_1_5_shards_of_extra_memory(tmp_path: Path) -> None:
    completed = subprocess.run(
        [sys.executable, "-c", MEMORY_SCRIPT, tmp_path], capture_output=True, text=True, check=True
    )
    extra_bytes, shard_bytes = json.loads(completed.stdout)
    assert 0.5 * shard_bytes < extra_bytes < 1.5 * shard_bytes, (
        "the memory of a save is not about the size of its staging buffers"
    )


def test_writeback_of_a_large_file_is_advised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def record_and_fail(file: int, offset: int, length: int, advice: int) -> None:
        calls.append((offset, length, os.fstat(file).st_size))
        raise OSError(errno.EINVAL, "planted")

    monkeypatch.setattr(os, "posix_fadvise", record_and_fail)
    content = os.urandom(5 * WRITEBACK_BYTES // 2)
    files = _HashingFileSystem(LocalFileSystem())
    with files.create_stream(tmp_path / "file", "wb") as stream:
        stream.write(content)
    assert (tmp_path / "file").read_bytes() == content
    assert calls == [(0, WRITEBACK_BYTES, WRITEBACK_BYTES), (WRITEBACK_BYTES, WRITEBACK_BYTES, 2 * WRITEBACK_BYTES)]
