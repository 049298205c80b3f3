"""The config section `model`: as a user writes it, and with derived sizes."""

from copy import copy
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, create_model, model_serializer

from dist_llm.config.feedforward_sections import DenseConfig, FeedForwardConfig
from dist_llm.config.parametrization_sections import Parametrization
from dist_llm.config.rope_sections import RopeScaling
from dist_llm.config.section import (
    MAX_IDS,
    MAX_LAYERS,
    ZERO_TO_NULL,
    DerivedFloat,
    DerivedWidth,
    Fraction,
    Limit,
    PositiveFloat,
    PositiveInt,
    PositiveIntOrOff,
    PositiveWidth,
    Section,
    Share,
    key,
)

Layers = Annotated[int, Field(ge=1, le=MAX_LAYERS)]
IDs = Annotated[int, Field(ge=1, le=MAX_IDS)]


ATTENTION = "attention"


class SizeKeys(Section):
    """The keys of `model` that set the sizes of the stack."""

    architecture: Literal["decoder", "encoder", "encoder_decoder"] = key(
        "decoder-only, encoder-only (BERT) or encoder-decoder (T5)",
        "decoder",
    )
    d_model: PositiveWidth = key("width of the residual stream")
    n_layers: Layers = key("number of blocks; encoder_decoder: blocks of the decoder")
    n_encoder_layers: Annotated[Layers | None, ZERO_TO_NULL] = key(
        "encoder_decoder: blocks of the encoder; null: n_layers", None
    )
    vocab_size: Annotated[IDs | None, ZERO_TO_NULL] = key(
        "vocabulary size; null: token ids of the tokenizer of the corpus, plus special tokens of the objective", None
    )
    vocab_multiple: PositiveWidth = key(
        "pad the embedding to a multiple of this many rows; padding is never predicted", 64
    )
    max_seq_len: Annotated[IDs | None, ZERO_TO_NULL] = key(
        "maximum sequence length in tokens (rows of learned positions); null: data.seq_len", None
    )


class LayerKeys(Section):
    """The keys of `model` that may differ between layers. `model.kinds` overrides them for the layers of a kind."""

    mixer: str = key(
        "how tokens exchange information: attention, or a mixer that an installed package registers (examples/"
        "custom_mixer)",
        ATTENTION,
    )
    mixer_options: dict[str, Any] = key("keys of a registered mixer", {})
    n_heads: PositiveWidth = key("number of query heads")
    n_kv_heads: DerivedWidth = key("number of key-value heads (grouped-query attention); null: n_heads", None)
    head_dim: DerivedWidth = key("size of a head; null: d_model / n_heads", None)
    feedforward: FeedForwardConfig = key(
        "kind of the feed-forward layer: dense; moe, a mixture of experts; or the NAME of one that an installed "
        "package registers (examples/custom_feedforward)",
        DenseConfig(),
    )
    d_ff: DerivedWidth = key(
        "hidden size of the feed-forward layer; null: 4 d_model, or for gated activations 8/3 d_model rounded up to "
        "a multiple of 64",
        None,
    )
    positions: Literal["rope", "learned", "sinusoidal", "relative", "alibi", "none"] = key(
        "positional encoding; relative: a learned bias per head and distance, shared by all layers (T5); alibi: a "
        "fixed bias that grows with the distance (BLOOM)",
        "rope",
    )
    rope_theta: PositiveFloat = key("rope: base of the rotary frequencies", 10_000.0)
    rotary_fraction: Share = key("rope: share of the dimensions of a head that rotate (GPT-NeoX, Phi)", 1.0)
    rope_scaling: RopeScaling | None = key("rope: frequencies for long contexts; null: unchanged", None)
    window: PositiveIntOrOff = key(
        "sliding-window attention: a query attends to itself and to the window - 1 tokens before it (Mistral); off: "
        "to all tokens",
        None,
    )
    activation: Literal[
        "swiglu", "swiglu_clamped", "geglu", "geglu_tanh", "gelu", "gelu_tanh", "relu", "relu_squared"
    ] = key(
        "feed-forward activation; swiglu and geglu gate a second projection; swiglu_clamped: the gate and the second "
        "projection are clamped at 7, and the second one grows by 1 (gpt-oss)",
        "swiglu",
    )
    qkv_bias: bool = key("biases of queries, keys, values and output gates, independent of `bias` (Qwen2)", False)
    out_bias: bool = key("bias of the output projection of attention, independent of `bias`", False)
    feedforward_bias: bool = key("biases of the feed-forward layer, independent of `bias`", False)
    attention_scale: DerivedFloat = key("factor of the attention scores; null: 1 / sqrt(head_dim); T5 uses 1", None)
    qk_norm: Literal["all"] | bool = key(
        "RMSNorm of queries and keys, which bounds the attention scores; true: of each head; all: of all heads "
        "together (OLMo 2)",
        False,
    )
    attention_cap: Limit = key("softcap of attention scores: cap * tanh(score / cap) (Gemma 2)", None)
    attention_sinks: bool = key(
        "a learned logit per query head in the denominator of the softmax, so that a head can attend to nothing "
        "(gpt-oss)",
        False,
    )
    output_gate: Literal["off", "elementwise", "per_head"] = key(
        "multiply the output of attention, before its projection, by the sigmoid of a projection of the input of the "
        "layer; elementwise: one gate per dimension of each head (Qwen3-Next); per_head: one per head",
        "off",
    )


