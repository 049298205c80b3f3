"""Read DeepSpeed checkpoints without DeepSpeed, in a single process: ZeRO 0 to 3 and universal checkpoints.

Files are memory-mapped, so a tensor is read on first access. Nothing that a file refers to is imported or run: a stub
replaces each class.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from dist_llm.convert.deepspeed_files import StoredTensor
from dist_llm.convert.deepspeed_universal import read_universal
from dist_llm.convert.deepspeed_zero import read_zero
from dist_llm.errors import CheckpointError

MAX_NAME_BYTES = 255  # of a directory name


@dataclass(frozen=True)
class DeepSpeedWeights:
    """The tensors of a DeepSpeed checkpoint under the names of our checkpoints.

    The names are model.NAME, optim.NAME.exp_avg, optim.NAME.step and so on. `shapes` lists all tensors.
    """

    shapes: dict[str, tuple[int, ...]]
    readers: Mapping[str, Callable[[], Tensor]]

    def read(self, name: str) -> Tensor:
        """Return a copy of one full tensor.

        Floating-point tensors become fp32, from master weights if there are any.
        """
        tensor = self.readers[name]()
        return tensor.to(torch.float32 if tensor.is_floating_point() else tensor.dtype)


def open_deepspeed(directory: Path, param_groups: Sequence[Sequence[str]] = ()) -> DeepSpeedWeights:
    """Open a checkpoint directory, or its parent directory with the file `latest` or `latest_universal`.

    ZeRO 0 stores moments by parameter index. They are read only if `param_groups` has the parameter names of each group
    of the optimizer, in order. Frozen parameters, buffers and second names of shared parameters are read as weights.

    Raises CheckpointError for missing or damaged files, and for tensor, pipeline and expert parallelism.
    """
    folder = _resolve_tag(directory)
    with _convert_format_errors(folder):
        tensors = dict(read_universal(folder) if (folder / "zero").is_dir() else read_zero(folder, param_groups))
        return DeepSpeedWeights(
            {name: tensor.shape for name, tensor in tensors.items()},
            {name: partial(_read_tensor, folder, name, tensor) for name, tensor in tensors.items()},
        )


@contextmanager
def _convert_format_errors(folder: Path) -> Iterator[None]:
    """Within the block, convert errors from unexpected content of the files to CheckpointError."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, ValueError, RuntimeError, ArithmeticError, MemoryError) as error:
        raise CheckpointError(
            f"{folder}: not in the format of DeepSpeed: {type(error).__name__}: {error}; copy its files again, or save "
            "with a supported version of DeepSpeed"
        ) from error


def _read_tensor(folder: Path, name: str, stored: StoredTensor) -> Tensor:
    """Read a tensor in its full shape. Raises CheckpointError if its files have another number of elements."""
    with _convert_format_errors(folder):
        tensor = stored.read().detach()
        if tensor.numel() != prod(stored.shape):
            raise CheckpointError(
                f"{folder}: {name} has {tensor.numel()} elements, not the {prod(stored.shape)} of {stored.shape}"
            )
        return tensor.reshape(stored.shape)


def _resolve_tag(directory: Path) -> Path:
    """Return the directory with the files: the one that the file `latest` names, or `directory` itself."""
    for latest in ("latest", "latest_universal"):
        if (directory / latest).is_file():
            tag = (directory / latest).read_bytes().decode(errors="replace").strip()
            if "/" in tag or "\0" in tag or tag in ("", ".", "..") or len(tag.encode()) > MAX_NAME_BYTES:
                raise CheckpointError(f"{directory / latest}: does not name a directory beside it: {tag[:80]!r}")
            if not (directory / tag).is_dir():
                raise CheckpointError(f"{directory / latest}: names {tag[:80]}, which is missing; name one that exists")
            return directory / tag
    if (directory / "zero").is_dir() or any(directory.glob("*_states.pt")):
        return directory
    raise CheckpointError(
        f"{directory}: not a DeepSpeed checkpoint; give the directory with the file `latest`, or with *_model_states.pt"
    )
