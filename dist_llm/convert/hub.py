"""A checkpoint of ours <-> a directory that Hugging Face's `transformers` loads, one tensor at a time."""

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_llm.checkpoint.init_from import VOCAB_TENSORS
from dist_llm.config.lengths import extra_ids
from dist_llm.config.schema import Config, ModelConfig
from dist_llm.convert.huggingface import describe, model_config
from dist_llm.convert.keys import Pair, groups, pairs, put, take
from dist_llm.convert.tokenizer import export_chars, export_files, export_tokenizer
from dist_llm.convert.weights import MadeWeights, Weights
from dist_llm.convert.write import SHARD_BYTES, write_safetensors
from dist_llm.errors import CheckpointError
from dist_llm.models.build_model import build_model
from dist_llm.text.bpe_tokenizer import BPETokenizer
from dist_llm.text.char_tokenizer import CharTokenizer
from dist_llm.text.hf_folder import GENERATION_FILE, TOKEN_IDS
from dist_llm.text.hf_tokenizer import HFTokenizer
from dist_llm.text.tokenizer import Tokenizer

KEPT = "theirs."  # tensors of theirs that ours has no place for, kept beside it for the way back
SEGMENTS = "bert.embeddings.token_type_embeddings.weight"
PREFIXES = ("transformer.", "model.", "bert.")  # of the body, which some checkpoints leave out

# Of theirs: buffers that the config determines.
_GPT2, _ROPE = r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias", r".*rotary_emb\.inv_freq"
COMPUTED = {
    **dict.fromkeys(("gpt2", "nanogpt"), re.compile(_GPT2)),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), re.compile(_ROPE)),
    "bert": re.compile(r"(bert\.)?embeddings\.position_ids"),
}
# Of BERT's: heads for sentence pairs, which masked tokens do not use. `unused_heads` names them.
UNUSED = re.compile(r"(bert\.)?pooler\..*|cls\.seq_relationship\..*")
COPIES = {
    "lm_head.weight": ("transformer.wte.weight", "model.embed_tokens.weight", "model.shared.weight", "shared.weight"),
    "cls.predictions.decoder.weight": ("bert.embeddings.word_embeddings.weight",),
    "cls.predictions.decoder.bias": ("cls.predictions.bias",),
    **{
        f"{stem}{stack}.embed_tokens.weight": ("model.shared.weight", "shared.weight")
        for stem in ("", "model.")
        for stack in ("encoder", "decoder")
    },
}


def model_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """{parameter of ours: shape}, vocabulary padding included."""
    with torch.device("meta"):
        return {name: tuple(parameter.shape) for name, parameter in build_model(model).named_parameters()}


def to_huggingface(weights: Weights, model: ModelConfig, family: str) -> Weights:
    """A view of our checkpoint under their names, without vocabulary padding.

    Raises CheckpointError where the checkpoint lacks a parameter.
    """
    ours = model_shapes(model)
    if missing := sorted(name for name in ours if weights.shapes.get(f"model.{name}") != ours[name]):
        raise CheckpointError(f"the checkpoint lacks {missing[0]}, or has it in another shape")
    table = pairs(family, model)
    if left := sorted(ours.keys() - {pair.ours for pair in table}):
        raise AssertionError(f"not in the table of {family}: {left}")
    parts = dict(groups(table))
    kept = {name.removeprefix(KEPT) for name in weights.shapes if name.startswith(KEPT)}

    def ours_of(name: str) -> Tensor:
        tensor = weights.read(f"model.{name}")
        return tensor[: model.vocab_size] if name.startswith(VOCAB_TENSORS) else tensor

    def on_meta(name: str) -> Tensor:
        shape = ours[name]
        return torch.empty((model.vocab_size, *shape[1:]) if name.startswith(VOCAB_TENSORS) else shape, device="meta")

    def make(name: str) -> Tensor:
        before = {each: weights.read(KEPT + each) for each in {name, SEGMENTS} & kept}
        if name != SEGMENTS:
            return put(parts[name], ours_of, before)
        # As they came, if positions are as they came: they are in them.
        (pair,) = [pair for pair in table if pair.plus_row]
        came = before and torch.equal(put(parts[pair.theirs], ours_of, {}), _folded(weights, pair))
        return before[name] if came else torch.zeros(2, model.d_model)

    shapes = {name: tuple(put(group, on_meta, {}).shape) for name, group in parts.items()}
    if any(pair.plus_row for pair in table):
        shapes[SEGMENTS] = weights.shapes.get(KEPT + SEGMENTS, (2, model.d_model))
    return MadeWeights(shapes, make)


def _folded(weights: Weights, pair: Pair) -> Tensor:
    return weights.read(KEPT + pair.theirs) + weights.read(KEPT + pair.plus_row)[0]


