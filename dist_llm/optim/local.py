"""torch's AdamW and SGD on what a rank has of each tensor.

Asked for whole ones, torch plans every list of them: seconds in the first step on a mesh of several axes, and a step
that takes twice as long. An update is of each element by itself, so what a rank has is all that it needs.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, optim
from torch.optim.sgd import sgd

Local = Callable[[Tensor], Tensor]  # this rank's share of a tensor, in the same memory


class LocalAdamW(optim.AdamW):
    def __init__(self, local: Local, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.local = local

    def _init_group(self, group: dict[str, Any], *lists: list[Any]) -> Any:
        found = super()._init_group(group, *lists)  # type: ignore[no-untyped-call]
        for each in lists:
            each[:] = map(self.local, each)
        return found


class LocalSGD(optim.SGD):
    def __init__(self, local: Local, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.local = local

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            moved = [each for each in group["params"] if each.grad is not None]
            buffers: list[Tensor | None] = [None] * len(moved)
            if group["momentum"]:
                for each in moved:
                    # A buffer of zeros becomes the gradient, as torch's first one does.
                    self.state[each].setdefault("momentum_buffer", torch.zeros_like(each))
                buffers = [self.local(self.state[each]["momentum_buffer"]) for each in moved]
            options = {key: group[key] for key in ("weight_decay", "momentum", "lr", "dampening", "nesterov")}
            gradients = [self.local(each.grad) for each in moved]
            sgd(list(map(self.local, moved)), gradients, buffers, maximize=False, foreach=True, **options)
