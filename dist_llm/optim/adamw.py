"""AdamW with moments in bf16: 4 bytes less per parameter, with none of what plain rounding would lose."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, optim

from dist_llm.counter_rng import hash64, iter_element_ids, splitmix64

# This rank's share of a tensor, in the same memory; and the same with where in the whole it begins.
Local = Callable[[Tensor], Tensor]
Place = Callable[[Tensor], tuple[Tensor, tuple[int, ...]]]


class BF16AdamW(optim.Optimizer):
    """Loshchilov and Hutter 2019, algorithm 2, in fp32; its moments are rounded to bf16 to be kept.

    A moment between two bf16 numbers becomes the upper or the lower one by chance, so that it is right on average: to
    the nearest, a second moment would stand still as soon as steps change it by less than 1/512. Chance is a function
    of the parameter's name, the element and the step: layouts and resumed runs round alike.
    """

    dtypes: ClassVar = {"exp_avg": torch.bfloat16, "exp_avg_sq": torch.bfloat16}

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        names: Mapping[Tensor, str],
        place: Place,
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self.names, self.place = names, place

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, parameter.grad, group)

    def _step(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            for moment, dtype in self.dtypes.items():
                state[moment] = torch.zeros_like(parameter, dtype=dtype)
        step = state["step"].add_(1)
        weights, offset = self.place(parameter)
        gradient, first, second = (
            self.place(each)[0] for each in (gradient.float(), state["exp_avg"], state["exp_avg_sq"])
        )
        (beta1, beta2), lr = group["betas"], group["lr"]
        key = (step.long() << 40) ^ hash64(self.names[parameter])
        for rows, elements in iter_element_ids(weights, parameter.shape, offset):
            m = first[rows].float().lerp_(gradient[rows], 1 - beta1)
            v = second[rows].float().mul_(beta2).addcmul_(gradient[rows], gradient[rows], value=1 - beta2)
            bits = splitmix64(elements ^ key)
            first[rows], second[rows] = rounded(m, bits), rounded(v, bits >> 16)
            root = v.div_(1 - beta2**step).sqrt_().add_(group["eps"])
            weights[rows].mul_(1 - lr * group["weight_decay"]).addcdiv_(m.div_(1 - beta1**step), root, value=-lr)


def rounded(values: Tensor, bits: Tensor) -> Tensor:
    """fp32 to bf16, up with the chance that the lower 16 of the random `bits` give it."""
    moved = ((values.view(torch.int32) + (bits & 0xFFFF).int()) & -0x10000).view(torch.float32)
    return torch.where(values.isfinite(), moved, values).bfloat16()  # a GPU's NaN has all bits set: none may be added
