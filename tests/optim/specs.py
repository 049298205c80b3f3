"""Descriptions of parameters that belong to no model."""

from torch import Tensor

from dist_llm.param_spec import ZEROS, ParamSpec

MATRIX = ParamSpec(("ffn", "embed"), ZEROS, muon=True)
VECTOR = ParamSpec(("embed",), ZEROS, decay=False)


def make_spec(parameter: Tensor) -> ParamSpec:
    """Describe a matrix of a block or a vector."""
    return MATRIX if parameter.ndim == 2 else VECTOR
