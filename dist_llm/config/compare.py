"""Compare the config of a checkpoint with the current config, and find the keys that differ.

The function of a model is the mapping from tokens to logits. `MODEL_ROLES` and `OBJECTIVE_ROLES` say for every key of
their sections whether the key changes this function; a test fails if a key is missing. A resume refuses every
difference that changes the function. A run that starts from other weights (`init_from`) refuses the differences that
`init_allow` does not name.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dist_llm.config.derive import round_up
from dist_llm.config.feedforward_sections import DenseConfig, MoEConfig
from dist_llm.config.load import MergedModelSection, Violation
from dist_llm.config.model_section import ATTENTION, ATTENTION_KEYS, LayerKeys, ModelConfig
from dist_llm.config.objective_sections import ObjectiveSpec, PrefixSpec, SpanSpec, get_mode_token
from dist_llm.config.parametrization import resolve_attention_scale
from dist_llm.config.schema import Config, UnresolvedConfig
from dist_llm.config.upcycle import has_equal_d_ff

# fixed: the key decides the function; weights trained with another value cannot be loaded.
# requestable: the key decides the function; `init_from` accepts another value if `init_allow` names the key.
# training: the key does not change the function of a trained model.
Role = Literal["fixed", "requestable", "training"]

MODEL_ROLES: dict[str, Role] = {
    "architecture": "fixed",
    "d_model": "fixed",
    "n_layers": "requestable",
    "n_encoder_layers": "fixed",  # block numbers start with the encoder, so decoder blocks would be renumbered
    "mixer": "fixed",
    "mixer_options": "fixed",
    "n_heads": "fixed",
    "n_kv_heads": "fixed",
    "head_dim": "fixed",
    "feedforward": "requestable",
    "d_ff": "fixed",
    "vocab_size": "requestable",
    "vocab_multiple": "training",  # padding rows are never predicted
    "max_seq_len": "fixed",  # size of the table of learned positions; ignored for other positional encodings
    "positions": "requestable",
    "rope_theta": "requestable",
    "rotary_fraction": "requestable",
    "rope_scaling": "requestable",
    "window": "requestable",
    "relative_buckets": "fixed",
    "relative_distance": "requestable",
    "norm": "requestable",
    "norm_eps": "requestable",
    "norm_order": "requestable",
    "norm_weight": "requestable",
    "norm_bias": "requestable",
    "norm_embedding": "requestable",
    "parallel_residual": "requestable",
    "embedding_scale": "requestable",
    "residual_scale": "requestable",
    "logit_scale": "requestable",
    "activation": "requestable",
    "bias": "requestable",
    "qkv_bias": "requestable",
    "out_bias": "requestable",
    "feedforward_bias": "requestable",
    "tie_embeddings": "requestable",
    "head": "requestable",
    "head_bias": "requestable",
    "attention_scale": "requestable",
    "qk_norm": "requestable",
    "attention_cap": "requestable",
    "attention_sinks": "requestable",
    "output_gate": "requestable",
    "logit_cap": "requestable",
    "dropout": "training",
    "stochastic_depth": "training",
    "layers": "fixed",
    "kinds": "fixed",
    "init": "training",
    "init_std": "training",
    "parametrization": "requestable",  # scales logits, residuals and attention scores
}
OBJECTIVE_ROLES: dict[str, Role] = {
    "name": "requestable",
    "mode": "requestable",  # decides which mode tokens the model was trained with
    "see_prefix": "requestable",
    "mixture": "requestable",  # compared component by component
    # These decide which samples are built, not the function. A resume compares them as part of the data.
    "weight": "training",
    "mask_rate": "training",
    "whole_words": "training",
    "noise_density": "training",
    "mean_span": "training",
    "fim_rate": "training",
    "fim_spm_rate": "training",
}
# The keys of `model.feedforward` that do not change the function.
MOE_TRAINING_KEYS = ("balance_loss", "balance_over", "router_z_loss", "selection_bias_rate")
REQUESTABLE = (*(f"model.{name}" for name, role in MODEL_ROLES.items() if role == "requestable"), "objective")

# Requestable keys that add parameters to the model or remove parameters.
PARAMETER_KEYS = {
    f"model.{name}"
    for name in (
        "n_layers",
        "feedforward",
        "positions",
        "norm",
        "norm_order",
        "norm_embedding",
        "activation",
        "bias",
        "qkv_bias",
        "out_bias",
        "feedforward_bias",
        "norm_bias",
        "norm_weight",
        "parallel_residual",
        "head_bias",
        "tie_embeddings",
        "head",
        "qk_norm",
        "attention_sinks",
        "output_gate",
    )
}


@dataclass(frozen=True)
class Difference:
    """A dotted key whose value in a checkpoint's config (`saved`) differs from the current one."""

    key: str
    saved: Any
    current: Any

    def __str__(self) -> str:
        return f"{self.key}: {self.saved} in the checkpoint, {self.current} in this config"


