"""Write and read tiny checkpoints of this and other tools: native, Hugging Face, nanoGPT, DeepSpeed."""

import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch

from dist_llm.checkpoint.checkpoint_folder import CheckpointFolder
from dist_llm.checkpoint.checkpoint_state import Progress
from dist_llm.checkpoint.compatibility import read_config
from dist_llm.checkpoint.load_checkpoint import read_progress
from dist_llm.checkpoint.manifest import read_manifest, verify_checkpoint
from dist_llm.checkpoint.native_weights import NativeWeights
from dist_llm.checkpoint.probe import parse_probe
from dist_llm.config.load import dump_config
from dist_llm.config.schema import Config
from dist_llm.convert import hf_import
from dist_llm.convert.deepspeed_write import write_deepspeed, write_universal
from dist_llm.convert.hf_export import export_hf
from dist_llm.convert.nanogpt import build_nanogpt, parse_nanogpt
from dist_llm.convert.native_shapes import list_native_shapes
from dist_llm.convert.weights import DictWeights, Weights, load_torch, open_huggingface
from dist_llm.convert.write_weights import write_native
from dist_llm.data import data_history
from dist_llm.errors import UserError
from dist_llm.text.tokenizer import Tokenizer

from .corpus_files import BYTE_TOKENIZER

MODEL = {"d_model": 8, "n_layers": 1, "n_heads": 2, "n_kv_heads": 2, "head_dim": 4, "d_ff": 16, "vocab_size": 64,
         "vocab_multiple": 1, "max_seq_len": 16}  # fmt: skip
GPT2 = {"positions": "learned", "norm": "layernorm", "bias": True, "activation": "gelu_tanh", "tie_embeddings": True}


def make_config(**model: Any) -> Config:
    """Return the config of a tiny model, with changed keys of the section `model`."""
    return Config.model_validate(
        {
            "run": {"dir": "unused", "steps": 1},
            "model": {**MODEL, **model},
            "data": {"seq_len": 16, "global_batch": 1, "micro_batch": 1},
        }
    )


def make_weights(config: Config, moments: Collection[str] = ()) -> DictWeights:
    """Return random weights, with the AdamW state of the parameters in `moments`."""
    tensors = {}
    for name, shape in list_native_shapes(config.model).items():
        tensors[f"model.{name}"] = torch.randn(shape)
        if name in moments:
            tensors |= {f"optim.{name}.{key}": torch.rand(shape) for key in ("exp_avg", "exp_avg_sq")}
            tensors[f"optim.{name}.step"] = torch.tensor(3.0)
    return DictWeights(tensors)


def read_all_weights(weights: Weights) -> None:
    """Read each tensor and check its shape."""
    for name, shape in weights.shapes.items():
        assert tuple(weights.read(name).shape) == shape, name


def write_checkpoint(directory: Path) -> None:
    """Write a native checkpoint with all files of a run."""
    config = make_config()
    segment = data_history.Segment(
        step=0, first_sample=0, global_batch=1, skip=((3, 4),),
        spec=data_history.DataSpec(
            first_sample=0, tokens=0, sample_tokens=16, seed=1, order="shuffle", windows="stream", seq_len=16,
            objective=({},), tokenizer="none", sources=(data_history.SourceRecord(name="", path="/x", content="y"),),
            stages=(data_history.StageRecord(from_tokens=0, quotas=(1,)),),
        ),
    )  # fmt: skip
    files = {
        "config.yaml": dump_config(config).encode(),
        "progress.json": json.dumps(Progress(step=3, samples=4, tokens=5, source_tokens={"a": 1}).as_dict()).encode(),
        "data.json": data_history.dump_history((segment,)),
        "probe.json": b'{"format": "dist_llm probe 1", "loss": 1.5, "logits": [1.0, null], "precision": "fp32", '
        b'"weights": "fp32"}',
        "tokenizer.json": BYTE_TOKENIZER.to_json_bytes(),
    }
    write_native(directory, make_weights(config, {"head.norm.weight"}), files)


