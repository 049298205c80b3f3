"""Convert between our checkpoints and directories that Hugging Face's `transformers` loads, one tensor at a time.

`hf_tensors.py` has the tables of tensor names, and `hf_config.py` converts the config.
"""

import json
import re
from collections.abc import Collection, Mapping
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_llm.config.model_section import ModelConfig
from dist_llm.config.schema import Config
from dist_llm.config.sequence_lengths import count_objective_ids
from dist_llm.convert.export_tokenizers import export_char_tokenizer, export_original_files, export_tokenizer
from dist_llm.convert.hf_config import build_hf_config, parse_hf_config
from dist_llm.convert.hf_families import DECODER_FAMILIES
from dist_llm.convert.hf_tensor_mapping import TensorMapping, group_by_hf_name, to_hf, to_native
from dist_llm.convert.hf_tensors import tensor_mappings
from dist_llm.convert.weights import LazyWeights, Weights
from dist_llm.convert.write_weights import SHARD_BYTES, write_safetensors
from dist_llm.errors import CheckpointError
from dist_llm.models.build_model import build_model, build_param_specs
from dist_llm.param_spec import iter_weights, list_vocab_params
from dist_llm.text.bpe_tokenizer import BPETokenizer
from dist_llm.text.char_tokenizer import CharTokenizer
from dist_llm.text.hf_folder import GENERATION_FILE, TOKEN_ID_KEYS
from dist_llm.text.hf_tokenizer import HFTokenizer
from dist_llm.text.tokenizer import Tokenizer

# Prefix of tensors that only the model of Hugging Face has. A checkpoint saves these tensors for a later export.
HF_ONLY_PREFIX = "theirs."
SEGMENT_EMBEDDINGS = "bert.embeddings.token_type_embeddings.weight"
BODY_PREFIXES = ("transformer.", "model.", "bert.", "gpt_neox.")  # prefixes of tensor names that some checkpoints omit

# Name in the latest version of transformers -> name in files.
OLDER_NAMES = {"lm_head.weight": "embed_out.weight"}  # GPT-NeoX

# Names of buffers in Hugging Face's models whose values follow from the config.
_GPT2, _ROPE = r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias", r".*rotary_emb\.inv_freq"
_NEOX = r".*\.attention\.(masked_)?bias"
BUFFERS = {
    **dict.fromkeys(("gpt2", "nanogpt"), re.compile(_GPT2)),
    **dict.fromkeys(DECODER_FAMILIES, re.compile(_ROPE)),
    "gpt_neox": re.compile(f"{_ROPE}|{_NEOX}"),
    "bert": re.compile(r"(bert\.)?embeddings\.position_ids"),
}
# Heads of BERT for sentence pairs, which masked language modeling does not use. `find_unused_heads` lists them.
UNUSED_HEADS = re.compile(r"(bert\.)?pooler\..*|cls\.seq_relationship\..*")
# Tensor name -> names of tensors that must have equal values, because the model ties them.
TIED_NAMES = {
    "lm_head.weight": (
        *("transformer.wte.weight", "model.shared.weight", "shared.weight"),
        *{f"{family.other_names['embed.tokens']}.weight" for family in DECODER_FAMILIES.values()},
    ),
    "cls.predictions.decoder.weight": ("bert.embeddings.word_embeddings.weight",),
    "cls.predictions.decoder.bias": ("cls.predictions.bias",),
    **{
        f"{stem}{stack}.embed_tokens.weight": ("model.shared.weight", "shared.weight")
        for stem in ("", "model.")
        for stack in ("encoder", "decoder")
    },
}


# Buffers that only our model has. An import gives them their initial value, which is the same for all experts.
NATIVE_ONLY = re.compile(r"blocks\.\d+\.feedforward\.previous_load")


def model_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return {native name of a parameter or buffer: shape}; the vocabulary is padded."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in iter_weights(build_model(model))}


