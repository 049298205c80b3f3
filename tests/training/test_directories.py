"""A run refuses a directory that it cannot write to, and the error names the config key."""

import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from dist_llm.checkpoint.checkpoint_folder import CheckpointFolder
from dist_llm.errors import ConfigError
from dist_llm.launch.run_lock import LOCK_FILE
from dist_llm.launch.world import World
from dist_llm.training import directories
from dist_llm.training.directories import check_free_space, check_writable, open_directories
from tests.laws.law import make_config

DiskUsage = namedtuple("DiskUsage", "total used free")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_checkpoint_directory_that_cannot_be_written_is_refused(rank: int, tmp_path: Path) -> None:
    """Every node checks the directory."""
    (tmp_path / "file").write_text("")
    config = make_config(ranks=1, run={"dir": str(tmp_path / "run")}, checkpoint={"dir": str(tmp_path / "file/here")})
    with (
        pytest.raises(ConfigError, match=r"checkpoint\.dir: .*file.* cannot be written: .*; make it writable, or set"),
        open_directories(config, CheckpointFolder(config.checkpoint.dir), World(rank=rank, world_size=2, local_rank=0)),
    ):
        pass
    assert not (tmp_path / "run" / LOCK_FILE).exists()


def test_a_url_that_cannot_be_written_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = CheckpointFolder("memory://bucket/checkpoints")
    check_writable(folder, "checkpoint.dir")
    assert folder.list_names() == []

    def raise_permission_error(*args: object) -> None:
        raise PermissionError("AccessDenied")

    monkeypatch.setattr(CheckpointFolder, "write", raise_permission_error)
    with pytest.raises(ConfigError, match=r"checkpoint\.dir: memory://bucket/checkpoints cannot be written: .*Denied"):
        check_writable(folder, "checkpoint.dir")


def test_a_disk_too_small_for_one_checkpoint_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: DiskUsage(5000, 4001, 999))
    check_free_space(tmp_path, needed_bytes=999, key="run.dir")
    with pytest.raises(ConfigError, match=r"run\.dir: .* has room for 999 bytes, but one checkpoint takes 1,000"):
        check_free_space(tmp_path, needed_bytes=1000, key="run.dir")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: DiskUsage(0, 0, 0))
    check_free_space(tmp_path, needed_bytes=1000, key="run.dir")  # a file system that reports no sizes


def test_a_finished_run_needs_no_free_space(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: DiskUsage(5000, 5000, 0))
    monkeypatch.setattr(directories, "count_checkpoint_bytes", lambda config: 1)
    config = make_config(ranks=1, run={"dir": str(tmp_path / "run")})
    folder = CheckpointFolder(tmp_path / "run" / "checkpoints")
    with open_directories(config, folder, World(), saves_checkpoints=False):
        pass
    with pytest.raises(ConfigError, match="has room for 0 bytes"), open_directories(config, folder, World()):
        pass
