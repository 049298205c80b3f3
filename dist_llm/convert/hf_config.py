"""Convert between Hugging Face's config.json and our `model` section, for all supported families.

A family can express a model if the config that it writes is read back as the same model. So a property of the model
that a family cannot express is an error, and is never dropped.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any

from pydantic import ValidationError

from dist_llm.config.compare import get_function_keys
from dist_llm.config.derive import resolve_model
from dist_llm.config.model_section import ModelConfig, UnresolvedModelConfig
from dist_llm.config.section import MAX_LAYERS
from dist_llm.convert.hf_codecs import ANY_VALUE, FreeKeys
from dist_llm.convert.hf_config_fields import ConfigFields
from dist_llm.convert.hf_families import DECODER_FAMILIES
from dist_llm.errors import CheckpointError

# Fields with a number of layers.
LAYER_COUNTS = {"n_layer", "num_hidden_layers", "num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers"}
# Our name of an activation without a gate -> names of Hugging Face. An export writes the first name.
ACTIVATIONS = {
    "gelu": ("gelu",),
    "gelu_tanh": ("gelu_new", "gelu_pytorch_tanh", "gelu_fast"),
    "relu": ("relu",),
}


def parse_hf_config(content: Mapping[str, Any], ignored: Collection[str] = ()) -> ModelConfig:
    """Return the resolved model config of a Hugging Face config. Unknown fields in `ignored` are no error.

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
        (first, *_) = error.errors()
        key = ".".join(map(str, first["loc"]))
        raise CheckpointError(f"config.json: model.{key} cannot be derived: {first['msg'].lower()}") from None
    except (TypeError, AttributeError, ValueError, ArithmeticError) as error:
        raise CheckpointError(f"config.json: a value has the wrong type for model_type {family}: {error}") from None
    fields.check_all_read(ignored)
    return model


def build_hf_config(model: ModelConfig, family: str = "") -> dict[str, Any]:
    """Build config.json of a resolved model, for `family`, or for the first family that can express the model.

    Otherwise raises CheckpointError with the keys that the family (or the closest family) cannot express.
    """
    if family and family not in WRITERS:
        raise CheckpointError(f"family {family} is not supported; choose from {', '.join(WRITERS)}")
    expected = get_function_keys(model)
    closest: tuple[str, list[str]] | None = None  # (family with the fewest mismatches, its mismatches)
    refusal = ""  # why the last family that cannot read its own config refuses it
    for name in (family,) if family else WRITERS:
        content = {"model_type": name, "architectures": [CLASSES[name]], **WRITERS[name](model)}
        content |= {"vocab_size": model.vocab_size, "tie_word_embeddings": model.tie_embeddings}
        try:
            actual = get_function_keys(parse_hf_config(content))
        except CheckpointError as error:
            refusal = f"{name} refuses it: {error}"
            continue
        mismatches = [f"{key} {expected[key]} (not {actual[key]})" for key in expected if actual[key] != expected[key]]
        if not mismatches:
            return content
        if closest is None or len(mismatches) < len(closest[1]):
            closest = name, mismatches
    reason = refusal
    if closest is not None:
        reason = f"{closest[0]} comes closest, but the model has {', '.join(closest[1])}"
    raise CheckpointError(f"Hugging Face's transformers has no equivalent of this model: {reason}")


def _read_gpt2(fields: ConfigFields) -> dict[str, Any]:
    fields.require(scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    return {
        **_native_sizes(
            d_model=fields["n_embd"],
            n_layers=fields["n_layer"],
            n_heads=fields["n_head"],
            d_ff=fields.get("n_inner") or 4 * fields["n_embd"],
        ),
        **SHARED_KEYS["gpt2"],
        "max_seq_len": fields["n_positions"],
        "norm_eps": fields.get("layer_norm_epsilon", 1e-5),
        "activation": _native_activation(fields.get("activation_function", "gelu_new")),
        "tie_embeddings": fields.get("tie_word_embeddings", True),
    }


def _write_gpt2(model: ModelConfig) -> dict[str, Any]:
    return {
        "n_embd": model.d_model,
        "n_layer": model.n_layers,
        "n_head": model.n_heads,
        "n_inner": model.d_ff,
        "n_positions": model.max_seq_len,
        "layer_norm_epsilon": model.norm_eps,
        "activation_function": _hf_activation(model),
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), model.dropout),
    }


