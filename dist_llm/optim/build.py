"""Parameters -> an optimizer: who is decayed, and which update."""

from collections.abc import Iterable

from torch import nn, optim

from dist_llm.config.schema import OptimConfig


def build_optimizer(config: OptimConfig, parameters: Iterable[tuple[str, nn.Parameter]]) -> optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019, algorithm 2) or SGD over (name, parameter) pairs."""
    decayed, free = split_decayed(config, parameters)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": free, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    if config.name == "sgd":
        # Not fused: torch has no fused SGD for sharded parameters.
        return optim.SGD(groups, lr=config.lr, momentum=config.momentum, foreach=True)
    how = {config.implementation: True}
    return optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, **how)


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
