"""Tables that map our tensors to the tensors of Hugging Face, for each supported model family.

The families of `hf_decoder_families.py` have tables of module names. The tables of the other families are here.
"""

from collections.abc import Callable, Iterator

from dist_llm.config.model_section import ModelConfig
from dist_llm.convert.hf_families import DECODER_FAMILIES
from dist_llm.convert.hf_tensor_mapping import TensorMapping


def list_tensor_mappings(family: str, model: ModelConfig) -> list[TensorMapping]:
    """Return the mapping of each tensor of a resolved model to the tensors of its Hugging Face family."""
    return list(FAMILIES[family](model))


def _weight_and_bias(native_name: str, hf_name: str, has_bias: bool, **options: int | bool) -> Iterator[TensorMapping]:
    """Yield the mappings of a layer: its weight, and its bias if it has one."""
    for kind in ("weight", "bias") if has_bias else ("weight",):
        yield TensorMapping(f"{native_name}.{kind}", f"{hf_name}.{kind}", **options)  # type: ignore[arg-type]


def _gpt2(model: ModelConfig, transposed: bool = True) -> Iterator[TensorMapping]:
    has_bias = model.bias
    yield TensorMapping("embed.tokens.weight", "transformer.wte.weight")
    yield TensorMapping("embed.positions.weight", "transformer.wpe.weight")
    for layer in range(model.n_layers):
        native_prefix, hf_prefix = f"blocks.{layer}", f"transformer.h.{layer}"
        yield from _weight_and_bias(f"{native_prefix}.norm_attention", f"{hf_prefix}.ln_1", has_bias=has_bias)
        for chunk, name in enumerate("qkv"):
            yield from _weight_and_bias(
                f"{native_prefix}.attention.{name}",
                f"{hf_prefix}.attn.c_attn",
                has_bias=has_bias,
                transposed=transposed,
                chunk=chunk,
                num_chunks=3,
            )
        yield from _weight_and_bias(
            f"{native_prefix}.attention.out", f"{hf_prefix}.attn.c_proj", has_bias=has_bias, transposed=transposed
        )
        yield from _weight_and_bias(f"{native_prefix}.norm_feedforward", f"{hf_prefix}.ln_2", has_bias=has_bias)
        yield from _weight_and_bias(
            f"{native_prefix}.feedforward.up", f"{hf_prefix}.mlp.c_fc", has_bias=has_bias, transposed=transposed
        )
        yield from _weight_and_bias(
            f"{native_prefix}.feedforward.down", f"{hf_prefix}.mlp.c_proj", has_bias=has_bias, transposed=transposed
        )
    yield from _weight_and_bias("head.norm", "transformer.ln_f", has_bias=has_bias)
    if not model.tie_embeddings:
        yield TensorMapping("head.out.weight", "lm_head.weight")


def _nanogpt(model: ModelConfig) -> Iterator[TensorMapping]:
    return _gpt2(model, transposed=False)


def _bert(model: ModelConfig) -> Iterator[TensorMapping]:
    stem = "bert.embeddings"
    yield TensorMapping("embed.tokens.weight", f"{stem}.word_embeddings.weight")
    segments = f"{stem}.token_type_embeddings.weight"
    yield TensorMapping("embed.positions.weight", f"{stem}.position_embeddings.weight", plus_row=segments)
    yield from _weight_and_bias("embed.norm", f"{stem}.LayerNorm", has_bias=True)
    for layer in range(model.n_layers):
        native_prefix, hf_prefix = f"blocks.{layer}", f"bert.encoder.layer.{layer}"
        for name, hf_name in (("q", "self.query"), ("k", "self.key"), ("v", "self.value"), ("out", "output.dense")):
            yield from _weight_and_bias(
                f"{native_prefix}.attention.{name}", f"{hf_prefix}.attention.{hf_name}", has_bias=True
            )
        yield from _weight_and_bias(
            f"{native_prefix}.norm_attention", f"{hf_prefix}.attention.output.LayerNorm", has_bias=True
        )
        yield from _weight_and_bias(f"{native_prefix}.feedforward.up", f"{hf_prefix}.intermediate.dense", has_bias=True)
        yield from _weight_and_bias(f"{native_prefix}.feedforward.down", f"{hf_prefix}.output.dense", has_bias=True)
        yield from _weight_and_bias(f"{native_prefix}.norm_feedforward", f"{hf_prefix}.output.LayerNorm", has_bias=True)
    yield from _weight_and_bias("head.dense.linear", "cls.predictions.transform.dense", has_bias=True)
    yield from _weight_and_bias("head.dense.norm", "cls.predictions.transform.LayerNorm", has_bias=True)
    yield TensorMapping("head.bias", "cls.predictions.bias")


