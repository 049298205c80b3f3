"""Each reader of files either reads a damaged file or raises a UserError.

A reader must not raise another exception, hang, or allocate memory for a size that a file only declares. The tests
limit the time and the address space.
"""

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from dist_llm.errors import UserError

from .limits import limit_memory_and_time
from .mutations import mutate
from .readers import READERS

NUM_MUTATIONS, NUM_SLOW_MUTATIONS = 8, 400  # per reader


def read_mutations(name: str, mutation_ids: range, folder: Path, directory: Path) -> None:
    """Damage a file in a copy of `folder` and read the copy, once for each mutation id."""
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    for mutation_id in mutation_ids:
        rng = random.Random(f"{name} {mutation_id}")
        target = directory / str(mutation_id)
        shutil.copytree(folder, target)
        path = target / (files[mutation_id % len(files)] if mutation_id < len(files) else rng.choice(files))
        content = path.read_bytes()
        path.write_bytes(mutate(content, rng))
        try:
            with limit_memory_and_time():
                READERS[name].read(target)
        except UserError:
            pass
        except BaseException as error:
            error.add_note(f"{name}, mutation {mutation_id}: {path}")
            raise
        shutil.rmtree(target)


@pytest.mark.parametrize("name", READERS)
def test_damaged_files_are_read_or_raise_a_named_error(
    name: str, get_valid_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    read_mutations(name, range(NUM_MUTATIONS), get_valid_folder(name), tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", READERS)
def test_many_damaged_files(name: str, get_valid_folder: Callable[[str], Path], tmp_path: Path) -> None:
    read_mutations(name, range(NUM_MUTATIONS, NUM_SLOW_MUTATIONS), get_valid_folder(name), tmp_path)