def from_huggingface(theirs: Weights, model: ModelConfig, family: str) -> Weights:
    """A view of their tensors under our names, with vocabulary padding (zero), and what of theirs has to be kept.

    Raises CheckpointError where a tensor is missing, has another shape, or is one that we have no place for.
    """
    ours, table = model_shapes(model), pairs(family, model)
    known = {name for pair in table for name in (pair.theirs, pair.plus_row)}
    place = {_full(name, known): name for name in theirs.shapes}
    _refuse_leftovers(theirs, place, known, family)
    of = {pair.ours: pair for pair in table}
    kept = {name for pair in table if pair.skip or pair.plus_row for name in (pair.theirs, pair.plus_row) if name}

    def read(name: str) -> Tensor:
        if family == "t5" and name == "lm_head.weight" and name not in place:
            name = "shared.weight"  # equal when it was saved, which v1.1 does not say
        if name not in place:
            raise CheckpointError(f"their checkpoint lacks {name}")
        return theirs.read(place[name]).float()

    def make(name: str) -> Tensor:
        if name.startswith(KEPT):
            return read(name.removeprefix(KEPT))
        name = name.removeprefix("model.")
        pair, shape = of[name], ours[name]
        tensor = take(pair, {each: read(each) for each in (pair.theirs, pair.plus_row) if each})
        if name.startswith(VOCAB_TENSORS) and tuple(tensor.shape) == (model.vocab_size, *shape[1:]):
            tensor = torch.cat((tensor, tensor.new_zeros(shape[0] - len(tensor), *shape[1:])))
        if tuple(tensor.shape) != shape:
            raise CheckpointError(f"{pair.theirs} gives {name} the shape {list(tensor.shape)} instead of {list(shape)}")
        return tensor

    shapes = {f"model.{name}": shape for name, shape in ours.items()}
    shapes |= {KEPT + name: theirs.shapes[place[name]] for name in sorted(kept) if name in place}
    return MadeWeights(shapes, make)


def _full(name: str, known: set[str]) -> str:
    """`name` with the prefix of the body, if it came without."""
    return next((prefix + name for prefix in PREFIXES if name not in known and prefix + name in known), name)


def _refuse_leftovers(theirs: Weights, place: Mapping[str, str], known: set[str], family: str) -> None:
    for full, name in place.items():
        if full in known or (family in COMPUTED and COMPUTED[family].fullmatch(name)):
            continue
        if family == "bert" and UNUSED.fullmatch(name):
            continue
        originals = [place[each] for each in COPIES.get(full, ()) if each in place]
        if originals and torch.equal(theirs.read(name), theirs.read(originals[0])):
            continue
        if full == "final_logits_bias" and not theirs.read(name).any():
            continue
        raise CheckpointError(f"their tensor {name} {list(theirs.shapes[name])} has no place in our model")


def unused_heads(theirs: Weights) -> list[str]:
    """Their tensors that belong to heads which our models do not have, to be named where they are left out."""
    return sorted(name for name in theirs.shapes if UNUSED.fullmatch(name))


def export(
    weights: Weights,
    config: Config,
    tokenizer: Tokenizer | None,
    directory: Path,
    family: str = "",
    dtype: torch.dtype = torch.float32,
    shard_bytes: int = SHARD_BYTES,
    ids: Mapping[str, Any] | None = None,
    generation: bytes | None = None,
) -> Weights:
    """Write all that `from_pretrained` needs into `directory`; return the view of what was written.

    `ids` are those of TOKEN_IDS, and `generation` is generation_config.json, where the model came from there; else they
    are the tokenizer's. A tokenizer that came with files gives them back unchanged.

    Raises CheckpointError where the model has no twin there.
    """
    theirs = describe(config.model, family)
    view = to_huggingface(weights, config.model, theirs["model_type"])
    directory.mkdir()
    theirs["dtype"] = str(dtype).removeprefix("torch.")
    ids = _token_ids(config, tokenizer) if ids is None else ids
    theirs |= ids
    _write_json(directory / "config.json", theirs)
    if config.model.architecture != "encoder":
        _write_json(directory / GENERATION_FILE, {"_from_model_config": True, **ids})
    try:
        _export_tokenizer(tokenizer, directory, config)
    except CheckpointError as error:
        raise CheckpointError(f"{error} Weights can be exported alone, with --no-tokenizer.") from None
    if generation is not None:
        (directory / GENERATION_FILE).write_bytes(generation)
    write_safetensors(directory, view, dtype, shard_bytes)
    return view


def _token_ids(config: Config, tokenizer: Tokenizer | None) -> dict[str, int | None]:
    """None where there is no tokenizer to ask: a family's defaults would be ids of another one."""
    if isinstance(tokenizer, HFTokenizer) and tokenizer.token_ids:
        return tokenizer.token_ids
    ids: dict[str, int | None] = dict.fromkeys(
        ("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.eot if tokenizer is not None else None
    )
    if config.model.architecture == "encoder_decoder":
        start = tokenizer.vocabulary().special("start") if tokenizer is not None else None
        ids["decoder_start_token_id"] = start
    return ids


def _export_tokenizer(tokenizer: Tokenizer | None, directory: Path, config: Config) -> None:
    if isinstance(tokenizer, BPETokenizer):
        export_tokenizer(tokenizer, directory, config.model, extra_ids(config))
    elif isinstance(tokenizer, CharTokenizer):
        export_chars(tokenizer, directory)
    elif tokenizer is not None:
        export_files(tokenizer, directory)


def token_ids(directory: Path) -> dict[str, Any]:
    """Those of their config.json, as `export` takes them."""
    content = _read_json(directory / "config.json")
    return {key: content[key] for key in TOKEN_IDS if key in content}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_config(directory: Path, ignored: Collection[str] = ()) -> tuple[str, ModelConfig]:
    """(family, our model) of their directory; fields in `ignored` need not be known.

    Raises CheckpointError where there is none or it is not supported.
    """
    theirs = _read_json(directory / "config.json")
    return str(theirs.get("model_type")), model_config(theirs, ignored)


def _read_json(path: Path) -> dict[str, Any]:
    """Raises CheckpointError for anything but an object."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, where an object belongs; copy it again")
    return content