def get_function_keys(model: ModelConfig) -> dict[str, Any]:
    """Return the keys that decide the forward pass of a resolved model; a key without effect in this model is None.

    A key that differs between layers has the list of the values of all layers, so the names of the kinds do not matter.
    """
    fields = {key: value for key, value in model.model_dump().items() if MODEL_ROLES[key] != "training"}
    layers = [_get_layer_keys(model.layer_config(layer)) for layer in range(model.n_layers)]
    for key in LayerKeys.model_fields:
        values = [layer[key] for layer in layers]
        fields[key] = values[0] if all(value == values[0] for value in values) else values
    fields["layers"] = fields["kinds"] = None
    depends_on_length = any(_depends_on_length(layer) for layer in layers)
    if model.positions != "relative":
        fields["relative_buckets"] = fields["relative_distance"] = None
    if model.positions != "learned" and not depends_on_length:
        fields["max_seq_len"] = None  # records the training length; does not limit the model
    if model.architecture != "encoder_decoder":
        fields["n_encoder_layers"] = None
    fields["norm_bias"] = model.norm == "layernorm" and (model.bias or model.norm_bias)
    fields["head_bias"] = model.head_bias or model.head == "mlm"
    return fields


def _get_layer_keys(layer: ModelConfig) -> dict[str, Any]:
    """Return the keys that decide the forward pass of a layer."""
    fields: dict[str, Any] = {key: value for key, value in layer.model_dump().items() if key in LayerKeys.model_fields}
    if layer.positions != "rope":
        fields["rope_theta"] = fields["rotary_fraction"] = fields["rope_scaling"] = None
    fields["attention_scale"] = resolve_attention_scale(layer)
    for name in ("qkv_bias", "out_bias", "feedforward_bias"):
        fields[name] = layer.bias or fields[name]
    if layer.mixer != ATTENTION:
        fields |= dict.fromkeys(ATTENTION_KEYS)
    if not isinstance(layer.feedforward, DenseConfig):
        fields["d_ff"] = None
    if isinstance(layer.feedforward, MoEConfig):
        fields["feedforward"] = layer.feedforward.model_dump(exclude=set(MOE_TRAINING_KEYS))
    return fields


def _depends_on_length(layer: dict[str, Any]) -> bool:
    """Return whether the rotary frequencies of a layer depend on model.max_seq_len."""
    scaling = layer["rope_scaling"]
    return scaling is not None and scaling["name"] in ("dynamic", "longrope")


def find_function_differences(saved: Config, current: Config) -> list[Difference]:
    """List the differences that change the function: keys of `model`, and the objective. Both configs are resolved."""
    saved_function, current_function = get_function_keys(saved.model), get_function_keys(current.model)
    saved_values, current_values = saved.model.model_dump(), current.model.model_dump()
    keys = [key for key in saved_function if saved_function[key] != current_function[key]]
    if "feedforward" in keys and "d_ff" in keys and has_equal_d_ff(saved.model, current.model):
        keys.remove("d_ff")  # a layer with experts has no d_ff
    # Changing one key can activate another (positions: rope_theta). A key whose own value is equal is not reported.
    changed_keys = [key for key in keys if saved_values[key] != current_values[key]]
    # A key of a layer whose own value is equal differs because of the kinds of layers.
    if any(key in LayerKeys.model_fields for key in set(keys) - set(changed_keys)):
        changed_keys += [key for key in ("layers", "kinds") if saved_values[key] != current_values[key]]
    differences = [Difference(f"model.{key}", saved_values[key], current_values[key]) for key in changed_keys]
    saved_objective, current_objective = _describe_objective(saved), _describe_objective(current)
    if saved_objective != current_objective:
        differences.append(Difference("objective", saved_objective, current_objective))
    return differences


