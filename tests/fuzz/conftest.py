"""The fixture of the fuzz tests: folders of valid files."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from .readers import READERS


@pytest.fixture(scope="module")
def get_valid_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function from the name of a reader to a folder with valid files.

    The function writes the folder once and checks that the reader reads it.
    """
    folders: dict[str, Path] = {}

    def write_once(name: str) -> Path:
        if name not in folders:
            torch.manual_seed(0)
            folder = tmp_path_factory.mktemp("valid") / "folder"
            folder.mkdir()
            READERS[name].write(folder)
            copy = folder.with_name("copy")
            shutil.copytree(folder, copy)
            READERS[name].read(copy)
            folders[name] = folder
        return folders[name]

    return write_once
