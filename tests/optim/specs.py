"""Specs of parameters that belong to no model, for tests of optimizers.

parameters = {"weight": nn.Parameter(torch.zeros(3, 4)), "bias": nn.Parameter(torch.zeros(3))}
specs = {name: make_spec(parameter) for name, parameter in parameters.items()}
"""

from torch import Tensor

from dist_llm.param_spec import ZEROS, ParamSpec

MATRIX = ParamSpec(("ffn", "embed"), ZEROS, muon=True)
VECTOR = ParamSpec(("embed",), ZEROS, decay=False)


def make_spec(parameter: Tensor) -> ParamSpec:
    """Return the spec of a feed-forward matrix if the parameter has two dimensions, else that of a norm weight."""
    return MATRIX if parameter.ndim == 2 else VECTOR