def to_huggingface(weights: Weights, model: ModelConfig, family: str) -> Weights:
    """Return a view of our weights under the names of Hugging Face, without the padding of the vocabulary.

    Raises CheckpointError if the checkpoint lacks a parameter.
    """
    native_shapes, vocab_params = model_shapes(model), list_vocab_params(build_param_specs(model))
    if missing := sorted(name for name in native_shapes if weights.shapes.get(f"model.{name}") != native_shapes[name]):
        raise CheckpointError(f"the checkpoint lacks {missing[0]}, or has it in another shape")
    table = tensor_mappings(family, model)
    unmapped = native_shapes.keys() - {mapping.native for mapping in table}
    if unknown := sorted(name for name in unmapped if not NATIVE_ONLY.fullmatch(name)):
        raise AssertionError(f"not in the table of {family}: {unknown}")
    by_hf_name = dict(group_by_hf_name(table))
    hf_only = {name.removeprefix(HF_ONLY_PREFIX) for name in weights.shapes if name.startswith(HF_ONLY_PREFIX)}

    def read_native(name: str) -> Tensor:
        tensor = weights.read(f"model.{name}")
        return tensor[: model.vocab_size] if name in vocab_params else tensor

    # Hugging Face has a tensor for each expert of this tensor. They follow each other, so it is read once.
    read_experts = lru_cache(maxsize=1)(read_native)

    def make_meta_tensor(name: str) -> Tensor:
        shape = native_shapes[name]
        return torch.empty((model.vocab_size, *shape[1:]) if name in vocab_params else shape, device="meta")

    def compute_tensor(name: str) -> Tensor:
        saved = {key: weights.read(HF_ONLY_PREFIX + key) for key in {name, SEGMENT_EMBEDDINGS} & hf_only}
        if name != SEGMENT_EMBEDDINGS:
            group = by_hf_name[name]
            return to_hf(group, read_native if group[0].expert is None else read_experts, saved)
        # Our position embeddings include the first segment. If they are unchanged, so are the saved segments.
        (position_mapping,) = [mapping for mapping in table if mapping.plus_row]
        current = to_hf(by_hf_name[position_mapping.hf], read_native, {})
        is_unchanged = saved and torch.equal(current, _read_positions_with_segment(weights, position_mapping))
        return saved[name] if is_unchanged else torch.zeros(2, model.d_model)

    shapes = {name: tuple(to_hf(group, make_meta_tensor, {}).shape) for name, group in by_hf_name.items()}
    if any(mapping.plus_row for mapping in table):
        shapes[SEGMENT_EMBEDDINGS] = weights.shapes.get(HF_ONLY_PREFIX + SEGMENT_EMBEDDINGS, (2, model.d_model))
    return LazyWeights(shapes, compute_tensor)


def _read_positions_with_segment(weights: Weights, mapping: TensorMapping) -> Tensor:
    """Return the imported position embeddings plus the first segment embedding."""
    return weights.read(HF_ONLY_PREFIX + mapping.hf) + weights.read(HF_ONLY_PREFIX + mapping.plus_row)[0]


def from_huggingface(weights: Weights, model: ModelConfig, family: str) -> Weights:
    """Return a view of Hugging Face tensors under our names. The padding of the vocabulary is zero.

    The view also has the tensors with HF_ONLY_PREFIX.

    Raises CheckpointError if a tensor is missing, has another shape, or has no counterpart in our model.
    """
    native_shapes, table = model_shapes(model), tensor_mappings(family, model)
    vocab_params = list_vocab_params(build_param_specs(model))
    mapped_names = {name for mapping in table for name in (mapping.hf, mapping.plus_row)}
    stored_names = {_add_body_prefix(name, mapped_names): name for name in weights.shapes}
    _check_unmapped(weights, stored_names, mapped_names, family, find_prediction_layer(weights, model, family))
    by_native_name = {name: list(group) for name, group in groupby(table, key=lambda mapping: mapping.native)}
    hf_only = {
        name for mapping in table if mapping.skip or mapping.plus_row for name in (mapping.hf, mapping.plus_row) if name
    }

    def read(name: str) -> Tensor:
        if family == "t5" and name == "lm_head.weight" and name not in stored_names:
            name = "shared.weight"  # the head is tied to the embedding, which the config of T5 v1.1 does not record
        if name not in stored_names:
            raise CheckpointError(f"the Hugging Face checkpoint lacks {name}")
        return weights.read(stored_names[name]).float()

    def compute_tensor(name: str) -> Tensor:
        if name.startswith(HF_ONLY_PREFIX):
            return read(name.removeprefix(HF_ONLY_PREFIX))
        name = name.removeprefix("model.")
        shape = native_shapes[name]
        if NATIVE_ONLY.fullmatch(name):
            return torch.full(shape, 1 / shape[0])
        (mapping, *_) = mappings = by_native_name[name]
        if mapping.expert is not None:
            tensor = torch.empty(shape)
            for expert_mapping in mappings:
                tensor[expert_mapping.expert] = read_part(expert_mapping, name, shape[1:])
            return tensor
        return read_part(mapping, name, shape)

    def read_part(mapping: TensorMapping, name: str, shape: tuple[int, ...]) -> Tensor:
        """Return our tensor `name` of this shape, or its part for one expert."""
        tensor = to_native(mapping, {key: read(key) for key in (mapping.hf, mapping.plus_row) if key})
        if name in vocab_params and tuple(tensor.shape) == (model.vocab_size, *shape[1:]):
            tensor = torch.cat((tensor, tensor.new_zeros(shape[0] - len(tensor), *shape[1:])))
        if tuple(tensor.shape) != shape:
            raise CheckpointError(f"{mapping.hf} gives {name} the shape {list(tensor.shape)} instead of {list(shape)}")
        return tensor

    shapes = {f"model.{name}": shape for name, shape in native_shapes.items()}
    hf_only &= stored_names.keys()
    shapes |= {HF_ONLY_PREFIX + name: weights.shapes[stored_names[name]] for name in sorted(hf_only)}
    return LazyWeights(shapes, compute_tensor)


