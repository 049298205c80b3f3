"""Any damage to a checkpoint is detected, and the checkpoint before it is used."""

import hashlib
import json
import math
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dist_llm.checkpoint.checkpoint_folder import CheckpointFolder
from dist_llm.checkpoint.checkpoint_state import Progress
from dist_llm.checkpoint.find_checkpoint import fetch_verified_checkpoint
from dist_llm.checkpoint.manifest import MANIFEST_FILE, MARKER_FILE, read_manifest, verify_checkpoint
from dist_llm.checkpoint.store import CheckpointStore
from dist_llm.config.schema import CheckpointConfig
from dist_llm.engines.native import NativeEngine
from dist_llm.errors import CheckpointError
from dist_llm.training.step import train_step
from tests.laws.law import make_batches, make_config, save_checkpoint
from tests.laws.layouts import ADAMW
from tests.laws.worlds import get_world

FILES = {"config.yaml": b"run: {}\n", "tokenizer.json": b"{}\n"}


def build_engine(ranks: int = 1) -> NativeEngine:
    """Build an engine that has taken one step."""
    engine = NativeEngine(make_config(ranks=ranks, optim=ADAMW), torch.device("cpu"))
    train_step(engine, make_batches(engine.config, engine, step=0), lr=1e-3, step=0)
    return engine


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with checkpoints of steps 1 and 2; read-only."""
    directory, engine = tmp_path_factory.mktemp("two"), build_engine()
    checkpoints = CheckpointStore(directory)
    for step in (1, 2):
        save_checkpoint(checkpoints, engine, Progress(step), FILES)
    return directory


@pytest.fixture
def two_copies(two_checkpoints: Path, tmp_path: Path) -> Path:
    """A copy of the two checkpoints, which a test may damage."""
    return Path(shutil.copytree(two_checkpoints, tmp_path / "pair"))


def flip_random_bit(newest: Path, draw: random.Random) -> None:
    """Flip one random bit of the checkpoint's files."""
    files = sorted(newest.iterdir())
    byte = draw.randrange(sum(file.stat().st_size for file in files))
    for file in files:
        if byte < file.stat().st_size:
            content = bytearray(file.read_bytes())
            content[byte] ^= 1 << draw.randrange(8)
            file.write_bytes(content)
            return
        byte -= file.stat().st_size


@pytest.mark.parametrize("draws", [pytest.param(10), pytest.param(50, marks=pytest.mark.slow)])
def test_a_flipped_bit_at_a_random_position_is_detected(two_checkpoints: Path, tmp_path: Path, draws: int) -> None:
    for number in range(draws):
        copy = Path(shutil.copytree(two_checkpoints, tmp_path / str(number)))
        flip_random_bit(copy / "step_00000002", random.Random(number))
        assert CheckpointStore(copy).find_latest_verified() == CheckpointFolder(copy / "step_00000001"), number


def test_a_flipped_bit_in_each_file_is_detected(two_checkpoints: Path, tmp_path: Path) -> None:
    names = sorted(file.name for file in (two_checkpoints / "step_00000002").iterdir())
    assert {MANIFEST_FILE, MARKER_FILE, ".metadata", "__0_0.distcp", "progress.json", *FILES} <= set(names)
    for name in names:
        copy = Path(shutil.copytree(two_checkpoints, tmp_path / name))
        file = copy / "step_00000002" / name
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
        assert CheckpointStore(copy).find_latest_verified() == CheckpointFolder(copy / "step_00000001"), name
        with pytest.raises(CheckpointError, match="damaged"):
            fetch_verified_checkpoint(copy / "step_00000002")


def test_a_checkpoint_of_format_1_is_verified(two_copies: Path) -> None:
    """Format 1 has SHA-256 hashes."""
    newest = two_copies / "step_00000002"
    names = [file.name for file in newest.iterdir() if file.name not in (MANIFEST_FILE, MARKER_FILE)]
    files = {name: (newest / name).read_bytes() for name in names}
    manifest = json.dumps(
        {
            "format": "dist_llm checkpoint 1",
            "files": {
                name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
                for name, content in files.items()
            },
        }
    )
    (newest / MANIFEST_FILE).write_text(manifest)
    (newest / MARKER_FILE).write_text(hashlib.sha256(manifest.encode()).hexdigest())
    assert CheckpointStore(two_copies).find_latest_verified() == CheckpointFolder(newest)
    flip_random_bit(newest, random.Random(0))
    assert CheckpointStore(two_copies).find_latest_verified() == CheckpointFolder(two_copies / "step_00000001")


