"""Which tensor of ours is which of Hugging Face's, for each family that has a twin there.

A `Pair` is one tensor of ours and where it lies in one of theirs. The tables read both ways: what is taken out
of their tensor on import is put back on export.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from dist_llm.config.schema import ModelConfig


@dataclass(frozen=True)
class Pair:
    """`ours` is part `part` of `parts` equal ones of `theirs`, along the outputs, from row `skip` on."""

    ours: str
    theirs: str
    transposed: bool = False  # theirs has inputs in rows (GPT-2's Conv1D)
    part: int = 0
    parts: int = 1
    skip: int = 0  # rows of theirs that mean nothing to us (BART's first two positions)
    plus_row: str = ""  # a tensor of theirs whose first row is added to each of ours (BERT's segments)


def take(pair: Pair, theirs: Mapping[str, Tensor]) -> Tensor:
    """Our tensor out of theirs."""
    tensor = theirs[pair.theirs]
    if pair.transposed:
        tensor = tensor.t() if tensor.ndim == 2 else tensor
    rows = len(tensor) // pair.parts
    tensor = tensor[pair.part * rows : (pair.part + 1) * rows][pair.skip :]
    return tensor + theirs[pair.plus_row][0] if pair.plus_row else tensor


def put(group: Sequence[Pair], ours: Callable[[str], Tensor], kept: Mapping[str, Tensor]) -> Tensor:
    """Their tensor, of all the pairs that are parts of it: what `take` undoes.

    `kept` are tensors of theirs that an import kept, since ours has no place for all of them.
    """
    tensor = torch.cat([ours(pair.ours) for pair in group]) if len(group) > 1 else ours(group[0].ours)
    (pair, *_) = group
    before = kept.get(pair.theirs)
    if pair.skip:
        rows = before[: pair.skip] if before is not None else tensor.new_zeros(pair.skip, *tensor.shape[1:])
        tensor = torch.cat((rows, tensor))
    if pair.plus_row and before is not None and torch.equal(tensor, before + kept[pair.plus_row][0]):
        tensor = before  # as it came
    return tensor.t() if pair.transposed and tensor.ndim == 2 else tensor


def groups(table: Sequence[Pair]) -> Iterator[tuple[str, list[Pair]]]:
    """(tensor of theirs, its pairs in order)."""
    placed = sorted(table, key=lambda pair: (pair.theirs, pair.part))
    return ((theirs, list(group)) for theirs, group in groupby(placed, key=lambda pair: pair.theirs))


def pairs(family: str, model: ModelConfig) -> list[Pair]:
    """The table of a family for a resolved model."""
    return list(FAMILIES[family](model))


def _both(ours: str, theirs: str, bias: bool, **how: int | bool) -> Iterator[Pair]:
    for kind in ("weight", "bias") if bias else ("weight",):
        yield Pair(f"{ours}.{kind}", f"{theirs}.{kind}", **how)  # type: ignore[arg-type]


def _gpt2(model: ModelConfig, transposed: bool = True) -> Iterator[Pair]:
    bias = model.bias
    yield Pair("embed.tokens.weight", "transformer.wte.weight")
    yield Pair("embed.positions.weight", "transformer.wpe.weight")
    for layer in range(model.n_layers):
        ours, theirs = f"blocks.{layer}", f"transformer.h.{layer}"
        yield from _both(f"{ours}.norm_attention", f"{theirs}.ln_1", bias)
        for part, name in enumerate("qkv"):
            yield from _both(
                f"{ours}.attention.{name}", f"{theirs}.attn.c_attn", bias, transposed=transposed, part=part, parts=3
            )
        yield from _both(f"{ours}.attention.out", f"{theirs}.attn.c_proj", bias, transposed=transposed)
        yield from _both(f"{ours}.norm_feedforward", f"{theirs}.ln_2", bias)
        yield from _both(f"{ours}.feedforward.up", f"{theirs}.mlp.c_fc", bias, transposed=transposed)
        yield from _both(f"{ours}.feedforward.down", f"{theirs}.mlp.c_proj", bias, transposed=transposed)
    yield from _both("head.norm", "transformer.ln_f", bias)
    if not model.tie_embeddings:
        yield Pair("head.out.weight", "lm_head.weight")


def _nanogpt(model: ModelConfig) -> Iterator[Pair]:
    return _gpt2(model, transposed=False)


def _llama(model: ModelConfig) -> Iterator[Pair]:
    yield Pair("embed.tokens.weight", "model.embed_tokens.weight")
    for layer in range(model.n_layers):
        ours, theirs = f"blocks.{layer}", f"model.layers.{layer}"
        yield Pair(f"{ours}.norm_attention.weight", f"{theirs}.input_layernorm.weight")
        for name, their in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("out", "o_proj")):
            bias = model.qkv_bias and name != "out"
            yield from _both(f"{ours}.attention.{name}", f"{theirs}.self_attn.{their}", bias)
        if model.qk_norm:
            for name in "qk":
                yield Pair(f"{ours}.attention.norm_{name}.weight", f"{theirs}.self_attn.{name}_norm.weight")
        yield Pair(f"{ours}.norm_feedforward.weight", f"{theirs}.post_attention_layernorm.weight")
        for name in ("gate", "up", "down"):
            yield Pair(f"{ours}.feedforward.{name}.weight", f"{theirs}.mlp.{name}_proj.weight")
    yield Pair("head.norm.weight", "model.norm.weight")
    if not model.tie_embeddings:
        yield Pair("head.out.weight", "lm_head.weight")


def _bert(model: ModelConfig) -> Iterator[Pair]:
    stem = "bert.embeddings"
    yield Pair("embed.tokens.weight", f"{stem}.word_embeddings.weight")
    segments = f"{stem}.token_type_embeddings.weight"
    yield Pair("embed.positions.weight", f"{stem}.position_embeddings.weight", plus_row=segments)
    yield from _both("embed.norm", f"{stem}.LayerNorm", True)
    for layer in range(model.n_layers):
        ours, theirs = f"blocks.{layer}", f"bert.encoder.layer.{layer}"
        for name, their in (("q", "self.query"), ("k", "self.key"), ("v", "self.value"), ("out", "output.dense")):
            yield from _both(f"{ours}.attention.{name}", f"{theirs}.attention.{their}", True)
        yield from _both(f"{ours}.norm_attention", f"{theirs}.attention.output.LayerNorm", True)
        yield from _both(f"{ours}.feedforward.up", f"{theirs}.intermediate.dense", True)
        yield from _both(f"{ours}.feedforward.down", f"{theirs}.output.dense", True)
        yield from _both(f"{ours}.norm_feedforward", f"{theirs}.output.LayerNorm", True)
    yield from _both("head.dense.linear", "cls.predictions.transform.dense", True)
    yield from _both("head.dense.norm", "cls.predictions.transform.LayerNorm", True)
    yield Pair("head.bias", "cls.predictions.bias")


def _t5(model: ModelConfig) -> Iterator[Pair]:
    yield Pair("embed.tokens.weight", "shared.weight")
    encoder = model.n_encoder_layers
    for layer in range(encoder + model.n_layers):
        stack, number = ("encoder", layer) if layer < encoder else ("decoder", layer - encoder)
        ours, theirs = f"blocks.{layer}", f"{stack}.block.{number}.layer"
        sublayers = [("attention", "SelfAttention"), *([("cross", "EncDecAttention")] if stack == "decoder" else [])]
        for place, (name, their) in enumerate(sublayers):
            yield Pair(f"{ours}.norm_{name}.weight", f"{theirs}.{place}.layer_norm.weight")
            for matrix, letter in (("q", "q"), ("k", "k"), ("v", "v"), ("out", "o")):
                yield Pair(f"{ours}.{name}.{matrix}.weight", f"{theirs}.{place}.{their}.{letter}.weight")
        place = len(sublayers)
        yield Pair(f"{ours}.norm_feedforward.weight", f"{theirs}.{place}.layer_norm.weight")
        for name, their in (("gate", "wi_0"), ("up", "wi_1"), ("down", "wo")):
            yield Pair(f"{ours}.feedforward.{name}.weight", f"{theirs}.{place}.DenseReluDense.{their}.weight")
    bias = "block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    yield Pair("source_relative.table.weight", f"encoder.{bias}")
    yield Pair("relative.table.weight", f"decoder.{bias}")
    yield Pair("source_norm.weight", "encoder.final_layer_norm.weight")
    yield Pair("head.norm.weight", "decoder.final_layer_norm.weight")
    if not model.tie_embeddings:
        yield Pair("head.out.weight", "lm_head.weight")


def _bart(model: ModelConfig) -> Iterator[Pair]:
    yield Pair("embed.tokens.weight", "model.shared.weight")
    for ours, stack in (("source_embed", "encoder"), ("embed", "decoder")):
        yield Pair(f"{ours}.positions.weight", f"model.{stack}.embed_positions.weight", skip=2)
        yield from _both(f"{ours}.norm", f"model.{stack}.layernorm_embedding", True)
    encoder = model.n_encoder_layers
    for layer in range(encoder + model.n_layers):
        stack, number = ("encoder", layer) if layer < encoder else ("decoder", layer - encoder)
        ours, theirs = f"blocks.{layer}", f"model.{stack}.layers.{number}"
        for name, their in (("attention", "self_attn"), *((("cross", "encoder_attn"),) if stack == "decoder" else ())):
            for matrix in ("q", "k", "v", "out"):
                yield from _both(f"{ours}.{name}.{matrix}", f"{theirs}.{their}.{matrix}_proj", True)
            yield from _both(f"{ours}.norm_{name}", f"{theirs}.{their}_layer_norm", True)
        yield from _both(f"{ours}.feedforward.up", f"{theirs}.fc1", True)
        yield from _both(f"{ours}.feedforward.down", f"{theirs}.fc2", True)
        yield from _both(f"{ours}.norm_feedforward", f"{theirs}.final_layer_norm", True)


FAMILIES: dict[str, Callable[[ModelConfig], Iterator[Pair]]] = {
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