def read_checkpoint(directory: Path) -> None:
    """Read all files, also after an error in the manifest.

    An attacker who changes a file can change its hash in the manifest too.
    """
    folder = CheckpointFolder(directory)
    problems: list[UserError] = []
    for read in (
        lambda: read_manifest(folder),
        lambda: verify_checkpoint(folder),
        lambda: read_all_weights(NativeWeights(directory)),
        lambda: list_native_shapes(read_config(directory).model),
        lambda: read_progress(folder),
        lambda: data_history.parse_history(folder.read("data.json"), "data.json"),
        lambda: parse_probe(folder.read("probe.json"), "probe.json"),
        lambda: Tokenizer.load(directory).build_objective_vocabulary(with_word_edges=True),
    ):
        try:
            read()
        except UserError as error:
            problems.append(error)
    if problems:
        raise problems[-1]  # the first problems are wrong hashes


def make_write_hf(family: str, model: dict[str, Any]) -> Callable[[Path], None]:
    """Return a function that writes a Hugging Face folder of a family; `model` are keys of the native config."""

    def write(directory: Path) -> None:
        config = make_config(**model)
        export_hf(
            make_weights(config), config, tokenizer=None, directory=directory / "hf", family=family, shard_bytes=3000
        )
        for file in (directory / "hf").iterdir():
            file.rename(directory / file.name)
        (directory / "hf").rmdir()

    return write


def write_hf_bin(directory: Path, sharded: bool = True) -> None:
    """Write GPT-2 weights as pytorch_model.bin, or sharded in two files with an index."""
    make_write_hf("gpt2", GPT2)(directory)
    weights = open_huggingface(directory)
    names = sorted(weights.shapes)
    names_by_file = {"a.bin": names[::2], "b.bin": names[1::2]} if sharded else {"pytorch_model.bin": names}
    for file, file_names in names_by_file.items():
        torch.save({name: weights.read(name) for name in file_names}, directory / file)
    if sharded:
        weight_map = {name: file for file, file_names in names_by_file.items() for name in file_names}
        (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for path in directory.glob("model*.safetensors*"):
        path.unlink()


def write_legacy_bin(directory: Path) -> None:
    """Write the weights in the format of torch before version 1.6."""
    write_hf_bin(directory, sharded=False)
    file = directory / "pytorch_model.bin"
    torch.save(torch.load(file, weights_only=True), file, _use_new_zipfile_serialization=False)


def read_hf(directory: Path) -> None:
    """Read the config and all weights of a Hugging Face folder, as a native model needs them."""
    family, model = hf_import.read_hf_config(directory)
    hf_import.read_token_ids(directory)
    weights = open_huggingface(directory)
    read_all_weights(weights)
    read_all_weights(hf_import.from_huggingface(weights, model, family))


def write_nanogpt(directory: Path) -> None:
    """Write the checkpoint of nanoGPT, ckpt.pt."""
    config = make_config(**GPT2 | {"activation": "gelu", "d_ff": 4 * MODEL["d_model"]})
    torch.save(build_nanogpt(make_weights(config), config), directory / "ckpt.pt")


def read_nanogpt(directory: Path) -> None:
    """Read all weights of ckpt.pt, as a native model needs them."""
    model, weights = parse_nanogpt(load_torch(directory / "ckpt.pt"))
    read_all_weights(hf_import.from_huggingface(weights, model, "nanogpt"))


def make_write_deepspeed(universal: bool, stage: int = 2) -> Callable[[Path], None]:
    """Return a function that writes a universal or a ZeRO checkpoint of DeepSpeed."""

    def write(directory: Path) -> None:
        config = make_config()
        names = list(list_native_shapes(config.model))
        weights = make_weights(config, names)
        if universal:
            write_universal(directory, weights, step=3)
        else:
            write_deepspeed(
                directory,
                weights,
                stage=stage,
                world_size=2,
                param_groups=[names],
                group_settings=[{"lr": 0.1}],
                step=3,
            )

    return write
