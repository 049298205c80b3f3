"""The parts of which a family of Hugging Face decoders is described: its config fields and the names of its tensors.

A description works in both directions. A codec reads fields of config.json into keys of our `model` section, and writes
them back.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from dist_llm.config.model_section import ModelConfig
from dist_llm.config.section import Section
from dist_llm.convert.hf_config_fields import ConfigFields
from dist_llm.convert.hf_rope import SECTIONS_OF_TYPES, RopeFormat, outer_rope_fields, read_rope, write_rope
from dist_llm.convert.hf_tensor_mapping import TensorMapping
from dist_llm.errors import CheckpointError
from dist_llm.models.build_model import build_model
from dist_llm.param_spec import iter_weights

REQUIRED = object()
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
class Value:
    """A field with the value of one of our keys, converted by `to_native` and back by `to_hf`."""

    name: str
    key: str
    default: Any = REQUIRED  # value of an absent field
    to_native: Callable[[Any], Any] = lambda value: value
    to_hf: Callable[[Any], Any] = lambda value: value
    other_name: str = ""  # another name of the field, which an import also reads

    @property
    def free_keys(self) -> FreeKeys:
        """Return the key."""
        return {self.key: ANY_VALUE}

    def read(self, fields: ConfigFields) -> dict[str, Any]:
        """Return the key."""
        name = self.other_name if self.name not in fields and self.other_name in fields else self.name
        value = fields[name] if self.default is REQUIRED else fields.get(name, self.default)
        return {self.key: self.to_native(value)}

    def write(self, section: Section) -> dict[str, Any]:
        """Return the field, from the section of our keys that has the key."""
        return {self.name: self.to_hf(getattr(section, self.key))}


@dataclass(frozen=True)
class Constant:
    """A field that must be absent or have this value."""

    name: str
    value: Any

    @property
    def free_keys(self) -> FreeKeys:
        """Return no key."""
        return {}

    def read(self, fields: ConfigFields) -> dict[str, Any]:
        """Check the field."""
        fields.require(**{self.name: self.value})
        return {}

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """Return the field."""
        return {self.name: self.value}


@dataclass(frozen=True)
class Derived:
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
        """Return the key."""
        return {self.key: self.compute(fields)}

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """Return no field."""
        return {}


@dataclass(frozen=True)
class Sizes:
    """The sizes that nearly all families have. `d_ff` and `n_kv_heads` are names of fields; None: no such field.

    A config.json without the field `d_ff` has `d_ff_factor` times the width, if that is set. One without the number of
    key-value heads or the size of a head has `default_kv_heads` and `default_head_dim`; None: as many as query heads,
    and the width divided by the heads.
    """

    d_ff: str = "intermediate_size"
    n_kv_heads: str | None = "num_key_value_heads"
    has_head_dim: bool = True
    d_ff_factor: int | None = None
    default_kv_heads: int | None = None
    default_head_dim: int | None = None

    @property
    def free_keys(self) -> FreeKeys:
        """Return the keys of the sizes."""
        kv_heads = ("n_kv_heads",) if self.n_kv_heads else ()
        head_dim = ("head_dim",) if self.has_head_dim else ()
        return dict.fromkeys(("d_model", "n_layers", "n_heads", *kv_heads, *head_dim, "d_ff", "max_seq_len"), ANY_VALUE)

    def read(self, fields: ConfigFields) -> dict[str, Any]:
        """Return the sizes. Raises CheckpointError if the heads do not divide the width."""
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
class Activation:
    """The activation of the feed-forward layer."""

    name: str = "hidden_act"
    names: Mapping[str, str] = field(default_factory=lambda: GATED)

    @property
    def free_keys(self) -> FreeKeys:
        """Return the key with its values."""
        return {"activation": tuple(dict.fromkeys(self.names.values()))}

    def read(self, fields: ConfigFields) -> dict[str, Any]:
        """Return the key. Raises CheckpointError for an unsupported activation."""
        if (value := fields[self.name]) not in self.names:
            raise CheckpointError(
                f"config.json: activation {value} is not supported; choose from {', '.join(self.names)}"
            )
        return {"activation": self.names[value]}

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """Return the field. An activation of another kind fails the comparison in `build_hf_config`."""
        hf_names = [hf_name for hf_name, name in self.names.items() if name == model.activation]
        return {self.name: (hf_names or list(self.names))[0]}


@dataclass(frozen=True)
class Rope:
    """The rotary positions, which are the same for all layers."""

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
class LayerTypes:
    """Layers with a window and layers without, in the order of `layer_types`.

    `read_types` returns the types of a config.json without layer_types. `rope_by_type` is the format of rope_parameters
    with a section for each type; None: the family has one section for all layers. `unrotated`: layers without a window
    have no rotation (Cohere 2).
    """

    read_types: Callable[[ConfigFields], Sequence[str]]
    rope_by_type: RopeFormat | None = None
    unrotated: bool = False

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
        types_of_pattern = self.read_types(fields)
        types = list(fields.get("layer_types") or types_of_pattern)
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


@dataclass(frozen=True)
class Part:
    """A part of Hugging Face tensors. `rows` returns the rows, as indices of a tensor, in our order; None: all rows."""

    name: str
    rows: Callable[[ModelConfig], Sequence[int]] | None = None
    skip: int = 0
    rows_dim: int = 0  # 1: the first dimension is experts
    transposed: bool = False  # the weights are [..., inputs, outputs]
    # Suffixes of the names by kind of our tensor. A kind without a suffix has no counterpart.
    suffixes: Mapping[str, str] = field(default_factory=lambda: {"weight": ".weight", "bias": ".bias"})


@dataclass(frozen=True)
class ByExpert:
    """Hugging Face has a module for each expert. The name has `{}` for the number of the expert."""

    name: str


# The name of a module, a part of its tensors, or a function that returns the name in a model.
ModuleName = str | Part | ByExpert | Callable[[ModelConfig], str]


@dataclass(frozen=True)
class Family:
    """A family of decoders.

    `keys` are the keys of `model` that all its models share. `block_names` and `other_names` map our modules to those
    of Hugging Face; a block's module has the prefix `block_prefix` with `{}` for the number of the layer.
    """

    hf_class: str
    keys: Mapping[str, Any]
    codecs: Sequence[Codec]
    block_prefix: str
    block_names: Mapping[str, "ModuleName"]
    other_names: Mapping[str, "ModuleName"]
    tied_by_default: bool = False

    @property
    def shared_keys(self) -> dict[str, Any]:
        """Return the keys that all models of the family share. The value of a derived key is its formula."""
        keys = {key: value for codec in self.codecs for key, value in getattr(codec, "shared_keys", {}).items()}
        return {**self.keys, **keys}

    @property
    def free_keys(self) -> FreeKeys:
        """Return the keys in which models of the family differ."""
        keys = {key: values for codec in self.codecs for key, values in codec.free_keys.items()}
        return {**keys, "tie_embeddings": ANY_VALUE}

    def read(self, fields: ConfigFields) -> dict[str, Any]:
        """Return our `model` section."""
        section = dict(self.keys)
        for codec in self.codecs:
            section |= codec.read(fields)
        return {**section, "tie_embeddings": fields.get("tie_word_embeddings", self.tied_by_default)}

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """Return the fields of config.json."""
        fields: dict[str, Any] = {}
        for codec in self.codecs:
            fields |= codec.write(model)
        return fields

    def map_tensors(self, model: ModelConfig) -> Iterator[TensorMapping]:
        """Yield the mappings of all parameters and buffers of the model that Hugging Face has too."""
        with torch.device("meta"):
            native_shapes = {name: tensor.shape for name, tensor in iter_weights(build_model(model))}
        for native, shape in native_shapes.items():
            module, _, kind = native.rpartition(".")
            prefix, names = "", self.other_names
            if native.startswith("blocks."):
                _, layer, module = module.split(".", 2)
                prefix, names = self.block_prefix.format(layer), self.block_names
            if module == "head" and kind == "bias":  # a parameter of the head itself
                module = "head.out"
            part = names.get(module)
            if part is None:
                continue  # the caller reports a parameter without a mapping
            if isinstance(part, Part):
                if kind not in part.suffixes:
                    continue
                yield TensorMapping(
                    native,
                    f"{prefix}{part.name}{part.suffixes[kind]}",
                    rows=tuple(part.rows(model)) if part.rows else None,
                    rows_dim=part.rows_dim,
                    transposed=part.transposed and kind == "weight",
                    skip=part.skip,
                )
            elif isinstance(part, ByExpert):
                for expert in range(shape[0]):
                    yield TensorMapping(native, f"{prefix}{part.name.format(expert)}.{kind}", expert=expert)
            else:
                yield TensorMapping(native, f"{prefix}{part if isinstance(part, str) else part(model)}.{kind}")
