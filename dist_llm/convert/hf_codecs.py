"""Codecs of config.json: each reads some fields of Hugging Face into keys of our `model` section, and writes them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from dist_llm.config.model_section import ModelConfig
from dist_llm.config.section import Section
from dist_llm.convert.hf_config_fields import ConfigFields
from dist_llm.convert.hf_rope import SECTIONS_OF_TYPES, RopeFormat, outer_rope_fields, read_rope, write_rope
from dist_llm.errors import CheckpointError

REQUIRED = object()  # default of a field that must be present
# Activations of Hugging Face -> ours, for feed-forward layers with a gate and without.


GATED = {"silu": "swiglu", "gelu": "geglu", "gelu_pytorch_tanh": "geglu_tanh"}


UNGATED = {
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu_squared",
}


# {key of `model`: the values that it can have}; without values, it can have any. kinds.KEY can differ between layers.
FreeKeys = Mapping[str, Sequence[str]]


ANY_VALUE: Sequence[str] = ()


class Codec(Protocol):
    """Reads some fields of config.json and writes them."""

    @property
    def free_keys(self) -> FreeKeys:
        """Return our keys that the fields set."""

    def read(self, fields: ConfigFields) -> dict[str, Any]:
        """Return keys of our `model` section. Raises CheckpointError for an unsupported value."""

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """Return fields of config.json."""


@dataclass(frozen=True)
class RenamedField:
    """A field with the value of one of our keys, converted by `to_native` and back by `to_hf`."""

    name: str
    key: str
    default: Any = REQUIRED  # value of an absent field
    to_native: Callable[[Any], Any] = lambda value: value
    to_hf: Callable[[Any], Any] = lambda value: value
    other_name: str = ""  # another name of the field, which an import also reads

    @property
    def free_keys(self) -> FreeKeys:
        """Return our key, which can have any value."""
        return {self.key: ANY_VALUE}

    def read(self, fields: ConfigFields) -> dict[str, Any]:
        """Return {our key: the value of the field}."""
        name = self.other_name if self.name not in fields and self.other_name in fields else self.name
        value = fields[name] if self.default is REQUIRED else fields.get(name, self.default)
        return {self.key: self.to_native(value)}

    def write(self, section: Section) -> dict[str, Any]:
        """Return {field: value}. `section` is the section of our config that has the key, `model` or `feedforward`."""
        return {self.name: self.to_hf(getattr(section, self.key))}


@dataclass(frozen=True)
class RequiredField:
    """A field that must be absent or have this value."""

    name: str
    value: Any

    @property
    def free_keys(self) -> FreeKeys:
        """Return no key, because the field has the same value in all models."""
        return {}

    def read(self, fields: ConfigFields) -> dict[str, Any]:
        """Raise CheckpointError if the field has another value. Return no key."""
        fields.require(**{self.name: self.value})
        return {}

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """Return {field: the only supported value}."""
        return {self.name: self.value}


@dataclass(frozen=True)
class DerivedKey:
    """A key that follows from other fields and has no field of its own."""

    key: str
    compute: Callable[[ConfigFields], Any]
    formula: str  # what `compute` computes, in our keys

    @property
    def shared_keys(self) -> dict[str, Any]:
        """Return the key with its formula."""
        return {self.key: self.formula}

    @property
    def free_keys(self) -> FreeKeys:
        """Return no key, because the other fields decide the value."""
        return {}

    def read(self, fields: ConfigFields) -> dict[str, Any]:
        """Return {our key: the value that `compute` derives from the other fields}."""
        return {self.key: self.compute(fields)}

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """Return no field, because reading derives the key from the other fields."""
        return {}


@dataclass(frozen=True)
class SizeFields:
    """The fields with the sizes of a model: width, layers, heads, feed-forward width and sequence length."""

    d_ff: str = "intermediate_size"  # name of the field
    n_kv_heads: str | None = "num_key_value_heads"  # name of the field; None: all heads have keys and values
    has_head_dim: bool = True  # whether the family has the field head_dim
    # Values of absent fields.
    d_ff_factor: int | None = None  # multiplies the width; None: the field `d_ff` is required
    default_kv_heads: int | None = None  # None: as many as query heads
    default_head_dim: int | None = None  # None: the width divided by the number of heads

    @property
    def free_keys(self) -> FreeKeys:
        """Return our keys of the sizes that the fields set."""
        kv_heads = ("n_kv_heads",) if self.n_kv_heads else ()
        head_dim = ("head_dim",) if self.has_head_dim else ()
        return dict.fromkeys(("d_model", "n_layers", "n_heads", *kv_heads, *head_dim, "d_ff", "max_seq_len"), ANY_VALUE)

    def read(self, fields: ConfigFields) -> dict[str, Any]:
        """Return our keys of all sizes. Raises CheckpointError if the heads do not divide the width."""
        d_model, n_heads = fields["hidden_size"], fields["num_attention_heads"]
        head_dim = fields.get("head_dim", self.default_head_dim) if self.has_head_dim else None
        if not head_dim and d_model % n_heads:
            raise CheckpointError(f"config.json: {n_heads} heads do not divide a width of {d_model}")
        return {
            "d_model": d_model,
            "n_layers": fields["num_hidden_layers"],
            "n_heads": n_heads,
            "n_kv_heads": (fields.get(self.n_kv_heads, self.default_kv_heads) if self.n_kv_heads else None) or n_heads,
            "head_dim": head_dim or d_model // n_heads,
            "d_ff": (self.d_ff_factor and fields.get(self.d_ff, self.d_ff_factor * d_model)) or fields[self.d_ff],
            "max_seq_len": fields["max_position_embeddings"],
        }

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """Return the fields of the sizes."""
        return {
            "hidden_size": model.d_model,
            "num_hidden_layers": model.n_layers,
            "num_attention_heads": model.n_heads,
            self.d_ff: model.d_ff,
            "max_position_embeddings": model.max_seq_len,
            **({self.n_kv_heads: model.n_kv_heads} if self.n_kv_heads else {}),
            **({"head_dim": model.head_dim} if self.has_head_dim else {}),
        }


@dataclass(frozen=True)
class ActivationField:
    """The field with the activation of the feed-forward layer."""

    name: str = "hidden_act"
    native_names: Mapping[str, str] = field(default_factory=lambda: GATED)  # name of Hugging Face -> our name

    @property
    def free_keys(self) -> FreeKeys:
        """Return {"activation": the supported values}."""
        return {"activation": tuple(dict.fromkeys(self.native_names.values()))}

    def read(self, fields: ConfigFields) -> dict[str, Any]:
        """Return {"activation": our name}. Raises CheckpointError for an unsupported activation."""
        if (value := fields[self.name]) not in self.native_names:
            raise CheckpointError(
                f"config.json: activation {value} is not supported; choose from {', '.join(self.native_names)}"
            )
        return {"activation": self.native_names[value]}

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """Return the field. An activation of another kind fails the comparison in `build_hf_config`."""
        hf_names = [hf_name for hf_name, name in self.native_names.items() if name == model.activation]
        return {self.name: (hf_names or list(self.native_names))[0]}


@dataclass(frozen=True)
class RopeFields:
    """The fields of rotary position embeddings, for families in which all layers have the same."""

    rope_format: RopeFormat = field(default_factory=RopeFormat)

    @property
    def free_keys(self) -> FreeKeys:
        """Return the keys; rotary_fraction only if a part of a head can rotate."""
        rotates_part = self.rope_format.fraction is not None
        keys = ("rope_theta", "rope_scaling", *(("rotary_fraction",) if rotates_part else ()))
        return dict.fromkeys(keys, ANY_VALUE)

    def read(self, fields: ConfigFields) -> dict[str, Any]:
        """Return our keys of rotary positions."""
        return read_rope(fields, self.rope_format)

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """Return the fields of rotary positions."""
        return {"rope_parameters": write_rope(model, self.rope_format), **outer_rope_fields(model, self.rope_format)}


@dataclass(frozen=True)
class LayerTypesField:
    """The fields that say which layers have a sliding window: `layer_types`, `sliding_window`.

    The type of a layer is "sliding_attention" (with a window) or "full_attention".
    """

    read_types: Callable[[ConfigFields], Sequence[str]]  # returns the type of each layer if layer_types is absent
    rope_by_type: RopeFormat | None = None  # of rope_parameters with a section per type; None: one section for all
    unrotated: bool = False  # whether layers without a window have no rotary embedding (Cohere 2)

    @property
    def free_keys(self) -> FreeKeys:
        """Return the keys, which can differ between layers."""
        rope_keys = () if self.rope_by_type is None else ("kinds.rope_theta", "kinds.rope_scaling")
        keys = ("kinds.window", *rope_keys, *(("kinds.positions",) if self.unrotated else ()))
        return dict.fromkeys(keys, ANY_VALUE)

    def read(self, fields: ConfigFields) -> dict[str, Any]:
        """Return our keys `layers` and `kinds`, or flat keys if all layers are of one type."""
        return build_kinds(*self.read_types_and_overrides(fields))

    def read_types_and_overrides(self, fields: ConfigFields) -> tuple[list[str], dict[str, dict[str, Any]]]:
        """Return (type of each layer, {type: our keys that differ}). Raises CheckpointError for an unknown type."""
        default_types = self.read_types(fields)
        types = list(fields.get("layer_types") or default_types)
        if unknown := sorted(set(types) - {"sliding_attention", "full_attention"}):
            raise CheckpointError(f"config.json: layer_types {unknown[0]} is not supported")
        window = fields.get("sliding_window")
        if "sliding_attention" in types and not window:
            raise CheckpointError("config.json: layer_types has sliding_attention, but sliding_window is not set")
        overrides: dict[str, dict[str, Any]] = {"sliding_attention": {"window": window}, "full_attention": {}}
        if self.rope_by_type is not None:
            for layer_type in SECTIONS_OF_TYPES:
                overrides[layer_type] |= read_rope(fields, self.rope_by_type, layer_type)
        if self.unrotated:
            overrides["full_attention"]["positions"] = "none"
        return types, overrides

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """Return layer_types, sliding_window and, by type, rope_parameters."""
        layers = [model.layer_config(layer) for layer in range(model.n_layers)]
        types = ["sliding_attention" if layer.window else "full_attention" for layer in layers]
        fields: dict[str, Any] = {
            "layer_types": types,
            "sliding_window": next((layer.window for layer in layers if layer.window), None),
        }
        if self.rope_by_type is not None:
            fields["rope_parameters"] = {
                layer_type: write_rope(layer, self.rope_by_type)
                for layer_type, layer in zip(types, layers, strict=True)
            }
        return fields


def build_kinds(types: Sequence[str], overrides: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return `layers` and `kinds` for the type of each layer, or flat keys if all layers are of one type.

    `layers` is the shortest list that gives the types when it is repeated.
    """
    if len(set(types)) == 1:
        return dict(overrides[types[0]])
    period = next(
        length
        for length in range(1, len(types) + 1)
        if all(name == types[index % length] for index, name in enumerate(types))
    )
    names = {layer_type: layer_type.removesuffix("_attention") for layer_type in types}
    return {
        "layers": [names[layer_type] for layer_type in types[:period]],
        "kinds": {name: dict(overrides[layer_type]) for layer_type, name in names.items()},
    }
