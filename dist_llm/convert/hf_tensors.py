"""Tables that map our tensors to the tensors of Hugging Face, for each supported model family.

The families of `hf_decoder_families.py` have tables of module names. The tables of the other families are here.
"""

from collections.abc import Callable, Iterator

from dist_llm.config.model_section import ModelConfig
from dist_llm.convert.hf_families import DECODER_FAMILIES
from dist_llm.convert.hf_tensor_mapping import TensorMapping


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
    **{name: family.map_tensors for name, family in DECODER_FAMILIES.items()},
    "bert": _bert,
    "t5": _t5,
    "bart": _bart,
    "nanogpt": _nanogpt,
}
