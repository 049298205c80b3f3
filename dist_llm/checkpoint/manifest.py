"""What makes a checkpoint one: every file's size and hash in `manifest.json`, whose own hash is in the marker.

The marker is written last. A folder without it is not a checkpoint; one whose files are not those of the manifest is
a damaged one.
"""

import errno
import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

from dist_llm.checkpoint.folder import Folder, Written
from dist_llm.data.remote import create_hash, format_digest
from dist_llm.errors import CheckpointError

MARKER, MANIFEST = "COMMITTED", "manifest.json"
FORMAT = "dist_llm checkpoint 2"
TENSORS = ".distcp"
THREADS = 4  # that hash at once, in each process


class DamagedError(CheckpointError):
    """What is there is not what was saved. (That it cannot be read just now is another thing.)"""


def commit(folder: Folder, files: Mapping[str, Written]) -> None:
    """Make `folder`, all of whose files are there and durable, a checkpoint."""
    content = {"format": FORMAT, "files": {name: asdict(files[name]) for name in sorted(files)}}
    manifest = json.dumps(content, indent=1).encode() + b"\n"
    folder.write(MANIFEST, manifest)
    folder.sync()  # the names first: the marker must not outlive them
    folder.write(MARKER, _sha256(manifest).encode())
    folder.sync()


def write(folder: Folder, name: str, content: bytes) -> Written:
    """A small file, and what the manifest says of it."""
    folder.write(name, content)
    digest = create_hash()
    digest.update(content)
    return Written(len(content), format_digest(digest))


def verify(folder: Folder, part: int = 0, parts: int = 1, tensors: bool = True) -> None:
    """Check sizes of all files, and hashes of every `parts`-th from `part` on; without `tensors`, of small ones alone.

    Raises DamagedError that names the first file which is not what was saved, CheckpointError where one cannot be read.
    """
    files = read_manifest(folder)
    try:
        for name, written in files.items():
            if (size := folder.size(name)) != written.bytes:
                raise DamagedError(f"{folder}: damaged: {name} has {size} bytes of {written.bytes}")
        mine = [name for name in files if tensors or not name.endswith(TENSORS)][part::parts]
        with ThreadPoolExecutor(THREADS) as pool:
            want = [files[name].hash for name in mine]
            for name, was, found in zip(mine, want, pool.map(folder.hash, mine, want), strict=True):
                if found != was:
                    raise DamagedError(f"{folder}: damaged: {name} is not what was saved (its hash differs)")
    except OSError as error:
        raise _unreadable(folder, error) from None


def read_manifest(folder: Folder) -> dict[str, Written]:
    """{name: size and hash}. Raises DamagedError where there is none, or not the one that the marker knows."""
    try:
        manifest, marker = folder.read(MANIFEST), folder.read(MARKER)
    except OSError as error:
        raise _unreadable(folder, error) from None
    if marker != _sha256(manifest).encode():
        raise DamagedError(f"{folder}: damaged: {MARKER} and {MANIFEST} do not belong together")
    try:
        # Of format 1 all were SHA-256's.
        files = {
            name: Written(int(each["bytes"]), str(each.get("hash") or f"sha256:{each['sha256']}"))
            for name, each in json.loads(manifest)["files"].items()
        }
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise DamagedError(f"{folder}: damaged: {MANIFEST} is not a checkpoint's") from None
    if outside := [name for name in files if "/" in name or name in ("", ".", "..")]:
        raise DamagedError(f"{folder}: damaged: {MANIFEST} names a file outside the checkpoint: {outside[0]!r}")
    return files


def _unreadable(folder: Folder, error: OSError) -> CheckpointError:
    if isinstance(error, FileNotFoundError) or error.errno == errno.EIO:
        return DamagedError(f"{folder}: damaged: {error}")
    return CheckpointError(f"{folder}: cannot be read: {error}")


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
