"""The manifest of a checkpoint: `manifest.json` lists the size and the hash of each file.

The commit marker, the file COMMITTED, contains the hash of the manifest and is written last. A directory without a
marker is not a checkpoint. A checkpoint is damaged if its files do not match the manifest.
"""

import errno
import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

from dist_llm.checkpoint.checkpoint_folder import CheckpointFolder, FileRecord
from dist_llm.errors import CheckpointError
from dist_llm.io.hashing import hash_content

MANIFEST_FILE = "manifest.json"
MARKER_FILE = "COMMITTED"  # written last: a directory with this file is a complete checkpoint
FORMAT = "dist_llm checkpoint 2"
TENSOR_SUFFIX = ".distcp"  # of files with tensors
NUM_HASH_THREADS = 4  # threads per process


class DamagedError(CheckpointError):
    """The files differ from those that were saved. A file that currently cannot be read is a plain CheckpointError."""


def commit(folder: CheckpointFolder, files: Mapping[str, FileRecord]) -> None:
    """Make `folder` a checkpoint: write the manifest and the marker. All files must be durable before the call."""
    content = {"format": FORMAT, "files": {name: asdict(files[name]) for name in sorted(files)}}
    manifest = json.dumps(content, indent=1).encode() + b"\n"
    folder.write(MANIFEST_FILE, manifest)
    folder.sync()  # the marker must not become durable before the file names
    folder.write(MARKER_FILE, _sha256(manifest).encode())
    folder.sync()


def write_file(folder: CheckpointFolder, name: str, content: bytes) -> FileRecord:
    """Write a small file and return its record for the manifest."""
    folder.write(name, content)
    return FileRecord(len(content), hash_content(content))


def verify_checkpoint(folder: CheckpointFolder, rank: int = 0, world_size: int = 1, with_tensors: bool = True) -> None:
    """Check the sizes of all files, and the hashes of every `world_size`-th file, beginning with file `rank`.

    Without `with_tensors`, only small files are hashed. Raises DamagedError that names the first mismatching file, and
    CheckpointError if a file cannot be read.
    """
    files = read_manifest(folder)
    try:
        for name, record in files.items():
            if (size := folder.size(name)) != record.bytes:
                raise DamagedError(f"{folder}: damaged: {name} has {size} bytes instead of {record.bytes}")
        names = [name for name in files if with_tensors or not name.endswith(TENSOR_SUFFIX)][rank::world_size]
        with ThreadPoolExecutor(NUM_HASH_THREADS) as pool:
            hashes = [files[name].hash for name in names]
            for name, saved, current in zip(names, hashes, pool.map(folder.compute_hash, names, hashes), strict=True):
                if current != saved:
                    raise DamagedError(f"{folder}: damaged: the hash of {name} differs from the saved one")
    except OSError as error:
        raise _convert_read_error(folder, error) from None


def read_manifest(folder: CheckpointFolder) -> dict[str, FileRecord]:
    """Return {file name: size and hash}.

    Raises DamagedError if the manifest is missing or does not match the marker.
    """
    try:
        manifest, marker = folder.read(MANIFEST_FILE), folder.read(MARKER_FILE)
    except OSError as error:
        raise _convert_read_error(folder, error) from None
    if marker != _sha256(manifest).encode():
        raise DamagedError(f"{folder}: damaged: {MARKER_FILE} and {MANIFEST_FILE} do not belong together")
    try:
        # Format 1 has only SHA-256 hashes.
        files = {
            name: FileRecord(int(entry["bytes"]), str(entry.get("hash") or f"sha256:{entry['sha256']}"))
            for name, entry in json.loads(manifest)["files"].items()
        }
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise DamagedError(f"{folder}: damaged: {MANIFEST_FILE} is not the manifest of a checkpoint") from None
    if outside_names := [name for name in files if "/" in name or name in ("", ".", "..")]:
        raise DamagedError(
            f"{folder}: damaged: {MANIFEST_FILE} names a file outside the checkpoint: {outside_names[0]!r}"
        )
    return files


def _convert_read_error(folder: CheckpointFolder, error: OSError) -> CheckpointError:
    if isinstance(error, FileNotFoundError) or error.errno == errno.EIO:
        return DamagedError(f"{folder}: damaged: {error}")
    return CheckpointError(f"{folder}: cannot be read: {error}")


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
