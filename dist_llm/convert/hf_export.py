"""Write our checkpoints as directories that the library transformers of Hugging Face loads, one tensor at a time."""

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_llm.config.model_section import ModelConfig
from dist_llm.config.schema import Config
from dist_llm.config.sequence_lengths import count_objective_ids
from dist_llm.convert.export_tokenizers import export_char_tokenizer, export_original_files, export_tokenizer
from dist_llm.convert.hf_config import build_hf_config
from dist_llm.convert.hf_tensor_mapping import (
    HF_ONLY_PREFIX,
    NATIVE_ONLY,
    SEGMENT_EMBEDDINGS,
    TensorMapping,
    group_by_hf_name,
    to_hf,
)
from dist_llm.convert.hf_tensors import list_tensor_mappings
from dist_llm.convert.native_shapes import list_native_shapes
from dist_llm.convert.weights import LazyWeights, Weights
from dist_llm.convert.write_weights import SHARD_BYTES, write_safetensors
from dist_llm.errors import CheckpointError
from dist_llm.models.build_model import build_param_specs
from dist_llm.param_spec import list_vocab_params
from dist_llm.text.bpe_tokenizer import BPETokenizer
from dist_llm.text.char_tokenizer import CharTokenizer
from dist_llm.text.hf_folder import GENERATION_FILE
from dist_llm.text.hf_tokenizer import HFTokenizer
from dist_llm.text.tokenizer import Tokenizer

NUM_SEGMENTS = 2  # segment embeddings of BERT: sentence A and sentence B


def to_huggingface(weights: Weights, model: ModelConfig, family: str) -> Weights:
    """Return a view of our weights under the names of Hugging Face, without the padding of the vocabulary.

    Raises CheckpointError if the checkpoint lacks a parameter.
    """
    native_shapes, vocab_params = list_native_shapes(model), list_vocab_params(build_param_specs(model))
    table = list_tensor_mappings(family, model)
    _check_params(weights, native_shapes, table, family)
    by_hf_name = dict(group_by_hf_name(table))
    hf_only = {name.removeprefix(HF_ONLY_PREFIX) for name in weights.shapes if name.startswith(HF_ONLY_PREFIX)}

    def read_native(name: str) -> Tensor:
        tensor = weights.read(f"model.{name}")
        return tensor[: model.vocab_size] if name in vocab_params else tensor

    # Our tensor of all experts becomes a tensor per expert. These are computed one after the other, so a cache of one
    # tensor suffices to read ours once.
    read_native_cached = lru_cache(maxsize=1)(read_native)

    def make_meta_tensor(name: str) -> Tensor:
        """Return our tensor `name` without data, to compute the shapes of Hugging Face."""
        shape = native_shapes[name]
        return torch.empty((model.vocab_size, *shape[1:]) if name in vocab_params else shape, device="meta")

    def compute_tensor(name: str) -> Tensor:
        """Return the Hugging Face tensor `name`."""
        saved = {key: weights.read(HF_ONLY_PREFIX + key) for key in {name, SEGMENT_EMBEDDINGS} & hf_only}
        if name != SEGMENT_EMBEDDINGS:
            group = by_hf_name[name]
            return to_hf(group, read_native if group[0].expert is None else read_native_cached, saved)
        # Our position embeddings include the first segment embedding. If training has not changed their sum since the
        # import, the saved segment embeddings are exact. Otherwise, the sum becomes the position embeddings of Hugging
        # Face, and the segment embeddings are 0.
        (position_mapping,) = [mapping for mapping in table if mapping.plus_row]
        current = to_hf(by_hf_name[position_mapping.hf_name], read_native, {})
        is_unchanged = saved and torch.equal(current, _read_positions_with_segment(weights, position_mapping))
        return saved[name] if is_unchanged else torch.zeros(NUM_SEGMENTS, model.d_model)

    shapes = {name: tuple(to_hf(group, make_meta_tensor, {}).shape) for name, group in by_hf_name.items()}
    if any(mapping.plus_row for mapping in table):
        shapes[SEGMENT_EMBEDDINGS] = weights.shapes.get(
            HF_ONLY_PREFIX + SEGMENT_EMBEDDINGS, (NUM_SEGMENTS, model.d_model)
        )
    return LazyWeights(shapes, compute_tensor)


def _check_params(
    weights: Weights,
    native_shapes: Mapping[str, tuple[int, ...]],
    table: Sequence[TensorMapping],
    family: str,
) -> None:
    """Raise CheckpointError if `weights` lacks a parameter, AssertionError if the table of the family lacks one."""
    if missing := sorted(name for name in native_shapes if weights.shapes.get(f"model.{name}") != native_shapes[name]):
        raise CheckpointError(f"the checkpoint lacks {missing[0]}, or has it in another shape")
    unmapped = native_shapes.keys() - {mapping.native_name for mapping in table}
    if unknown := sorted(name for name in unmapped if not NATIVE_ONLY.fullmatch(name)):
        raise AssertionError(f"not in the table of {family}: {unknown}")


def _read_positions_with_segment(weights: Weights, mapping: TensorMapping) -> Tensor:
    """Return the imported position embeddings plus the first segment embedding."""
    return weights.read(HF_ONLY_PREFIX + mapping.hf_name) + weights.read(HF_ONLY_PREFIX + mapping.plus_row)[0]


def export_hf(
    weights: Weights,
    config: Config,
    tokenizer: Tokenizer | None,
    directory: Path,
    *,
    family: str = "",
    dtype: torch.dtype = torch.float32,
    shard_bytes: int = SHARD_BYTES,
    token_ids: Mapping[str, Any] | None = None,
    generation_config: bytes | None = None,
) -> Weights:
    """Write all files that `from_pretrained` needs into `directory`. Return the view of the written tensors.

    If the model was imported from Hugging Face, `token_ids` has its special ids (such as eos_token_id), and
    `generation_config` is the content of its generation_config.json. Otherwise they come from the tokenizer. Files of
    an imported tokenizer are written back unchanged.

    Raises CheckpointError if no Hugging Face model is equivalent.
    """
    hf_config = build_hf_config(config.model, family)
    view = to_huggingface(weights, config.model, hf_config["model_type"])
    directory.mkdir()
    hf_config["dtype"] = str(dtype).removeprefix("torch.")
    token_ids = _token_ids(config, tokenizer) if token_ids is None else token_ids
    hf_config |= token_ids
    _write_json(directory / "config.json", hf_config)
    if config.model.architecture != "encoder":
        _write_json(directory / GENERATION_FILE, {"_from_model_config": True, **token_ids})
    try:
        _export_tokenizer(tokenizer, directory, config)
    except CheckpointError as error:
        raise CheckpointError(f"{error} Use --no-tokenizer to export only the weights.") from None
    if generation_config is not None:
        (directory / GENERATION_FILE).write_bytes(generation_config)
    write_safetensors(directory, view, dtype, shard_bytes)
    return view


def _token_ids(config: Config, tokenizer: Tokenizer | None) -> dict[str, int | None]:
    """Return the special ids, such as eos_token_id.

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


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
