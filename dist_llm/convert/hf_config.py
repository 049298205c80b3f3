"""Convert between Hugging Face's config.json and our `model` section, for the families in `hf_tensors`.

A family can express a model if the config that it writes is parsed back to the same model. So a property that a family
cannot express is an error, and is never dropped.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any

from pydantic import ValidationError

from dist_llm.config.compare import function_of
from dist_llm.config.derive import resolve_model
from dist_llm.config.model_section import ModelConfig, UnresolvedModelConfig
from dist_llm.config.section import MAX_LAYERS
from dist_llm.convert.hf_config_fields import ConfigFields
from dist_llm.errors import CheckpointError

LAYER_COUNTS = {"n_layer", "num_hidden_layers", "num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers"}
# Our name -> Hugging Face's names. An export writes the first.
ACTIVATIONS = {
    "gelu": ("gelu",),
    "gelu_tanh": ("gelu_new", "gelu_pytorch_tanh", "gelu_fast"),
    "relu": ("relu",),
}


def parse_hf_config(content: Mapping[str, Any], ignored: Collection[str] = ()) -> ModelConfig:
    """Return the resolved model that a Hugging Face config describes; fields in `ignored` need not be known.

    Raises CheckpointError for an unsupported family or an unknown field.
    """
    family = str(content.get("model_type"))
    if family not in READERS:
        raise CheckpointError(f"config.json: model_type {family} is not supported; choose from {', '.join(READERS)}")
    for name in LAYER_COUNTS & content.keys():
        if type(content[name]) is not int or content[name] > MAX_LAYERS:
            raise CheckpointError(f"config.json: {name} {content[name]!r} is not a number of layers up to {MAX_LAYERS}")
    fields = ConfigFields(content)
    try:
        model = resolve_model(UnresolvedModelConfig(**READERS[family](fields), vocab_size=fields["vocab_size"]))
    except KeyError as error:
        raise CheckpointError(f"config.json: has model_type {family}, but no {error}") from None
    except ValidationError as error:
        raise CheckpointError(f"config.json: {error}") from None
    except (TypeError, AttributeError, ValueError, ArithmeticError) as error:
        raise CheckpointError(f"config.json: a value has the wrong type for model_type {family}: {error}") from None
    fields.check_all_read(ignored)
    return model


def build_hf_config(model: ModelConfig, family: str = "") -> dict[str, Any]:
    """Build config.json of a resolved model, for `family` or the first family that fits.

    Raises CheckpointError that names the keys that the family, or the closest one, cannot express.
    """
    if family and family not in WRITERS:
        raise CheckpointError(f"family {family} is not supported; choose from {', '.join(WRITERS)}")
    expected = function_of(model)
    fewest: tuple[str, list[str]] | None = None
    for name in (family,) if family else WRITERS:
        content = {"model_type": name, "architectures": [CLASSES[name]], **WRITERS[name](model)}
        content |= {"vocab_size": model.vocab_size, "tie_word_embeddings": model.tie_embeddings}
        try:
            actual = function_of(parse_hf_config(content))
        except CheckpointError:
            continue
        mismatches = [f"{key} {expected[key]} (not {actual[key]})" for key in expected if actual[key] != expected[key]]
        if not mismatches:
            return content
        if fewest is None or len(mismatches) < len(fewest[1]):
            fewest = name, mismatches
    closest, mismatches = fewest or (family, [f"tie_embeddings {model.tie_embeddings}"])
    raise CheckpointError(
        f"Hugging Face's transformers has no equivalent of this model: {closest} comes closest, but the model has "
        f"{', '.join(mismatches)}"
    )


def _read_gpt2(c: ConfigFields) -> dict[str, Any]:
    c.require(scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    return {
        **_native_sizes(c["n_embd"], c["n_layer"], c["n_head"], c.get("n_inner") or 4 * c["n_embd"]),
        **LAYERNORM_FIELDS,
        "max_seq_len": c["n_positions"],
        "norm_eps": c.get("layer_norm_epsilon", 1e-5),
        "activation": _native_activation(c.get("activation_function", "gelu_new")),
        "tie_embeddings": c.get("tie_word_embeddings", True),
    }


def _write_gpt2(m: ModelConfig) -> dict[str, Any]:
    return {
        "n_embd": m.d_model,
        "n_layer": m.n_layers,
        "n_head": m.n_heads,
        "n_inner": m.d_ff,
        "n_positions": m.max_seq_len,
        "layer_norm_epsilon": m.norm_eps,
        "activation_function": _hf_activation(m),
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), m.dropout),
    }


def _read_llama(c: ConfigFields) -> dict[str, Any]:
    family = c["model_type"]
    c.require(hidden_act="silu", mlp_bias=False, attention_bias=False, use_sliding_window=False)
    if family in ("qwen2", "qwen3"):
        c.get("sliding_window")  # no effect without use_sliding_window
        c.require(layer_types=["full_attention"] * c["num_hidden_layers"])
    else:
        c.require(sliding_window=None)
    heads = c["num_attention_heads"]
    return {
        **_native_sizes(c["hidden_size"], c["num_hidden_layers"], heads, c["intermediate_size"], c.get("head_dim")),
        "n_kv_heads": c.get("num_key_value_heads") or heads,
        "max_seq_len": c["max_position_embeddings"],
        "rope_theta": c.rope_theta(),
        "norm_eps": c["rms_norm_eps"],
        "tie_embeddings": c.get("tie_word_embeddings", False),
        "qk_norm": family == "qwen3",
        "qkv_bias": family == "qwen2",
    }


def _write_llama(m: ModelConfig) -> dict[str, Any]:
    return {
        **_hf_sizes(m),
        "num_key_value_heads": m.n_kv_heads,
        "head_dim": m.head_dim,
        "max_position_embeddings": m.max_seq_len,
        "rope_theta": m.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": m.rope_theta},
        "rms_norm_eps": m.norm_eps,
        "hidden_act": "silu",
        "attention_dropout": m.dropout,
    }


def _write_mistral(m: ModelConfig) -> dict[str, Any]:
    return {**_write_llama(m), "sliding_window": None}


def _read_bert(c: ConfigFields) -> dict[str, Any]:
    c.require(position_embedding_type="absolute", is_decoder=False, add_cross_attention=False)
    return {
        **_native_sizes(c["hidden_size"], c["num_hidden_layers"], c["num_attention_heads"], c["intermediate_size"]),
        **LAYERNORM_FIELDS,
        "architecture": "encoder",
        "norm_order": "post",
        "norm_embedding": True,
        "head": "mlm",
        "max_seq_len": c["max_position_embeddings"],
        "norm_eps": c.get("layer_norm_eps", 1e-12),
        "activation": _native_activation(c["hidden_act"]),
        "tie_embeddings": True,
    }


def _write_bert(m: ModelConfig) -> dict[str, Any]:
    return {
        **_hf_sizes(m),
        "max_position_embeddings": m.max_seq_len,
        "type_vocab_size": 2,
        "layer_norm_eps": m.norm_eps,
        "hidden_act": _hf_activation(m),
        **dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), m.dropout),
    }


def _read_t5(c: ConfigFields) -> dict[str, Any]:
    if c.get("feed_forward_proj") != "gated-gelu":
        raise CheckpointError("config.json: only T5 v1.1 is supported (feed_forward_proj gated-gelu)")
    if c.get("scale_decoder_outputs", c.get("tie_word_embeddings", True)):
        raise CheckpointError("config.json: only T5 v1.1 is supported (tie_word_embeddings false)")
    return {
        **_native_sizes(
            c["d_model"], c.get("num_decoder_layers") or c["num_layers"], c["num_heads"], c["d_ff"], c["d_kv"]
        ),
        "architecture": "encoder_decoder",
        "n_encoder_layers": c["num_layers"],
        "max_seq_len": c.get("n_positions", 512),
        "positions": "relative",
        "relative_buckets": c["relative_attention_num_buckets"],
        "relative_distance": c.get("relative_attention_max_distance", 128),
        "attention_scale": 1.0,
        "norm_eps": c["layer_norm_epsilon"],
        "activation": "geglu_tanh",
        "tie_embeddings": False,
    }


def _write_t5(m: ModelConfig) -> dict[str, Any]:
    return {
        "d_model": m.d_model,
        "num_layers": m.n_encoder_layers,
        "num_decoder_layers": m.n_layers,
        "num_heads": m.n_heads,
        "d_kv": m.head_dim,
        "d_ff": m.d_ff,
        "n_positions": m.max_seq_len,
        "relative_attention_num_buckets": m.relative_buckets,
        "relative_attention_max_distance": m.relative_distance,
        "layer_norm_epsilon": m.norm_eps,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
        "dropout_rate": m.dropout,
    }


def _read_bart(c: ConfigFields) -> dict[str, Any]:
    c.require(scale_embedding=False)
    for of_encoder, of_decoder in (
        ("encoder_attention_heads", "decoder_attention_heads"),
        ("encoder_ffn_dim", "decoder_ffn_dim"),
    ):
        if c[of_encoder] != c[of_decoder]:
            raise CheckpointError(f"config.json: {of_encoder} and {of_decoder} must be equal here")
    return {
        **_native_sizes(c["d_model"], c["decoder_layers"], c["decoder_attention_heads"], c["decoder_ffn_dim"]),
        **LAYERNORM_FIELDS,
        "architecture": "encoder_decoder",
        "n_encoder_layers": c["encoder_layers"],
        "norm_order": "post",
        "norm_embedding": True,
        "max_seq_len": c["max_position_embeddings"],
        "activation": _native_activation(c["activation_function"]),
        "tie_embeddings": True,
    }


def _write_bart(m: ModelConfig) -> dict[str, Any]:
    return {
        "d_model": m.d_model,
        "encoder_layers": m.n_encoder_layers,
        "decoder_layers": m.n_layers,
        "encoder_attention_heads": m.n_heads,
        "decoder_attention_heads": m.n_heads,
        "encoder_ffn_dim": m.d_ff,
        "decoder_ffn_dim": m.d_ff,
        "max_position_embeddings": m.max_seq_len,
        "activation_function": _hf_activation(m),
        "scale_embedding": False,
        **dict.fromkeys(("dropout", "attention_dropout"), m.dropout),
    }


LAYERNORM_FIELDS = {"positions": "learned", "norm": "layernorm", "bias": True}
READERS: dict[str, Callable[[ConfigFields], dict[str, Any]]] = {
    "gpt2": _read_gpt2,
    "llama": _read_llama,
    "mistral": _read_llama,
    "qwen2": _read_llama,
    "qwen3": _read_llama,
    "bert": _read_bert,
    "t5": _read_t5,
    "bart": _read_bart,
}
WRITERS: dict[str, Callable[[ModelConfig], dict[str, Any]]] = {
    "gpt2": _write_gpt2,
    "llama": _write_llama,
    "mistral": _write_mistral,
    "qwen2": _write_llama,
    "qwen3": _write_llama,
    "bert": _write_bert,
    "t5": _write_t5,
    "bart": _write_bart,
}
CLASSES = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "bert": "BertForMaskedLM",
    "t5": "T5ForConditionalGeneration",
    "bart": "BartForConditionalGeneration",
}


def _native_sizes(d_model: int, n_layers: int, n_heads: int, d_ff: int, head_dim: int | None = None) -> dict[str, Any]:
    if not head_dim and d_model % n_heads:
        raise CheckpointError(f"config.json: {n_heads} heads do not divide a width of {d_model}")
    return {
        "d_model": d_model,
        "n_layers": n_layers,
        "n_heads": n_heads,
        "n_kv_heads": n_heads,
        "head_dim": head_dim or d_model // n_heads,
        "d_ff": d_ff,
    }


def _hf_sizes(m: ModelConfig) -> dict[str, Any]:
    return {
        "hidden_size": m.d_model,
        "num_hidden_layers": m.n_layers,
        "num_attention_heads": m.n_heads,
        "intermediate_size": m.d_ff,
    }


def _native_activation(name: str) -> str:
    for native_name, hf_names in ACTIVATIONS.items():
        if name in hf_names:
            return native_name
    known = ", ".join(name for hf_names in ACTIVATIONS.values() for name in hf_names)
    raise CheckpointError(f"config.json: activation {name} is not supported; choose from {known}")


def _hf_activation(m: ModelConfig) -> str:
    return ACTIVATIONS.get(m.activation, ("gelu",))[0]  # a gated activation fails the comparison in `build_hf_config`