def _t5(model: ModelConfig) -> Iterator[TensorMapping]:
    yield TensorMapping("embed.tokens.weight", "shared.weight")
    encoder = model.n_encoder_layers
    for layer in range(encoder + model.n_layers):
        stack, number = ("encoder", layer) if layer < encoder else ("decoder", layer - encoder)
        native_prefix, hf_prefix = f"blocks.{layer}", f"{stack}.block.{number}.layer"
        sublayers = [("attention", "SelfAttention"), *([("cross", "EncDecAttention")] if stack == "decoder" else [])]
        for index, (name, hf_name) in enumerate(sublayers):
            yield TensorMapping(f"{native_prefix}.norm_{name}.weight", f"{hf_prefix}.{index}.layer_norm.weight")
            for matrix, letter in (("q", "q"), ("k", "k"), ("v", "v"), ("out", "o")):
                yield TensorMapping(
                    f"{native_prefix}.{name}.{matrix}.weight", f"{hf_prefix}.{index}.{hf_name}.{letter}.weight"
                )
        index = len(sublayers)
        yield TensorMapping(f"{native_prefix}.norm_feedforward.weight", f"{hf_prefix}.{index}.layer_norm.weight")
        for name, hf_name in (("gate", "wi_0"), ("up", "wi_1"), ("down", "wo")):
            yield TensorMapping(
                f"{native_prefix}.feedforward.{name}.weight", f"{hf_prefix}.{index}.DenseReluDense.{hf_name}.weight"
            )
    bias = "block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    yield TensorMapping("source_relative.table.weight", f"encoder.{bias}")
    yield TensorMapping("relative.table.weight", f"decoder.{bias}")
    yield TensorMapping("source_norm.weight", "encoder.final_layer_norm.weight")
    yield TensorMapping("head.norm.weight", "decoder.final_layer_norm.weight")
    if not model.tie_embeddings:
        yield TensorMapping("head.out.weight", "lm_head.weight")


def _bart(model: ModelConfig) -> Iterator[TensorMapping]:
    yield TensorMapping("embed.tokens.weight", "model.shared.weight")
    for native_prefix, stack in (("source_embed", "encoder"), ("embed", "decoder")):
        yield TensorMapping(f"{native_prefix}.positions.weight", f"model.{stack}.embed_positions.weight", skip=2)
        yield from _weight_and_bias(f"{native_prefix}.norm", f"model.{stack}.layernorm_embedding", has_bias=True)
    encoder = model.n_encoder_layers
    for layer in range(encoder + model.n_layers):
        stack, number = ("encoder", layer) if layer < encoder else ("decoder", layer - encoder)
        native_prefix, hf_prefix = f"blocks.{layer}", f"model.{stack}.layers.{number}"
        for name, hf_name in (
            ("attention", "self_attn"),
            *((("cross", "encoder_attn"),) if stack == "decoder" else ()),
        ):
            for matrix in ("q", "k", "v", "out"):
                yield from _weight_and_bias(
                    f"{native_prefix}.{name}.{matrix}", f"{hf_prefix}.{hf_name}.{matrix}_proj", has_bias=True
                )
            yield from _weight_and_bias(
                f"{native_prefix}.norm_{name}", f"{hf_prefix}.{hf_name}_layer_norm", has_bias=True
            )
        yield from _weight_and_bias(f"{native_prefix}.feedforward.up", f"{hf_prefix}.fc1", has_bias=True)
        yield from _weight_and_bias(f"{native_prefix}.feedforward.down", f"{hf_prefix}.fc2", has_bias=True)
        yield from _weight_and_bias(f"{native_prefix}.norm_feedforward", f"{hf_prefix}.final_layer_norm", has_bias=True)


FAMILIES: dict[str, Callable[[ModelConfig], Iterator[TensorMapping]]] = {
    "gpt2": _gpt2,
    **{name: family.map_tensors for name, family in DECODER_FAMILIES.items()},
    "bert": _bert,
    "t5": _t5,
    "bart": _bart,
    "nanogpt": _nanogpt,
}