def _read_bert(fields: ConfigFields) -> dict[str, Any]:
    fields.require(position_embedding_type="absolute", is_decoder=False, add_cross_attention=False)
    return {
        **_native_sizes(
            d_model=fields["hidden_size"],
            n_layers=fields["num_hidden_layers"],
            n_heads=fields["num_attention_heads"],
            d_ff=fields["intermediate_size"],
        ),
        **SHARED_KEYS["bert"],
        "max_seq_len": fields["max_position_embeddings"],
        "norm_eps": fields.get("layer_norm_eps", 1e-12),
        "activation": _native_activation(fields["hidden_act"]),
    }


def _write_bert(model: ModelConfig) -> dict[str, Any]:
    return {
        **_hf_sizes(model),
        "max_position_embeddings": model.max_seq_len,
        "type_vocab_size": 2,
        "layer_norm_eps": model.norm_eps,
        "hidden_act": _hf_activation(model),
        **dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), model.dropout),
    }


def _read_t5(fields: ConfigFields) -> dict[str, Any]:
    if fields.get("feed_forward_proj") != "gated-gelu":
        raise CheckpointError("config.json: only T5 v1.1 is supported (feed_forward_proj gated-gelu)")
    if fields.get("scale_decoder_outputs", fields.get("tie_word_embeddings", True)):
        raise CheckpointError("config.json: only T5 v1.1 is supported (tie_word_embeddings false)")
    return {
        **_native_sizes(
            d_model=fields["d_model"],
            n_layers=fields.get("num_decoder_layers") or fields["num_layers"],
            n_heads=fields["num_heads"],
            d_ff=fields["d_ff"],
            head_dim=fields["d_kv"],
        ),
        **SHARED_KEYS["t5"],
        "n_encoder_layers": fields["num_layers"],
        "max_seq_len": fields.get("n_positions", 512),
        "relative_buckets": fields["relative_attention_num_buckets"],
        "relative_distance": fields.get("relative_attention_max_distance", 128),
        "norm_eps": fields["layer_norm_epsilon"],
    }


def _write_t5(model: ModelConfig) -> dict[str, Any]:
    return {
        "d_model": model.d_model,
        "num_layers": model.n_encoder_layers,
        "num_decoder_layers": model.n_layers,
        "num_heads": model.n_heads,
        "d_kv": model.head_dim,
        "d_ff": model.d_ff,
        "n_positions": model.max_seq_len,
        "relative_attention_num_buckets": model.relative_buckets,
        "relative_attention_max_distance": model.relative_distance,
        "layer_norm_epsilon": model.norm_eps,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
        "dropout_rate": model.dropout,
    }


def _read_bart(fields: ConfigFields) -> dict[str, Any]:
    fields.require(scale_embedding=False)
    for encoder_field, decoder_field in (
        ("encoder_attention_heads", "decoder_attention_heads"),
        ("encoder_ffn_dim", "decoder_ffn_dim"),
    ):
        if fields[encoder_field] != fields[decoder_field]:
            raise CheckpointError(f"config.json: {encoder_field} and {decoder_field} must be equal here")
    return {
        **_native_sizes(
            d_model=fields["d_model"],
            n_layers=fields["decoder_layers"],
            n_heads=fields["decoder_attention_heads"],
            d_ff=fields["decoder_ffn_dim"],
        ),
        **SHARED_KEYS["bart"],
        "n_encoder_layers": fields["encoder_layers"],
        "max_seq_len": fields["max_position_embeddings"],
        "activation": _native_activation(fields["activation_function"]),
    }