# The keys of LayerKeys that other mixers than attention do not read.
ATTENTION_KEYS = (
    *("n_heads", "n_kv_heads", "head_dim", "positions", "rope_theta", "rotary_fraction", "rope_scaling", "window"),
    *("qkv_bias", "out_bias", "attention_scale", "qk_norm", "attention_cap", "attention_sinks", "output_gate"),
)


class StackKeys(Section):
    """The keys of `model` that are the same for all layers."""

    relative_buckets: PositiveWidth = key("relative: number of distance buckets, logarithmic for large distances", 32)
    relative_distance: PositiveInt = key("relative: distance from which all positions share the last bucket", 128)
    norm: Literal["rmsnorm", "layernorm"] = key("normalization layer", "rmsnorm")
    norm_eps: PositiveFloat = key("epsilon of the normalization layers", 1e-5)
    norm_order: Literal["pre", "post", "sandwich", "reordered"] = key(
        "pre: normalize the input of each sublayer; post: normalize after the residual sum; sandwich: normalize the "
        "input and the output of each sublayer (Gemma 2); reordered: only the output (OLMo 2)",
        "pre",
    )
    norm_weight: Literal["plain", "plus_one", "none"] = key(
        "plus_one: multiply by 1 + weight, with weights that start at 0 (Gemma); none: no weights (OLMo)", "plain"
    )
    norm_bias: bool = key("biases of layer norms, independent of `bias`", False)
    parallel_residual: Literal["off", "one_norm", "two_norms"] = key(
        "attention and feed-forward read the same residual stream, after the same norm (Phi, Cohere) or each after its "
        "own (GPT-NeoX)",
        "off",
    )
    embedding_scale: PositiveFloat = key("factor of the token embeddings (Gemma: sqrt(d_model))", 1.0)
    residual_scale: PositiveFloat = key("factor of the output of each sublayer (Granite)", 1.0)
    logit_scale: PositiveFloat = key("factor of the logits (Cohere; Granite: 1 / logits_scaling)", 1.0)
    norm_embedding: bool = key("normalize the embeddings before the first block (BERT, BART)", False)
    bias: bool = key("biases in linear layers and layer norms", False)
    tie_embeddings: bool = key("share the weight of the token embedding with the output head", False)
    head_bias: bool = key("bias of the logits (Phi)", False)
    head: Literal["linear", "mlm"] = key(
        "mlm: a dense layer and a norm before the logits, and a bias after them (BERT)", "linear"
    )
    logit_cap: Limit = key("softcap: logits become cap * tanh(logits / cap)", None)
    dropout: Fraction = key("dropout of attention weights, residual branches and embeddings", 0.0)
    stochastic_depth: Fraction = key(
        "probability that a sample skips the last block; decreases linearly to 0 at the first", 0.0
    )
    init: Literal["gpt2", "xavier", "he", "depth", "tfixup"] = key(
        "initialization: gpt2 scales residual output layers by the number of layers, depth each layer by its "
        "index; tfixup trains without warmup",
        "gpt2",
    )
    init_std: PositiveFloat = key("standard deviation of embeddings, and under gpt2 of all matrices", 0.02)
    parametrization: Parametrization | None = key(
        "change of initial values, learning rates and scales with the size of the model, from a small base model whose "
        "hyperparameters were tuned; null: none",
        None,
    )


class KindSection(Section):
    """Base of LayerKind. Only the keys that a user sets are saved, because an absent key and null differ."""

    @model_serializer
    def list_overrides(self) -> dict[str, Any]:
        """Return the keys that are set."""
        return {name: getattr(self, name) for name in type(self).model_fields if name in self.model_fields_set}


def _optional_fields(section: type[Section]) -> dict[str, Any]:
    """Return the fields of a section, each with a default."""
    fields = {name: copy(field) for name, field in section.model_fields.items()}
    for field in fields.values():
        field.default = None
    return {name: (field.annotation, field) for name, field in fields.items()}


# The differences of a kind of layer from the keys of `model`.
LayerKind: Any = create_model("LayerKind", __base__=KindSection, **_optional_fields(LayerKeys))


class UnresolvedModelConfig(StackKeys, LayerKeys, SizeKeys):
    """The keys of `model` as a user writes them."""

    layers: Annotated[tuple[str, ...], Field(strict=False)] = key(
        "kind of each layer: names of model.kinds, repeated until n_layers, where the last repetition may be cut; "
        "empty: all layers have the keys of model",
        (),
    )
    kinds: dict[str, LayerKind] = key(
        f"kinds of layers: for each name, the keys that differ from model. Keys: {', '.join(LayerKeys.model_fields)}",
        {},
    )

    def with_kind(self, kind: str) -> Self:
        """Return this config with the keys of a kind of layer. A null where a size is needed means that of `model`."""
        overrides = self.kinds[kind].list_overrides()
        sizes = ModelConfig.__annotations__
        changes = {name: value for name, value in overrides.items() if value is not None or name not in sizes}
        return self.model_copy(update=changes)

    def layer_config(self, layer: int) -> Self:
        """Return this config with the keys of one layer, counted from 0."""
        return self.with_kind(self.layers[layer % len(self.layers)]) if self.layers else self


class ModelConfig(UnresolvedModelConfig):
    """The section `model` with all sizes. `attention_scale` stays None if the default formula applies."""

    # 0 for a decoder and an encoder; a saved config then has null.
    n_encoder_layers: Annotated[int, BeforeValidator(lambda layers: layers or 0), Field(ge=0, le=MAX_LAYERS)] = 0
    n_kv_heads: PositiveWidth
    head_dim: PositiveWidth
    d_ff: PositiveWidth
    vocab_size: IDs
    max_seq_len: IDs
