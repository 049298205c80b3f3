"""Files that an attacker has written: a reader raises a UserError, runs no command and leaves its folder alone."""

import io
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_llm.errors import UserError

from .limits import limit_memory_and_time
from .readers import READERS


class ShellCommand:
    """An object whose pickle runs a shell command when it is loaded."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.file}",)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("checkpoint", ".metadata"),
        ("checkpoint", "__0_0.distcp"),
        ("pytorch_model.bin", "pytorch_model.bin"),
        ("pytorch_model.bin of many", "a.bin"),
        ("pytorch_model.bin of old", "pytorch_model.bin"),
        ("ckpt.pt", "ckpt.pt"),
        ("zero 1", "zero_pp_rank_0_mp_rank_00_optim_states.pt"),
        ("zero 3", "zero_pp_rank_0_mp_rank_00_model_states.pt"),
        ("universal", "fp32.pt"),
    ],
)
def test_reading_runs_no_command(name: str, file: str, get_valid_folder: Callable[[str], Path], tmp_path: Path) -> None:
    folder, marker = tmp_path / "folder", tmp_path / "ran"  # the command would write the marker
    shutil.copytree(get_valid_folder(name), folder)
    path = next(folder.rglob(file))
    if file == ".metadata":
        path.write_bytes(pickle.dumps(ShellCommand(marker)))
    elif file.endswith(".distcp"):
        content = io.BytesIO()
        torch.save({"param": ShellCommand(marker)}, content)
        path.write_bytes(content.getvalue() + path.read_bytes()[len(content.getvalue()) :])
    else:
        torch.save({"param": torch.ones(2), "x": ShellCommand(marker)}, path)
    with pytest.raises(UserError):
        READERS[name].read(folder)
    assert not marker.exists()


def make_replace(file: str, old: bytes, new: bytes) -> Callable[[Path], None]:
    """Return an edit of a folder that replaces `old` by `new` in a file."""

    def edit(directory: Path) -> None:
        content = (directory / file).read_bytes()
        assert old in content, content[:1000]
        (directory / file).write_bytes(content.replace(old, new, 1))

    return edit


def make_claim(file: str, offset: int, layout: str, value: int) -> Callable[[Path], None]:
    """Return an edit that overwrites the binary number at a byte offset. `layout` is its format in `struct`."""

    def edit(directory: Path) -> None:
        content = bytearray((directory / file).read_bytes())
        struct.pack_into(layout, content, offset, value)
        (directory / file).write_bytes(content)

    return edit


def make_torch_edit(file: str, edit_content: Callable[[Any], object]) -> Callable[[Path], None]:
    """Return an edit of the object in a file of torch.save."""

    def edit(directory: Path) -> None:
        content = torch.load(directory / file, weights_only=True)
        edit_content(content)
        torch.save(content, directory / file)

    return edit


def enlarge_tensor(directory: Path) -> None:
    """Claim 10**15 elements for a tensor in `.metadata`."""
    metadata = pickle.loads((directory / ".metadata").read_bytes())
    entry = next(entry for name, entry in metadata.state_dict_metadata.items() if name.endswith("tokens.weight"))
    entry.size = torch.Size((10**12, 1000))
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))


def enlarge_tensor_consistently(directory: Path) -> None:
    """Claim 10**15 elements for a tensor, in all fields of `.metadata` that tell its size."""
    metadata = pickle.loads((directory / ".metadata").read_bytes())
    name = next(name for name in metadata.state_dict_metadata if name.endswith("tokens.weight"))
    entry = metadata.state_dict_metadata[name]
    entry.size = entry.chunks[0].sizes = torch.Size((10**12, 1000))
    for index, storage in metadata.storage_data.items():
        if index.fqn == name:
            storage.length = 10**16
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))


# A YAML file whose aliases expand to 9**11 values.
YAML_ALIASES = "a0: &a0 [x, x]\n" + "".join(
    f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]\n" for level in range(1, 12)
)
FILE_OUTSIDE = b'"file": "../train-00000.bin"'
ABSOLUTE_FILE = b'"file": "/etc/passwd"'
HUGE_SIZE = 10**15
# What the file claims: (reader, edit of the valid folder, pattern of the error)
HOSTILE_EDITS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "tokens": (
        "corpus",
        make_replace("manifest.json", b'"tokens": 55', b'"tokens": 1000000000000000'),
        "less than or equal",
    ),
    "documents": (
        "corpus",
        make_replace("manifest.json", b'"documents": 3', b'"documents": 99999999999'),
        "truncated at",
    ),
    "offset": (
        "corpus",
        make_claim("train-00000.offsets", offset=16, layout="<Q", value=2**63 + 5),
        "document offsets do not ascend within",
    ),
    "far offset": (
        "corpus",
        make_claim("train-00000.offsets", offset=16, layout="<Q", value=HUGE_SIZE),
        "document offsets do not ascend within",
    ),
    "prompt": (
        "corpus with prompts",
        make_claim("train-00000.offsets", offset=8, layout="<Q", value=HUGE_SIZE),
        "document offsets do not ascend",
    ),
    "shard outside": (
        "corpus",
        make_replace("manifest.json", b'"file": "train-00000.bin"', FILE_OUTSIDE),
        "outside the corpus",
    ),
    "shard of root": (
        "corpus",
        make_replace("manifest.json", b'"file": "train-00000.bin"', ABSOLUTE_FILE),
        "outside the corpus",
    ),
    "sequences": (
        "megatron",
        make_claim("x.idx", offset=18, layout="<Q", value=HUGE_SIZE),
        "truncated: .* but 1000000000000000 sequences",
    ),
    "negative sequence": (
        "megatron",
        make_claim("x.idx", offset=38, layout="<i", value=-3),
        "byte 38: sequence 1 has -3 tokens",
    ),
    "safetensors header": (
        "safetensors",
        make_claim("model-00001-of-00003.safetensors", offset=0, layout="<Q", value=HUGE_SIZE),
        "cannot be read",
    ),
    "safetensors index": (
        "safetensors",
        make_replace("model.safetensors.index.json", b"model-00001-of", b"../model-00001-of"),
        "names a file outside its directory",
    ),
    "torch index": (
        "pytorch_model.bin of many",
        make_replace("pytorch_model.bin.index.json", b'"a.bin"', b'"/etc/passwd"'),
        "names a file outside its directory",
    ),
    "layers": (
        "gpt2",
        make_replace("config.json", b'"n_layer": 1', b'"n_layer": 1000000000000000'),
        "not a number of layers",
    ),
    "width": ("gpt2", make_replace("config.json", b'"n_embd": 8', b'"n_embd": 1000000000000000'), "less than or equal"),
    "expanded tensor": (
        "ckpt.pt",
        make_torch_edit(
            "ckpt.pt",
            lambda content: content["model"].update({"transformer.wpe.weight": torch.ones(1, 1).expand(HUGE_SIZE, 8)}),
        ),
        "larger than the file",
    ),
    "sparse tensor": (
        "ckpt.pt",
        make_torch_edit("ckpt.pt", lambda content: content["model"].update(x=torch.ones(1).to_sparse())),
        "no plain tensor",
    ),
    "larger tensor": ("checkpoint", enlarge_tensor, "has shape .* but 512 elements in its chunks"),
    "longer tensor": ("checkpoint", enlarge_tensor_consistently, "but its tensors end at byte"),
    "tag outside": ("zero 1", make_replace("latest", b"global_step3", b"../x"), "does not name a directory beside it"),
    "ranks": (
        "zero 1",
        make_torch_edit(
            "global_step3/mp_rank_00_model_states.pt", lambda content: content.update(dp_world_size=HUGE_SIZE)
        ),
        "ranks saved it",
    ),
    "aliases": (
        "yaml",
        lambda directory: (directory / "config.yaml").write_text(YAML_ALIASES),
        "more than 100,000 values",
    ),
    "nested": ("yaml", lambda directory: (directory / "config.yaml").write_text("[" * 9999), "nested too deeply"),
    "nested manifest": ("corpus", lambda directory: (directory / "manifest.json").write_text("[" * 99999), "as JSON"),
    "id": ("tokenizer.json", make_replace("tokenizer.json", b": 255", b": 1000000000000000"), "below 16777216"),
}


@pytest.mark.parametrize("hostile_claim", HOSTILE_EDITS)
def test_hostile_files_are_rejected(
    hostile_claim: str, get_valid_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    name, edit, message = HOSTILE_EDITS[hostile_claim]
    folder = tmp_path / "folder"
    shutil.copytree(get_valid_folder(name), folder)
    edit(folder)
    with limit_memory_and_time(), pytest.raises(UserError, match=message):
        READERS[name].read(folder)
