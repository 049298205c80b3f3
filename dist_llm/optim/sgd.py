"""SGD on the local shards of DTensors."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, optim
from torch.optim.sgd import sgd

from dist_llm.optim.adamw import ToLocal


class LocalSGD(optim.SGD):
    """torch's SGD on the local shards of DTensors. `LocalAdamW` explains why."""

    def __init__(self, groups: Iterable[dict[str, Any]], lr: float, momentum: float, to_local: ToLocal) -> None:
        super().__init__(groups, lr=lr, momentum=momentum, foreach=True)
        self.to_local = to_local

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            buffers: list[Tensor | None] = [None] * len(parameters)
            if group["momentum"]:
                for parameter in parameters:
                    # After the first step this buffer equals the gradient, as in torch, which starts without a buffer.
                    self.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))
                buffers = [self.to_local(self.state[parameter]["momentum_buffer"]) for parameter in parameters]
            options = {key: group[key] for key in ("weight_decay", "momentum", "lr", "dampening", "nesterov")}
            gradients = [self.to_local(parameter.grad) for parameter in parameters]
            local_params = list(map(self.to_local, parameters))
            sgd(local_params, gradients, buffers, maximize=False, foreach=True, **options)