def truncate(path: Path) -> None:
    """Remove the last byte of a file."""
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda newest: (newest / "__0_0.distcp").unlink(), "damaged: .*__0_0.distcp"),
        (lambda newest: truncate(newest / "__0_0.distcp"), r"damaged: __0_0.distcp has \d+ bytes instead of \d+"),
        (lambda newest: (newest / MANIFEST_FILE).unlink(), "damaged: .*manifest.json"),
        (lambda newest: truncate(newest / MARKER_FILE), "do not belong together"),
    ],
)
def test_a_missing_or_truncated_file_is_reported(
    two_copies: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(two_copies / "step_00000002")
    with pytest.raises(CheckpointError, match=message):
        verify_checkpoint(CheckpointFolder(two_copies / "step_00000002"))
    assert CheckpointStore(two_copies).find_latest_verified() == CheckpointFolder(two_copies / "step_00000001")


def test_an_unreadable_file_is_not_reported_as_damaged(two_copies: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the run resumed from the previous checkpoint, it would later overwrite the newer one."""

    def raise_permission_error(folder: CheckpointFolder, name: str, like: str) -> str:
        raise PermissionError(13, "Permission denied", f"{folder}/{name}")

    monkeypatch.setattr(CheckpointFolder, "compute_hash", raise_permission_error)
    with pytest.raises(CheckpointError, match=r"step_00000002: cannot be read: .*Permission denied"):
        CheckpointStore(two_copies).find_latest_verified()


def test_directories_of_other_names_are_not_removed(two_copies: Path) -> None:
    shutil.copytree(two_copies / "step_00000002", two_copies / "step_00000002_backup")
    (two_copies / "step_notes").mkdir()
    checkpoints = CheckpointStore(two_copies, CheckpointConfig(keep=1, keep_every=5))
    save_checkpoint(checkpoints, build_engine(), Progress(3), FILES)
    assert sorted(path.name for path in two_copies.iterdir()) == ["step_00000002_backup", "step_00000003", "step_notes"]


def test_all_damaged_checkpoints_raise_an_error(two_copies: Path) -> None:
    for name in ("step_00000001", "step_00000002"):
        truncate(two_copies / name / "progress.json")
    with pytest.raises(CheckpointError, match="all 2 checkpoints are damaged"):
        CheckpointStore(two_copies).find_latest_verified()
    assert CheckpointStore(two_copies / "empty").find_latest_verified() is None


def find_latest_verified_name(directory: Path) -> str:
    """Return the folder name of the newest checkpoint that matches its manifest, on this rank."""
    newest = CheckpointStore(directory).find_latest_verified()
    assert newest is not None
    return newest.name


def test_ranks_share_the_verification(two_copies: Path) -> None:
    """All ranks treat a file as damaged that only one rank verifies."""
    names = list(read_manifest(CheckpointFolder(two_copies / "step_00000002")))
    assert get_world(2).run(find_latest_verified_name, two_copies) == ["step_00000002"] * 2
    for name in (names[0], names[1]):
        file = two_copies / "step_00000002" / name
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert get_world(2).run(find_latest_verified_name, two_copies) == ["step_00000001"] * 2, name
        file.write_bytes(content)


def test_pruning_keeps_the_configured_checkpoints(tmp_path: Path) -> None:
    engine = build_engine()
    losses = {1: math.nan, 2: 1.0, 3: None, 4: 2.0, 5: 2.5, 6: 4.0, 7: 5.0}
    checkpoints = CheckpointStore(tmp_path, CheckpointConfig(keep=2, keep_every=3, keep_best=2))
    for step, loss in losses.items():
        save_checkpoint(checkpoints, engine, Progress(step, heldout_loss=loss), FILES)
    names = [int(folder.name.removeprefix("step_")) for folder in checkpoints.list_committed()]
    assert names == [2, 3, 4, 6, 7], (
        "the kept checkpoints are not the best two, the multiples of three and the newest two"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step_{step:08d}" for step in names]


def test_a_damaged_later_checkpoint_does_not_replace_a_new_one(two_copies: Path, tmp_path: Path) -> None:
    """The run resumes from step 1 and saves step 3 before it reaches step 9 again."""
    shutil.copytree(two_copies / "step_00000002", two_copies / "step_00000009")
    truncate(two_copies / "step_00000009" / "progress.json")
    checkpoints = CheckpointStore(two_copies, CheckpointConfig(keep=1))
    save_checkpoint(checkpoints, build_engine(), Progress(3), FILES)
    assert checkpoints.find_latest_verified() == CheckpointFolder(two_copies / "step_00000003")
    with pytest.raises(CheckpointError, match=r"step_00000009: damaged: .*; another: .*step_00000003"):
        fetch_verified_checkpoint(make_run(two_copies, tmp_path))


def make_run(checkpoints: Path, directory: Path) -> Path:
    """Create a run directory with these checkpoints."""
    run = directory / "run"
    run.mkdir()
    checkpoints.rename(run / "checkpoints")
    return run


def test_a_damaged_older_checkpoint_does_not_stop_the_run(two_copies: Path) -> None:
    (two_copies / "step_00000001" / "progress.json").write_bytes(b"{")
    checkpoints = CheckpointStore(two_copies, CheckpointConfig(keep=1, keep_best=1))
    save_checkpoint(checkpoints, build_engine(), Progress(3, heldout_loss=1.0), FILES)
    assert [folder.name for folder in checkpoints.list_committed()] == ["step_00000003"]


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        (b"[]", "is not the manifest of a checkpoint"),
        (b'{"files": {"a": 3}}', "is not the manifest of a checkpoint"),
        (b'{"files": {"a": {"bytes": "many", "hash": "x"}}}', "is not the manifest of a checkpoint"),
        (b'{"files": [', "is not the manifest of a checkpoint"),
        (b"[" * 100_000, "is not the manifest of a checkpoint"),
        (b"\xff\xfe", "is not the manifest of a checkpoint"),
        (b'{"files": {"../secret": {"bytes": 1, "hash": "x"}}}', "names a file outside the checkpoint: '../secret'"),
        (b'{"files": {"/etc/passwd": {"bytes": 1, "hash": "x"}}}', "names a file outside the checkpoint"),
    ],
)
def test_an_invalid_manifest_is_refused(manifest: bytes, message: str, tmp_path: Path) -> None:
    """The marker matches the manifest, so only the content is wrong."""
    (tmp_path / MANIFEST_FILE).write_bytes(manifest)
    (tmp_path / MARKER_FILE).write_text(hashlib.sha256(manifest).hexdigest())
    with pytest.raises(CheckpointError, match=message):
        read_manifest(CheckpointFolder(tmp_path))
