"""Build the optimizer of a config, with its parameter groups: weight decay, no weight decay, Muon."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn, optim

from dist_llm.config.optim_sections import OptimConfig, OptimKeys
from dist_llm.optim.adamw import BF16AdamW, LocalAdamW, LocalWithOffset, ToLocal
from dist_llm.optim.muon import Muon, Orthogonalize, orthogonalize
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
    `orthogonalize_fn` orthogonalizes the momenta of Muon.
    """
    parameters = list(parameters)
    muon_params = select_muon_params(parameters, specs) if config.name == "muon" else {}
    adamw_params = ((name, parameter) for name, parameter in parameters if name not in muon_params)
    decay, no_decay = split_weight_decay(config, adamw_params, specs)
    groups: list[dict[str, Any]] = [
        {"params": decay, "weight_decay": config.weight_decay},
        {"params": no_decay, "weight_decay": 0.0},
    ]
    if config.name == "muon":
        muon_options = {"weight_decay": config.weight_decay, "momentum": config.muon_momentum}
        groups.append({"params": list(muon_params.values()), **muon_options})
    groups = [group for group in groups if group["params"]]
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
        adamw.register_step_pre_hook(Muon(orthogonalize_fn, to_local or identity))
    return adamw


def split_weight_decay(
    config: OptimKeys, parameters: Iterable[tuple[str, nn.Parameter]], specs: ParamSpecs
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return (parameters with weight decay, parameters without weight decay).

    Vectors (norms and biases) have no weight decay. Embeddings have weight decay if `decay_embeddings` is set. A tied
    head is an embedding.
    """
    decay: list[nn.Parameter] = []
    no_decay: list[nn.Parameter] = []
    for name, parameter in parameters:
        is_exempt_embedding = specs[name].is_embedding and not config.decay_embeddings
        (decay if specs[name].decay and not is_exempt_embedding else no_decay).append(parameter)
    return decay, no_decay


def select_muon_params(parameters: Iterable[tuple[str, nn.Parameter]], specs: ParamSpecs) -> dict[str, nn.Parameter]:
    """Return the parameters that Muon updates: the matrices of the blocks. AdamW updates embeddings and the head."""
    return {name: parameter for name, parameter in parameters if specs[name].muon}