def _write_bart(model: ModelConfig) -> dict[str, Any]:
    return {
        "d_model": model.d_model,
        "encoder_layers": model.n_encoder_layers,
        "decoder_layers": model.n_layers,
        "encoder_attention_heads": model.n_heads,
        "decoder_attention_heads": model.n_heads,
        "encoder_ffn_dim": model.d_ff,
        "decoder_ffn_dim": model.d_ff,
        "max_position_embeddings": model.max_seq_len,
        "activation_function": _hf_activation(model),
        "scale_embedding": False,
        **dict.fromkeys(("dropout", "attention_dropout"), model.dropout),
    }


_RELATIVE = ("relative_buckets", "relative_distance")
_LEARNED_POSITIONS = {"positions": "learned", "norm": "layernorm", "bias": True}
_POST_NORM = {**_LEARNED_POSITIONS, "norm_order": "post", "norm_embedding": True, "tie_embeddings": True}
# The keys of `model` that all models of these families share.
SHARED_KEYS: dict[str, Mapping[str, Any]] = {
    "gpt2": _LEARNED_POSITIONS,
    "bert": {"architecture": "encoder", **_POST_NORM, "head": "mlm"},
    "t5": {
        "architecture": "encoder_decoder",
        "positions": "relative",
        "attention_scale": 1.0,
        "activation": "geglu_tanh",
        "tie_embeddings": False,
    },
    "bart": {"architecture": "encoder_decoder", **_POST_NORM},
}
_SIZES = dict.fromkeys(("d_model", "n_layers", "n_heads", "d_ff", "max_seq_len", "norm_eps"), ANY_VALUE)
_UNGATED = {**_SIZES, "activation": tuple(ACTIVATIONS)}
# The keys of `model` in which models of these families differ.
FREE_KEYS: dict[str, FreeKeys] = {
    "gpt2": {**_UNGATED, "tie_embeddings": ANY_VALUE},
    "bert": _UNGATED,
    "t5": {**_SIZES, **dict.fromkeys(("n_encoder_layers", "head_dim", *_RELATIVE), ANY_VALUE)},
    "bart": {**{key: values for key, values in _UNGATED.items() if key != "norm_eps"}, "n_encoder_layers": ANY_VALUE},
}
READERS: dict[str, Callable[[ConfigFields], dict[str, Any]]] = {
    "gpt2": _read_gpt2,
    **{name: family.read for name, family in DECODER_FAMILIES.items()},
    "bert": _read_bert,
    "t5": _read_t5,
    "bart": _read_bart,
}
WRITERS: dict[str, Callable[[ModelConfig], dict[str, Any]]] = {
    "gpt2": _write_gpt2,
    **{name: family.write for name, family in DECODER_FAMILIES.items()},
    "bert": _write_bert,
    "t5": _write_t5,
    "bart": _write_bart,
}
CLASSES = {
    "gpt2": "GPT2LMHeadModel",
    **{name: family.hf_class for name, family in DECODER_FAMILIES.items()},
    "bert": "BertForMaskedLM",
    "t5": "T5ForConditionalGeneration",
    "bart": "BartForConditionalGeneration",
}


def _native_sizes(
    *, d_model: int, n_layers: int, n_heads: int, d_ff: int, head_dim: int | None = None
) -> dict[str, Any]:
    """Return our keys of the sizes. `head_dim` None: the width divided by the number of heads."""
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


def _hf_sizes(model: ModelConfig) -> dict[str, Any]:
    return {
        "hidden_size": model.d_model,
        "num_hidden_layers": model.n_layers,
        "num_attention_heads": model.n_heads,
        "intermediate_size": model.d_ff,
    }


def _native_activation(name: str) -> str:
    for native_name, hf_names in ACTIVATIONS.items():
        if name in hf_names:
            return native_name
    supported_names = ", ".join(name for hf_names in ACTIVATIONS.values() for name in hf_names)
    raise CheckpointError(f"config.json: activation {name} is not supported; choose from {supported_names}")


def _hf_activation(model: ModelConfig) -> str:
    # Any name will do for a gated activation, because it fails the comparison in `build_hf_config`.
    return ACTIVATIONS.get(model.activation, ("gelu",))[0]