def find_other_differences(saved: Config, current: Config) -> list[Difference]:
    """List the differences of the model sections that do not change the function."""
    function_keys = {difference.key for difference in find_function_differences(saved, current)}
    saved_values, current_values = saved.model.model_dump(), current.model.model_dump()
    differences = [
        Difference(f"model.{key}", saved_values[key], current_values[key])
        for key in saved_values
        if saved_values[key] != current_values[key]
    ]
    return [difference for difference in differences if difference.key not in function_keys]


def find_resume_differences(saved: Config, current: Config) -> list[Difference]:
    """List the differences that prevent a resume. The objective and the data are compared with data.json instead."""
    differences = [
        difference for difference in find_function_differences(saved, current) if difference.key != "objective"
    ]
    saved_rows = round_up(saved.model.vocab_size, saved.model.vocab_multiple)
    current_rows = round_up(current.model.vocab_size, current.model.vocab_multiple)
    if saved.model.vocab_size == current.model.vocab_size and saved_rows != current_rows:
        differences.append(Difference("model.vocab_multiple", saved.model.vocab_multiple, current.model.vocab_multiple))
    saved_mask, current_mask = saved.data.document_mask, current.data.document_mask
    if saved_mask != current_mask and current.data.on_change == "refuse":
        differences.append(Difference("data.document_mask", saved_mask, current_mask))
    return differences


def _describe_objective(config: Config) -> str:
    """Describe the distinct objectives that the model learns, each as `prefix (mode S, see_prefix true)`."""
    is_decoder = config.model.architecture == "decoder"
    return ", ".join(sorted({_describe_spec(spec, is_decoder) for spec in config.objective.components}))


def _describe_spec(spec: ObjectiveSpec, is_decoder: bool) -> str:
    options = [f"mode {mode}"] if (mode := get_mode_token(spec)) else []
    if is_decoder and isinstance(spec, PrefixSpec | SpanSpec):
        options.append(f"see_prefix {str(spec.see_prefix).lower()}")
    return f"{spec.name} ({', '.join(options)})" if options else spec.name


def merge_model_keys(
    user_keys: Mapping[str, Any], saved_keys: Mapping[str, Any], checkpoint: str, init_allow: object
) -> MergedModelSection:
    """Merge `model: {from: checkpoint, **user_keys}` onto the model section of the checkpoint.

    Keys that decide the function must agree with the checkpoint, unless `init_allow` names them.
    """
    allowed_keys = list(init_allow) if isinstance(init_allow, list | tuple) else []
    conflicts = [
        (name, value)
        for name, value in user_keys.items()
        if MODEL_ROLES.get(name, "training") != "training"
        and value not in (saved_keys[name], None)  # null: the size of the checkpoint
        and f"model.{name}" not in allowed_keys
    ]
    violations = [
        Violation(
            (f"model.{name}",),
            f"{value} differs from model.from: {checkpoint} has {saved_keys[name]}; remove the key"
            + (f", or add model.{name} to init_allow" if MODEL_ROLES[name] == "requestable" else ""),
        )
        for name, value in conflicts
    ]
    changes = {name: value for name, value in user_keys.items() if value is not None}
    merged = {**saved_keys, **changes, **{name: saved_keys[name] for name, _ in conflicts}}
    if not merged["layers"] and merged["feedforward"] != saved_keys["feedforward"]:
        merged["d_ff"] = changes.get("d_ff")  # a model of only experts has no d_ff
    return MergedModelSection(merged, violations)


def check_init(config: UnresolvedConfig) -> Iterator[Violation]:
    """Yield violations of the keys that start a run from other weights."""
    if config.init_optimizer == "keep" and not config.init_from:
        yield Violation(
            ("init_optimizer", "init_from"), "keep needs init_from, which names the optimizer state; remove the key"
        )
    if config.init_allow and not config.init_from:
        yield Violation(("init_allow", "init_from"), "has no effect without init_from; remove the key")
    for name in config.init_allow:
        if name not in REQUESTABLE:
            yield Violation(
                ("init_allow",), f"{name} is not a key that init_from can change; choose from {', '.join(REQUESTABLE)}"
            )
