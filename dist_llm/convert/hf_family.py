"""Describe a family of Hugging Face decoders: its config fields and the names of its tensors.

A description works in both directions: for the import of a Hugging Face directory and for the export of a checkpoint.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dist_llm.config.model_section import ModelConfig
from dist_llm.convert.hf_codecs import ANY_VALUE, Codec, FreeKeys
from dist_llm.convert.hf_config_fields import ConfigFields
from dist_llm.convert.hf_tensor_mapping import TensorMapping
from dist_llm.convert.native_shapes import list_native_shapes


@dataclass(frozen=True)
class TensorPart:
    """A module of ours that is a part of the tensors of the Hugging Face module `name`."""

    name: str
    # Returns the index of each of our rows in the tensor of Hugging Face; None: all rows, in the same order.
    rows: Callable[[ModelConfig], Sequence[int]] | None = None
    skip: int = 0  # first rows of the tensor of Hugging Face that we lack
    rows_dim: int = 0  # dimension of the rows; 1 if the first dimension is experts
    transposed: bool = False  # the weights are [..., inputs, outputs]
    # Suffixes of the names by kind of our tensor. A kind without a suffix has no counterpart.
    suffixes: Mapping[str, str] = field(default_factory=lambda: {"weight": ".weight", "bias": ".bias"})


@dataclass(frozen=True)
class ModulePerExpert:
    """Hugging Face has a module for each expert. The name has `{}` for the number of the expert."""

    name: str


# The name of a module, a part of its tensors, or a function that returns the name in a model.
ModuleName = str | TensorPart | ModulePerExpert | Callable[[ModelConfig], str]


@dataclass(frozen=True)
class Family:
    """A family of decoders.

    `block_names` and `other_names` map the names of our modules to those of Hugging Face.
    """

    hf_class: str  # class of transformers
    keys: Mapping[str, Any]  # keys of `model` and their values, which all models of the family share
    codecs: Sequence[Codec]  # the keys in which models of the family differ
    block_prefix: str  # of the names of Hugging Face in a block, with `{}` for the number of the layer
    block_names: Mapping[str, "ModuleName"]
    other_names: Mapping[str, "ModuleName"]
    tied_by_default: bool = False  # whether a config.json without tie_word_embeddings ties them

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
        for native_name, shape in list_native_shapes(model).items():
            module, _, kind = native_name.rpartition(".")
            prefix, names = "", self.other_names
            if native_name.startswith("blocks."):
                _, layer, module = module.split(".", 2)
                prefix, names = self.block_prefix.format(layer), self.block_names
            if module == "head" and kind == "bias":  # a parameter of the head itself
                module = "head.out"
            part = names.get(module)
            if part is None:
                continue  # the caller reports a parameter without a mapping
            if isinstance(part, TensorPart):
                if kind not in part.suffixes:
                    continue
                yield TensorMapping(
                    native_name,
                    f"{prefix}{part.name}{part.suffixes[kind]}",
                    rows=tuple(part.rows(model)) if part.rows else None,
                    rows_dim=part.rows_dim,
                    transposed=part.transposed and kind == "weight",
                    skip=part.skip,
                )
            elif isinstance(part, ModulePerExpert):
                for expert in range(shape[0]):
                    yield TensorMapping(native_name, f"{prefix}{part.name.format(expert)}.{kind}", expert=expert)
            else:
                yield TensorMapping(native_name, f"{prefix}{part if isinstance(part, str) else part(model)}.{kind}")
