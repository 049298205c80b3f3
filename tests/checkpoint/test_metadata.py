"""Reading the metadata of a checkpoint runs no code, and invalid metadata raise a CheckpointError."""

import os
import pickle
import random
import warnings
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import state_dict_saver
from torch.distributed.checkpoint.metadata import Metadata

from dist_llm.checkpoint.checkpoint_folder import METADATA_FILE, CheckpointFolder, FolderReader, FolderWriter
from dist_llm.checkpoint.metadata import load_metadata
from dist_llm.errors import CheckpointError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of three tensors."""
    path = tmp_path_factory.mktemp("checkpoint")
    state = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16), "c": torch.tensor(7)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about the missing process group
        state_dict_saver.save(state, storage_writer=FolderWriter(CheckpointFolder(path)), no_dist=True)
    return path


def test_metadata_equal_the_result_of_pickle(folder: Path) -> None:
    content = (folder / METADATA_FILE).read_bytes()
    actual, expected = load_metadata(content, "here"), pickle.loads(content)
    assert actual.state_dict_metadata == expected.state_dict_metadata
    assert actual.storage_data == expected.storage_data
    assert set(actual.state_dict_metadata) == {"a", "b", "c"}


class Command:
    """An object whose pickle runs a command when it is loaded."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.file}",)


def test_loading_metadata_runs_no_code(folder: Path, tmp_path: Path) -> None:
    malicious = tmp_path / "malicious"
    malicious.mkdir()
    (malicious / METADATA_FILE).write_bytes(pickle.dumps(Command(tmp_path / "ran")))
    with pytest.raises(CheckpointError, match=r"malicious/\.metadata: would run \w+\.system when it is loaded"):
        FolderReader(CheckpointFolder(malicious)).read_metadata()
    assert not (tmp_path / "ran").exists()
    pickle.loads((malicious / METADATA_FILE).read_bytes())
    assert (tmp_path / "ran").exists(), "plain pickle does not run the command, so the test cannot detect a failure"


@pytest.mark.parametrize("name", ["../other/__0_0.distcp", "/etc/passwd", "..", "a/b", ""])
def test_a_tensor_outside_the_folder_is_refused(name: str, folder: Path) -> None:
    metadata: Metadata = pickle.loads((folder / METADATA_FILE).read_bytes())
    for stored in metadata.storage_data.values():
        stored.relative_path = name
    with pytest.raises(CheckpointError, match="names a file outside the checkpoint"):
        load_metadata(pickle.dumps(metadata), "here")


def test_damaged_metadata_raise_only_checkpoint_errors(folder: Path) -> None:
    """Flip bits or truncate the metadata; what still loads is metadata."""
    content = (folder / METADATA_FILE).read_bytes()
    draw = random.Random(0)
    refused = 0
    for number in range(600):
        damaged = bytearray(content)
        if number % 3:
            damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
        else:
            del damaged[draw.randrange(len(damaged)) :]
        with suppress(CheckpointError):
            refused += 1
            assert isinstance(load_metadata(bytes(damaged), "here"), Metadata)
            refused -= 1
    assert refused > 200


@pytest.mark.parametrize("content", [b"", b"text", pickle.dumps({"a": 1}), pickle.dumps(None)])
def test_content_other_than_metadata_is_refused(content: bytes) -> None:
    with pytest.raises(CheckpointError, match=r"^here: "):
        load_metadata(content, "here")