def _add_body_prefix(name: str, mapped_names: set[str]) -> str:
    """Return `name` with the prefix of the body if `name` lacks that prefix, and the older name of a renamed tensor."""
    name = OLDER_NAMES.get(name, name) if OLDER_NAMES.get(name) in mapped_names else name
    if name in mapped_names:
        return name
    return next((prefix + name for prefix in BODY_PREFIXES if prefix + name in mapped_names), name)


def _check_unmapped(
    weights: Weights, stored_names: Mapping[str, str], mapped_names: set[str], family: str, unused_layer: str
) -> None:
    """Raise CheckpointError for a stored tensor without a counterpart in our model that is not redundant.

    `unused_layer` is the prefix of a layer that an import leaves out, or "".
    """
    for full_name, name in stored_names.items():
        if full_name in mapped_names or (family in BUFFERS and BUFFERS[family].fullmatch(name)):
            continue
        if (family == "bert" and UNUSED_HEADS.fullmatch(name)) or (unused_layer and name.startswith(unused_layer)):
            continue
        originals = [stored_names[tied] for tied in TIED_NAMES.get(full_name, ()) if tied in stored_names]
        if originals and torch.equal(weights.read(name), weights.read(originals[0])):
            continue
        if full_name == "final_logits_bias" and not weights.read(name).any():
            continue
        raise CheckpointError(f"the tensor {name} {list(weights.shapes[name])} has no counterpart in our model")


def find_unused_heads(weights: Weights) -> list[str]:
    """Return the names of tensors of heads that our models lack, so that the caller can report them."""
    return sorted(name for name in weights.shapes if UNUSED_HEADS.fullmatch(name))


def find_prediction_layer(weights: Weights, model: ModelConfig, family: str) -> str:
    """Return the prefix of the layer behind the last one, which predicts further tokens (GLM-4.5); "" without one.

    Our models lack it, as those of transformers do.
    """
    prefix = f"model.layers.{model.n_layers}."
    return prefix if family == "glm4_moe" and any(name.startswith(prefix) for name in weights.shapes) else ""


def export_hf(
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
    """Write all files that `from_pretrained` needs into `directory`. Return the view of the written tensors.

    If the model was imported from Hugging Face, `ids` has the special ids and `generation` is the content of
    generation_config.json. Otherwise they come from the tokenizer. An imported tokenizer is written back unchanged.

    Raises CheckpointError if no Hugging Face model is equivalent.
    """
    hf_config = build_hf_config(config.model, family)
    view = to_huggingface(weights, config.model, hf_config["model_type"])
    directory.mkdir()
    hf_config["dtype"] = str(dtype).removeprefix("torch.")
    ids = _token_ids(config, tokenizer) if ids is None else ids
    hf_config |= ids
    _write_json(directory / "config.json", hf_config)
    if config.model.architecture != "encoder":
        _write_json(directory / GENERATION_FILE, {"_from_model_config": True, **ids})
    try:
        _export_tokenizer(tokenizer, directory, config)
    except CheckpointError as error:
        raise CheckpointError(f"{error} Use --no-tokenizer to export only the weights.") from None
    if generation is not None:
        (directory / GENERATION_FILE).write_bytes(generation)
    write_safetensors(directory, view, dtype, shard_bytes)
    return view


def _token_ids(config: Config, tokenizer: Tokenizer | None) -> dict[str, int | None]:
    """Return the special ids.

    Without a tokenizer, each id is None, because the defaults belong to another tokenizer.
    """
    if isinstance(tokenizer, HFTokenizer) and tokenizer.token_ids:
        return tokenizer.token_ids
    ids: dict[str, int | None] = dict.fromkeys(
        ("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.eot if tokenizer is not None else None
    )
    if config.model.architecture == "encoder_decoder":
        start_id = tokenizer.build_objective_vocabulary().special_id("start") if tokenizer is not None else None
        ids["decoder_start_token_id"] = start_id
    return ids


def _export_tokenizer(tokenizer: Tokenizer | None, directory: Path, config: Config) -> None:
    if isinstance(tokenizer, BPETokenizer):
        export_tokenizer(tokenizer, directory, config.model, count_objective_ids(config))
    elif isinstance(tokenizer, CharTokenizer):
        export_char_tokenizer(tokenizer, directory)
    elif tokenizer is not None:
        export_original_files(tokenizer, directory)


def read_token_ids(directory: Path) -> dict[str, Any]:
    """Read the special ids from a Hugging Face config.json, for `export_hf`."""
    content = _read_json(directory / "config.json")
    return {key: content[key] for key in TOKEN_ID_KEYS if key in content}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_config(directory: Path, ignored: Collection[str] = ()) -> tuple[str, ModelConfig]:
    """Return (family, our model config) of a Hugging Face directory. Unknown fields in `ignored` are no error.

    Raises CheckpointError if there is no config or it is not supported.
    """
    content = _read_json(directory / "config.json")
    return str(content.get("model_type")), parse_hf_config(content, ignored)


def _read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises CheckpointError for any other content."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: contains a {type(content).__name__} instead of an object; copy it again")
    return content
