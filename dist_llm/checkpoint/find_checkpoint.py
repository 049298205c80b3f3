"""Find the checkpoint that a user names by a run, a checkpoint or a URL, and fetch it."""

import hashlib
from pathlib import Path

from dist_llm.checkpoint.checkpoint_folder import CheckpointFolder
from dist_llm.checkpoint.manifest import MANIFEST_FILE, MARKER_FILE, DamagedError, read_manifest, verify_checkpoint
from dist_llm.checkpoint.store import CheckpointStore
from dist_llm.config.data_sections import CACHE
from dist_llm.config.load import load_config
from dist_llm.data.remote import fetch
from dist_llm.errors import CheckpointError


def fetch_verified_checkpoint(location: Path | str, rank: int = 0, world_size: int = 1) -> Path:
    """Fetch and verify the checkpoint that `resolve_checkpoint` finds at `location`, and return its local path.

    A remote checkpoint is copied to the cache. A local one stays where it is. The hashes of every `world_size`-th file,
    beginning with file `rank`, are checked. Raises CheckpointError if there is no checkpoint or it is damaged, and
    DataError if it cannot be fetched.
    """
    folder = resolve_checkpoint(location)
    path = folder.local_path or _download(folder)
    try:
        verify_checkpoint(CheckpointFolder(path), rank, world_size)
    except DamagedError as error:
        alternatives = [
            candidate
            for candidate in CheckpointStore(folder.location.rpartition("/")[0]).list_committed()
            if candidate != folder
        ]
        raise DamagedError(f"{error}{f'; another: {alternatives[-1]}' if alternatives else ''}") from None
    return path


def resolve_checkpoint(location: Path | str) -> CheckpointFolder:
    """Return the checkpoint at `location`, which is a path or a URL.

    `location` is a checkpoint, a directory of checkpoints or a run directory. For the latter two, the result is the
    latest checkpoint. Raises CheckpointError if there is none.
    """
    folder = CheckpointFolder(location)
    if MARKER_FILE in folder.list_names():
        return folder
    committed = CheckpointStore(folder).list_committed() or checkpoints_of_run(folder).list_committed()
    if not committed:
        raise CheckpointError(
            f"{location}: has no complete checkpoint; give a run directory (the run.dir of `dist-llm train`) "
            f"or one of its checkpoints/step_* directories that has a {MARKER_FILE} file"
        )
    return committed[-1]


def checkpoints_of_run(run: CheckpointFolder | Path | str) -> CheckpointStore:
    """Return the checkpoints of the run in directory `run`, also if its config has another checkpoint.dir."""
    run = CheckpointFolder(run)
    if run.local_path is not None and (run.local_path / "config.yaml").exists():
        config, _ = load_config(run.local_path / "config.yaml")
        if config is not None and config.checkpoint.dir:
            return CheckpointStore(config.checkpoint.dir)
    return CheckpointStore(run / "checkpoints")


def _download(folder: CheckpointFolder) -> Path:
    """Copy a remote checkpoint to the cache, and compare each file with its hash. Return the local path."""
    # The marker contains the hash of the manifest, so another checkpoint at the same location gets another directory.
    key = hashlib.sha256(folder.location.encode() + folder.read(MARKER_FILE)).hexdigest()
    target = Path(CACHE).expanduser() / "checkpoints" / key / folder.name
    for name, record in read_manifest(folder).items():
        fetch(f"{folder}/{name}", target / name, record.bytes, record.hash)
    for name in (MANIFEST_FILE, MARKER_FILE):
        fetch(f"{folder}/{name}", target / name, None, None)
    return target
