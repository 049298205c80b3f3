"""Read and write torch.save files that refer to classes of DeepSpeed, without DeepSpeed.

Tensors are memory-mapped. Nothing that a file refers to is imported or run.
"""

import mmap
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dist_llm.convert.weights import check_tensor_sizes
from dist_llm.errors import CheckpointError
from dist_llm.io.atomic import create_atomically, replace_file


class StoredTensor(NamedTuple):
    """A tensor in a checkpoint, which is read on demand."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]


class _InertStub:
    """Replaces each class or function that a file refers to. It accepts and ignores all arguments."""

    def __init__(self, *_: object) -> None: ...
    def __setstate__(self, _: object) -> None: ...
    def __setitem__(self, _: object, __: object) -> None: ...


def load_mapped(path: Path) -> Any:
    """Load a torch.save file with memory-mapped tensors. Raises CheckpointError if the file is missing or damaged."""
    try:
        global_names = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
        with torch.serialization.safe_globals([(_InertStub, name) for name in global_names]):
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        check_tensor_sizes(content, path)
        return content
    except CheckpointError:
        raise
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: is missing; copy it from the directory of the run") from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: is damaged, or contains objects that cannot be read without running code; copy it again, or save "
            "it without these objects"
        ) from error
    except Exception as error:  # the type depends on where the file is damaged
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{path}: cannot be read ({reason}); copy it again, or use an older checkpoint"
        ) from error


class FragmentAddress:
    """The range of a parameter in a flat partition: its number of elements and its first element."""

    def __init__(self, numel: int, start: int) -> None:
        self.numel, self.start = numel, start


class LossScaler:
    """The state of DeepSpeed's loss scaler, with a constant loss scale of 1."""

    def __init__(self) -> None:
        self.cur_scale, self.dynamic = 1.0, False


# Pickle opcodes (module, name) of DeepSpeed classes, by our class.
DEEPSPEED_NAMES: dict[Any, bytes] = {
    FragmentAddress: b"deepspeed.utils.tensor_fragment\nfragment_address\n",
    LossScaler: b"deepspeed.runtime.fp16.loss_scaler\nLossScaler\n",
}


PURE_PYTHON_PICKLER: Any = pickle._Pickler  # the C pickler checks that the module has the class


class _PickleModule:
    """Replaces the module pickle in torch.save. Writes our two classes under the names of DeepSpeed's classes."""

    class Pickler(PURE_PYTHON_PICKLER):  # type: ignore[misc]
        def save_global(self, obj: Any, name: str | None = None) -> None:
            if obj not in DEEPSPEED_NAMES:
                super().save_global(obj, name)
                return
            self.write(pickle.GLOBAL + DEEPSPEED_NAMES[obj])
            self.memoize(obj)


def write_placeholders(content: dict[str, Any], path: Path) -> None:
    """Write a torch.save file without the data of its tensors. The file has holes there, which read as zeros."""
    with torch.serialization.skip_data():
        torch.save(content, path, pickle_module=_PickleModule)


def open_writable(path: Path) -> Any:
    """Load a torch.save file so that writing to one of its tensors writes to the file."""
    with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
        return load_mapped(path)


@contextmanager
def write_tagged_directory(directory: Path, tag: str, latest: str) -> Iterator[Path]:
    """Yield a temporary directory that becomes `directory/tag` at the end. Then write `tag` to the file `latest`.

    After an error the temporary directory is removed.
    """
    target = directory / tag
    if target.exists():
        raise CheckpointError(f"{target}: exists; give another tag or directory")
    with create_atomically(target) as temporary:
        temporary.mkdir(parents=True)
        yield temporary
    replace_file(directory / latest, tag.encode())
