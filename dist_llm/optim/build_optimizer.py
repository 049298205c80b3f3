"""Build the optimizer of a config."""

from collections.abc import Iterable

from torch import Tensor, nn, optim

from dist_llm.config.optim_sections import OptimConfig
from dist_llm.optim.adamw import BF16AdamW, LocalAdamW, LocalWithOffset, ToLocal
from dist_llm.optim.muon import Muon, Orthogonalize, orthogonalize
from dist_llm.optim.param_groups import build_param_groups, is_frozen
from dist_llm.optim.sgd import LocalSGD
from dist_llm.param_spec import ParamSpecs


def identity(tensor: Tensor) -> Tensor:
    """Return the tensor itself. This is the `ToLocal` for tensors that are not sharded."""
    return tensor


def zero_offset(tensor: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Return the tensor and a zero offset. This is the `LocalWithOffset` for tensors that are not sharded."""
    return tensor, (0,) * tensor.ndim


def build_optimizer(
    config: OptimConfig,
    parameters: Iterable[tuple[str, nn.Parameter]],
    specs: ParamSpecs,
    to_local: ToLocal | None = None,
    local_with_offset: LocalWithOffset = zero_offset,
    orthogonalize_fn: Orthogonalize = orthogonalize,
) -> optim.Optimizer:
    """Build AdamW (Loshchilov and Hutter 2019, algorithm 2), SGD, or Muon for matrices with AdamW for other parameters.

    `specs` describes the parameters. `to_local` and `local_with_offset` return the shard of this rank of a DTensor.
    `to_local=None`: no parameter is a DTensor, so torch's own optimizers can be used.
    `orthogonalize_fn` orthogonalizes the momenta of Muon, in the order of `select_muon_params`.
    """
    parameters = list(parameters)
    muon_params = select_muon_params(config, parameters, specs)
    groups = build_param_groups(config, parameters, specs, muon_params)
    if config.name == "sgd":
        if to_local is None:
            return optim.SGD(groups, lr=config.lr, momentum=config.momentum, foreach=True)
        return LocalSGD(groups, config.lr, config.momentum, to_local)
    betas = config.beta1, config.beta2
    adamw: optim.Optimizer
    if config.moments == "bf16":
        names: dict[Tensor, str] = {parameter: name for name, parameter in parameters}
        adamw = BF16AdamW(groups, config.lr, betas, config.eps, names, local_with_offset)
    elif to_local is None:
        adamw = optim.AdamW(groups, config.lr, betas, config.eps, **{config.implementation: True})
    else:
        options = {config.implementation: True}
        adamw = LocalAdamW(groups, config.lr, betas, config.eps, to_local=to_local, **options)
    if muon_params:
        adamw.register_step_pre_hook(Muon(list(muon_params.values()), orthogonalize_fn, to_local or identity))
    return adamw


def select_muon_params(
    config: OptimConfig, parameters: Iterable[tuple[str, nn.Parameter]], specs: ParamSpecs
) -> dict[str, nn.Parameter]:
    """Return the parameters that Muon updates: the matrices of the blocks. AdamW updates embeddings and the head."""
    if config.name != "muon":
        return {}
    return {name: parameter for name, parameter in parameters if specs[name].muon and not is_frozen(config, name)}
