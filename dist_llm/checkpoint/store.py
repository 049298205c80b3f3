"""Sharded checkpoints on disk: written aside, committed by a rename and a marker, then pruned.

checkpoints/step_00000500/
    __0_0.distcp .metadata     torch.distributed.checkpoint's own files
    progress.json              step, samples, tokens
    config.yaml tokenizer.json environment.json
    COMMITTED                  written last; a directory without it is not a checkpoint
"""

import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import optim
from torch.distributed.checkpoint import filesystem, state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from dist_llm.checkpoint.state import Named, Progress, allocate_moments, copy_to_twins, moments, weights
from dist_llm.errors import CheckpointError
from dist_llm.launch.group import barrier

MARKER = "COMMITTED"
PROGRESS = "progress.json"


class CheckpointStore:
    """The checkpoints of one run. Every rank calls `save` and `load`; rank 0 alone touches names."""

    def __init__(self, directory: Path, keep: int) -> None:
        self.directory, self.keep = directory, keep

    def committed(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return sorted(marker.parent for marker in self.directory.glob(f"step_*/{MARKER}"))

    def save(self, model: Named, optimizer: optim.Optimizer, progress: Progress, files: Mapping[str, bytes]) -> Path:
        """Write everything aside, commit, prune. `files` are small files to put beside the tensors."""
        final = self.directory / f"step_{progress.step:08d}"
        aside = final.with_suffix(".tmp")
        main = not dist.is_initialized() or dist.get_rank() == 0
        if main:
            for leftover in (*self.directory.glob("*.tmp"), final):
                shutil.rmtree(leftover, ignore_errors=True)
            aside.mkdir(parents=True)
        barrier()
        state = weights(model) | moments(model, optimizer)
        with _alone():
            state_dict_saver.save(state, checkpoint_id=aside, no_dist=not dist.is_initialized())
        if main:
            for name, content in {PROGRESS: json.dumps(progress.as_dict()).encode(), **files}.items():
                _write(aside / name, content)
            aside.rename(final)
            _write(final / MARKER, b"")
            _sync(self.directory)
            for old in self.committed()[: -self.keep]:
                # The marker goes first: a half-deleted directory must not look complete.
                (old / MARKER).unlink()
                shutil.rmtree(old)
        barrier()
        return final


def find(path: Path) -> Path:
    """The checkpoint that `path` means: itself, or the newest of a run directory."""
    if (path / MARKER).exists():
        return path
    found = CheckpointStore(path / "checkpoints", keep=1).committed()
    if not found:
        raise CheckpointError(
            f"{path}: holds no complete checkpoint; give a run directory (the run.dir of `dist-llm train`) "
            f"or one of its checkpoints/step_* directories that has a {MARKER} file"
        )
    return found[-1]


def load(path: Path, model: Named, optimizer: optim.Optimizer | None = None) -> Progress:
    """Read the weights, and the moments if there is an optimizer, into whatever layout `model` has.

    Raises CheckpointError where the checkpoint lacks a parameter of the model or has it in another
    shape. (That it holds more is no error: a pipeline stage asks for its own part.)
    """
    saved = shapes(path)
    refuse_other_model(path, weights(model), saved)
    state = weights(model)
    if optimizer is not None:
        allocate_moments(model, optimizer, saved)
        state |= moments(model, optimizer)
    read(path, state)
    copy_to_twins(model, optimizer)
    return Progress.of(json.loads((path / PROGRESS).read_text(encoding="utf-8")))


def shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """{name: full shape} of every tensor in a checkpoint."""
    return {
        name: tuple(entry.size)
        for name, entry in filesystem.FileSystemReader(path).read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def read(path: Path, state: dict[str, Any]) -> None:
    """Fill the tensors of `state` in place; each rank gets what it holds of them."""
    reader = filesystem.FileSystemReader(path)
    with _alone():
        state_dict_loader.load(state, storage_reader=reader, no_dist=not dist.is_initialized())


def refuse_other_model(path: Path, wanted: Mapping[str, Any], saved: Mapping[str, tuple[int, ...]]) -> None:
    """Raise CheckpointError unless `saved` has every tensor of `wanted`, in its shape."""
    for name, tensor in wanted.items():
        shape = tuple(tensor.shape)
        if saved.get(name) != shape:
            found = f"shape {list(saved[name])}" if name in saved else "no such parameter"
            raise CheckpointError(
                f"{path}: {name} has shape {list(shape)} in the config, but the checkpoint has {found}; "
                "use the `model` section the run was started with, or another run.dir"
            )


@contextmanager
def _alone() -> Iterator[None]:
    """One process without a group is what we mean; torch warns that it assumes so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
