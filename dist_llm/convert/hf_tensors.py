"""Tables that map our tensors to the tensors of Hugging Face, for each supported model family.

A `TensorMapping` says which part of a Hugging Face tensor (`hf`) corresponds to one of our tensors (`native`). The
tables work in both directions, for import and export.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from dist_llm.config.model_section import ModelConfig


@dataclass(frozen=True)
class TensorMapping:
    """Maps one of our tensors, `native`, to a part of a Hugging Face tensor, `hf`.

    The part is chunk `chunk` of `num_chunks` equal chunks along the output dimension, without its first `skip` rows.
    """

    native: str
    hf: str
    transposed: bool = False  # whether `hf` is [inputs, outputs] (Conv1D of GPT-2)
    chunk: int = 0
    num_chunks: int = 1
    skip: int = 0  # rows of `hf` without a counterpart (the first two positions of BART)
    plus_row: str = ""  # tensor whose first row is added to each row (segment embeddings of BERT)


def to_native(mapping: TensorMapping, hf_tensors: Mapping[str, Tensor]) -> Tensor:
    """Extract our tensor from the Hugging Face tensors."""
    tensor = hf_tensors[mapping.hf]
    if mapping.transposed:
        tensor = tensor.t() if tensor.ndim == 2 else tensor
    chunk_rows = len(tensor) // mapping.num_chunks
    tensor = tensor[mapping.chunk * chunk_rows : (mapping.chunk + 1) * chunk_rows][mapping.skip :]
    return tensor + hf_tensors[mapping.plus_row][0] if mapping.plus_row else tensor


def to_hf(group: Sequence[TensorMapping], read_native: Callable[[str], Tensor], saved: Mapping[str, Tensor]) -> Tensor:
    """Build a Hugging Face tensor from all mappings to it. This is the inverse of `to_native`.

    `saved` are Hugging Face tensors that an import saved, because our tensors lack a part of their values.
    """
    tensor = (
        torch.cat([read_native(mapping.native) for mapping in group])
        if len(group) > 1
        else read_native(group[0].native)
    )
    (mapping, *_) = group
    imported = saved.get(mapping.hf)
    if mapping.skip:
        rows = imported[: mapping.skip] if imported is not None else tensor.new_zeros(mapping.skip, *tensor.shape[1:])
        tensor = torch.cat((rows, tensor))
    if mapping.plus_row and imported is not None and torch.equal(tensor, imported + saved[mapping.plus_row][0]):
        tensor = imported  # unchanged since the import
    return tensor.t() if mapping.transposed and tensor.ndim == 2 else tensor


def group_by_hf_name(table: Sequence[TensorMapping]) -> Iterator[tuple[str, list[TensorMapping]]]:
    """Yield (Hugging Face tensor name, its mappings in order)."""
    ordered = sorted(table, key=lambda mapping: (mapping.hf, mapping.chunk))
    return ((hf, list(group)) for hf, group in groupby(ordered, key=lambda mapping: mapping.hf))


def tensor_mappings(family: str, model: ModelConfig) -> list[TensorMapping]:
    """Return the table of a family for a resolved model."""
    return list(FAMILIES[family](model))


def _weight_and_bias(native: str, hf: str, bias: bool, **options: int | bool) -> Iterator[TensorMapping]:
    """Yield the mappings of a layer: its weight, and its bias if it has one."""
    for kind in ("weight", "bias") if bias else ("weight",):
        yield TensorMapping(f"{native}.{kind}", f"{hf}.{kind}", **options)  # type: ignore[arg-type]


def _gpt2(model: ModelConfig, transposed: bool = True) -> Iterator[TensorMapping]:
    bias = model.bias
    yield TensorMapping("embed.tokens.weight", "transformer.wte.weight")
    yield TensorMapping("embed.positions.weight", "transformer.wpe.weight")
    for layer in range(model.n_layers):
        native, hf = f"blocks.{layer}", f"transformer.h.{layer}"
        yield from _weight_and_bias(f"{native}.norm_attention", f"{hf}.ln_1", bias)
        for chunk, name in enumerate("qkv"):
            yield from _weight_and_bias(
                f"{native}.attention.{name}",
                f"{hf}.attn.c_attn",
                bias,
                transposed=transposed,
                chunk=chunk,
                num_chunks=3,
            )
        yield from _weight_and_bias(f"{native}.attention.out", f"{hf}.attn.c_proj", bias, transposed=transposed)
        yield from _weight_and_bias(f"{native}.norm_feedforward", f"{hf}.ln_2", bias)
        yield from _weight_and_bias(f"{native}.feedforward.up", f"{hf}.mlp.c_fc", bias, transposed=transposed)
        yield from _weight_and_bias(f"{native}.feedforward.down", f"{hf}.mlp.c_proj", bias, transposed=transposed)
    yield from _weight_and_bias("head.norm", "transformer.ln_f", bias)
    if not model.tie_embeddings:
        yield TensorMapping("head.out.weight", "lm_head.weight")


def _nanogpt(model: ModelConfig) -> Iterator[TensorMapping]:
    return _gpt2(model, transposed=False)


def _llama(model: ModelConfig) -> Iterator[TensorMapping]:
    yield TensorMapping("embed.tokens.weight", "model.embed_tokens.weight")
    for layer in range(model.n_layers):
        native, hf = f"blocks.{layer}", f"model.layers.{layer}"
        yield TensorMapping(f"{native}.norm_attention.weight", f"{hf}.input_layernorm.weight")
        for name, hf_name in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("out", "o_proj")):
            bias = model.qkv_bias and name != "out"
            yield from _weight_and_bias(f"{native}.attention.{name}", f"{hf}.self_attn.{hf_name}", bias)
        if model.qk_norm:
            for name in "qk":
                yield TensorMapping(f"{native}.attention.norm_{name}.weight", f"{hf}.self_attn.{name}_norm.weight")
        yield TensorMapping(f"{native}.norm_feedforward.weight", f"{hf}.post_attention_layernorm.weight")
        for name in ("gate", "up", "down"):
            yield TensorMapping(f"{native}.feedforward.{name}.weight", f"{hf}.mlp.{name}_proj.weight")
    yield TensorMapping("head.norm.weight", "model.norm.weight")
    if not model.tie_embeddings:
        yield TensorMapping("head.out.weight", "lm_head.weight")


def _bert(model: ModelConfig) -> Iterator[TensorMapping]:
    stem = "bert.embeddings"
    yield TensorMapping("embed.tokens.weight", f"{stem}.word_embeddings.weight")
    segments = f"{stem}.token_type_embeddings.weight"
    yield TensorMapping("embed.positions.weight", f"{stem}.position_embeddings.weight", plus_row=segments)
    yield from _weight_and_bias("embed.norm", f"{stem}.LayerNorm", True)
    for layer in range(model.n_layers):
        native, hf = f"blocks.{layer}", f"bert.encoder.layer.{layer}"
        for name, hf_name in (("q", "self.query"), ("k", "self.key"), ("v", "self.value"), ("out", "output.dense")):
            yield from _weight_and_bias(f"{native}.attention.{name}", f"{hf}.attention.{hf_name}", True)
        yield from _weight_and_bias(f"{native}.norm_attention", f"{hf}.attention.output.LayerNorm", True)
        yield from _weight_and_bias(f"{native}.feedforward.up", f"{hf}.intermediate.dense", True)
        yield from _weight_and_bias(f"{native}.feedforward.down", f"{hf}.output.dense", True)
        yield from _weight_and_bias(f"{native}.norm_feedforward", f"{hf}.output.LayerNorm", True)
    yield from _weight_and_bias("head.dense.linear", "cls.predictions.transform.dense", True)
    yield from _weight_and_bias("head.dense.norm", "cls.predictions.transform.LayerNorm", True)
    yield TensorMapping("head.bias", "cls.predictions.bias")


def _t5(model: ModelConfig) -> Iterator[TensorMapping]:
    yield TensorMapping("embed.tokens.weight", "shared.weight")
    encoder = model.n_encoder_layers
    for layer in range(encoder + model.n_layers):
        stack, number = ("encoder", layer) if layer < encoder else ("decoder", layer - encoder)
        native, hf = f"blocks.{layer}", f"{stack}.block.{number}.layer"
        sublayers = [("attention", "SelfAttention"), *([("cross", "EncDecAttention")] if stack == "decoder" else [])]
        for index, (name, hf_name) in enumerate(sublayers):
            yield TensorMapping(f"{native}.norm_{name}.weight", f"{hf}.{index}.layer_norm.weight")
            for matrix, letter in (("q", "q"), ("k", "k"), ("v", "v"), ("out", "o")):
                yield TensorMapping(f"{native}.{name}.{matrix}.weight", f"{hf}.{index}.{hf_name}.{letter}.weight")
        index = len(sublayers)
        yield TensorMapping(f"{native}.norm_feedforward.weight", f"{hf}.{index}.layer_norm.weight")
        for name, hf_name in (("gate", "wi_0"), ("up", "wi_1"), ("down", "wo")):
            yield TensorMapping(f"{native}.feedforward.{name}.weight", f"{hf}.{index}.DenseReluDense.{hf_name}.weight")
    bias = "block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    yield TensorMapping("source_relative.table.weight", f"encoder.{bias}")
    yield TensorMapping("relative.table.weight", f"decoder.{bias}")
    yield TensorMapping("source_norm.weight", "encoder.final_layer_norm.weight")
    yield TensorMapping("head.norm.weight", "decoder.final_layer_norm.weight")
    if not model.tie_embeddings:
        yield TensorMapping("head.out.weight", "lm_head.weight")


def _bart(model: ModelConfig) -> Iterator[TensorMapping]:
    yield TensorMapping("embed.tokens.weight", "model.shared.weight")
    for native, stack in (("source_embed", "encoder"), ("embed", "decoder")):
        yield TensorMapping(f"{native}.positions.weight", f"model.{stack}.embed_positions.weight", skip=2)
        yield from _weight_and_bias(f"{native}.norm", f"model.{stack}.layernorm_embedding", True)
    encoder = model.n_encoder_layers
    for layer in range(encoder + model.n_layers):
        stack, number = ("encoder", layer) if layer < encoder else ("decoder", layer - encoder)
        native, hf = f"blocks.{layer}", f"model.{stack}.layers.{number}"
        for name, hf_name in (
            ("attention", "self_attn"),
            *((("cross", "encoder_attn"),) if stack == "decoder" else ()),
        ):
            for matrix in ("q", "k", "v", "out"):
                yield from _weight_and_bias(f"{native}.{name}.{matrix}", f"{hf}.{hf_name}.{matrix}_proj", True)
            yield from _weight_and_bias(f"{native}.norm_{name}", f"{hf}.{hf_name}_layer_norm", True)
        yield from _weight_and_bias(f"{native}.feedforward.up", f"{hf}.fc1", True)
        yield from _weight_and_bias(f"{native}.feedforward.down", f"{hf}.fc2", True)
        yield from _weight_and_bias(f"{native}.norm_feedforward", f"{hf}.final_layer_norm", True)


FAMILIES: dict[str, Callable[[ModelConfig], Iterator[TensorMapping]]] = {
    "gpt2": _gpt2,
    "llama": _llama,
    "mistral": _llama,
    "qwen2": _llama,
    "qwen3": _llama,
    "bert": _bert,
    "t5": _t5,
    "bart": _bart,
    "nanogpt": _nanogpt,
}
