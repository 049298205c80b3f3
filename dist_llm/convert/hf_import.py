"""Read directories of Hugging Face's `transformers` as our weights and model config, one tensor at a time.

`hf_tensors.py` has the tables of tensor names, and `hf_config.py` converts the config.
"""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dist_llm.config.model_section import ModelConfig
from dist_llm.convert.hf_config import parse_hf_config
from dist_llm.convert.hf_families import DECODER_FAMILIES
from dist_llm.convert.hf_tensor_mapping import HF_ONLY_PREFIX, NATIVE_ONLY, TensorMapping, to_native
from dist_llm.convert.hf_tensors import list_tensor_mappings
from dist_llm.convert.native_shapes import list_native_shapes
from dist_llm.convert.weights import LazyWeights, Weights
from dist_llm.errors import CheckpointError
from dist_llm.models.build_model import build_param_specs
from dist_llm.param_spec import list_vocab_params
from dist_llm.text.hf_folder import TOKEN_ID_KEYS

BODY_PREFIXES = ("transformer.", "model.", "bert.", "gpt_neox.")  # prefixes of tensor names that some checkpoints omit

# Name in the latest version of transformers -> name in files of older versions.
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


def from_huggingface(weights: Weights, model: ModelConfig, family: str) -> Weights:
    """Return a view of Hugging Face tensors under our names. The padding of the vocabulary is zero.

    The view also has the tensors that only Hugging Face has, with HF_ONLY_PREFIX. Tensors are read and converted when
    they are read from the view.

    Raises CheckpointError if a tensor is missing, has another shape, or has no counterpart in our model.
    """
    table = list_tensor_mappings(family, model)
    mapped_names = {name for mapping in table for name in (mapping.hf_name, mapping.plus_row)}
    stored_names = {_add_body_prefix(name, mapped_names): name for name in weights.shapes}
    _check_unmapped(weights, stored_names, mapped_names, family, find_prediction_layer(weights, model, family))
    mappings = {name: list(group) for name, group in groupby(table, key=lambda mapping: mapping.native_name)}
    hf_only = {
        name
        for mapping in table
        if mapping.skip or mapping.plus_row
        for name in (mapping.hf_name, mapping.plus_row)
        if name in stored_names
    }
    reader = _HuggingFaceReader(weights, model, family, stored_names, mappings)
    shapes = {f"model.{name}": shape for name, shape in reader.native_shapes.items()}
    shapes |= {HF_ONLY_PREFIX + name: weights.shapes[stored_names[name]] for name in sorted(hf_only)}
    return LazyWeights(shapes, reader.compute_tensor)


class _HuggingFaceReader:
    """Reads Hugging Face tensors and converts them to our tensors.

    `stored_names` maps the names of the tables to names in `weights`. `mappings` has the mappings of each of our
    tensors: one, or one for each expert.
    """

    def __init__(
        self,
        weights: Weights,
        model: ModelConfig,
        family: str,
        stored_names: Mapping[str, str],
        mappings: Mapping[str, Sequence[TensorMapping]],
    ) -> None:
        self.weights, self.family, self.vocab_size = weights, family, model.vocab_size
        self.stored_names, self.mappings = stored_names, mappings
        self.native_shapes = list_native_shapes(model)
        self.vocab_params = list_vocab_params(build_param_specs(model))

    def compute_tensor(self, name: str) -> Tensor:
        """Return our tensor `name`, which has the prefix `model.` or HF_ONLY_PREFIX."""
        if name.startswith(HF_ONLY_PREFIX):
            return self._read_hf(name.removeprefix(HF_ONLY_PREFIX))
        name = name.removeprefix("model.")
        shape = self.native_shapes[name]
        if NATIVE_ONLY.fullmatch(name):
            return torch.full(shape, 1 / shape[0])  # a uniform load; the shape is [experts]
        (mapping, *_) = mappings = self.mappings[name]
        if mapping.expert is None:
            return self._read_mapped(mapping, name, shape)
        tensor = torch.empty(shape)
        for expert_mapping in mappings:
            tensor[expert_mapping.expert] = self._read_mapped(expert_mapping, name, shape[1:])
        return tensor

    def _read_hf(self, name: str) -> Tensor:
        """Read the Hugging Face tensor `name` in fp32."""
        if self.family == "t5" and name == "lm_head.weight" and name not in self.stored_names:
            name = "shared.weight"  # the head is tied to the embedding, which the config of T5 v1.1 does not record
        if name not in self.stored_names:
            raise CheckpointError(f"the Hugging Face checkpoint lacks {name}")
        return self.weights.read(self.stored_names[name]).float()

    def _read_mapped(self, mapping: TensorMapping, name: str, shape: tuple[int, ...]) -> Tensor:
        """Return our tensor `name` of this shape, or its part for one expert."""
        tensor = to_native(mapping, {key: self._read_hf(key) for key in (mapping.hf_name, mapping.plus_row) if key})
        num_rows = len(tensor)
        if name in self.vocab_params and num_rows == self.vocab_size < shape[0] and tensor.shape[1:] == shape[1:]:
            tensor = torch.cat((tensor, tensor.new_zeros(shape[0] - num_rows, *shape[1:])))
        if tuple(tensor.shape) != shape:
            raise CheckpointError(
                f"{mapping.hf_name} gives {name} the shape {list(tensor.shape)} instead of {list(shape)}"
            )
        return tensor


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


def read_token_ids(directory: Path) -> dict[str, Any]:
    """Read the special ids from a Hugging Face config.json, for `export_hf`."""
    content = _read_json(directory / "config.json")
    return {key: content[key] for key in TOKEN_ID_KEYS if key in content}


class HFConfig(NamedTuple):
    """The content of a Hugging Face config.json."""

    family: str  # model_type
    model: ModelConfig


def read_hf_config(directory: Path, ignored: Collection[str] = ()) -> HFConfig:
    """Read the config.json of a Hugging Face directory. Unknown fields in `ignored` are no error.

    Raises CheckpointError if there is no config or it is not supported.
    """
    content = _read_json(directory / "config.json")
    return HFConfig(str(content.get("model_type")), parse_hf_config(content, ignored))


def _read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises CheckpointError for any other content."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: contains a {type(content).__name__} instead of an object; copy it again")
    return content
