"""Parameters -> an optimizer: who is decayed, and which update."""

from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor, nn, optim

from dist_llm.config.schema import OptimConfig
from dist_llm.optim.adamw import BF16AdamW, Local, Place
from dist_llm.optim.muon import Muon, Orthogonalize, orthogonalized


def _all(tensor: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    return tensor, (0,) * tensor.ndim


def _whole(tensor: Tensor) -> Tensor:
    return tensor


class Shares(NamedTuple):
    """How a rank steps what it has of parameters; the default: all of them, in plain tensors.

    `orthogonalize` gets what it has of all `matrices`.
    """

    local: Local = _whole
    place: Place = _all
    orthogonalize: Orthogonalize = orthogonalized
    adamw: type[optim.AdamW] = optim.AdamW
    sgd: type[optim.SGD] = optim.SGD


ALL = Shares()


def build_optimizer(
    config: OptimConfig, parameters: Iterable[tuple[str, nn.Parameter]], shares: Shares = ALL
) -> optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019, algorithm 2), Muon for matrices with AdamW for the rest, or SGD."""
    parameters = list(parameters)
    moved = matrices(parameters) if config.name == "muon" else {}
    decayed, free = split_decayed(config, ((name, each) for name, each in parameters if name not in moved))
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": free, "weight_decay": 0.0},
        {"params": list(moved.values()), "weight_decay": config.weight_decay, "momentum": config.muon_momentum},
    ]
    groups = [group for group in groups if group["params"]]
    if config.name == "sgd":
        return shares.sgd(groups, lr=config.lr, momentum=config.momentum, foreach=True)
    betas = config.beta1, config.beta2
    adamw: optim.Optimizer
    if config.moments == "bf16":
        names: dict[Tensor, str] = {each: name for name, each in parameters}
        adamw = BF16AdamW(groups, config.lr, betas, config.eps, names, shares.place)
    else:
        adamw = shares.adamw(groups, config.lr, betas, config.eps, **{config.implementation: True})
    if moved:
        adamw.register_step_pre_hook(Muon(shares.orthogonalize, shares.local))
    return adamw


def split_decayed(
    config: OptimConfig, parameters: Iterable[tuple[str, nn.Parameter]]
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(decayed, not decayed): vectors are norms and biases; a tied head counts as an embedding.

    Tables that are looked up are called embed or relative, `source_` in front for an encoder-decoder's encoder.
    """
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in parameters:
        table = name.removeprefix("source_").startswith(("embed.", "relative."))
        embedding = table and not config.decay_embeddings
        shape = getattr(
            parameter, "ds_shape", parameter.shape
        )  # of one that DeepSpeed has partitioned, nothing is left
        (free if len(shape) < 2 or embedding else decayed).append(parameter)
    return decayed, free


def matrices(parameters: Iterable[tuple[str, nn.Parameter]]) -> dict[str, nn.Parameter]:
    """Those that Muon steps: of the blocks. Rows of tables and of the head are updated each by itself."""
    return {name: each for name, each in parameters if name.startswith("blocks.") and each.ndim == 2}
