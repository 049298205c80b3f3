"""Two variants of AdamW: torch's AdamW on the local shards of DTensors, and an AdamW with moments in bf16.

bf16 moments save 4 bytes of optimizer state per parameter.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, optim

from dist_llm.compat import MappedAdamW
from dist_llm.counter_rng import hash64, iter_element_ids, splitmix64

# Functions from a tensor to the shard of this rank, which shares its memory. LocalWithOffset also returns the offset of
# the shard in the full tensor.
ToLocal = Callable[[Tensor], Tensor]
LocalWithOffset = Callable[[Tensor], tuple[Tensor, tuple[int, ...]]]


class LocalAdamW(MappedAdamW):
    """torch's AdamW on the local shards of DTensors. The update is elementwise, so shards are independent.

    On DTensors themselves, torch plans each operation on a list of tensors. Measured with eight ranks, three mesh
    dimensions and two cores, the first step takes tens of seconds, and later steps take twice as long.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], *arguments: Any, to_local: ToLocal, **options: Any) -> None:
        super().__init__(groups, *arguments, **options)
        self.to_local = to_local

    def map_tensor(self, tensor: Tensor) -> Tensor:
        return self.to_local(tensor)


class BF16AdamW(optim.Optimizer):
    """AdamW (Loshchilov and Hutter 2019, algorithm 2), computed in fp32, with moments stored in bf16.

    Stochastic rounding keeps the moments unbiased. With rounding to nearest, a second moment would stop changing when
    the relative change of a step is below 1/512. The random bits depend only on the parameter name, the element and the
    step, so all layouts and resumed runs round equally.
    """

    moment_dtypes: ClassVar = {"exp_avg": torch.bfloat16, "exp_avg_sq": torch.bfloat16}

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        names: Mapping[Tensor, str],
        local_with_offset: LocalWithOffset,
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self.names, self.local_with_offset = names, local_with_offset

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update_parameter(parameter, parameter.grad, group)

    def _update_parameter(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            for moment, dtype in self.moment_dtypes.items():
                state[moment] = torch.zeros_like(parameter, dtype=dtype)
        step = state["step"].add_(1)
        weights, offset = self.local_with_offset(parameter)
        gradient, exp_avg, exp_avg_sq = (
            self.local_with_offset(tensor)[0] for tensor in (gradient.float(), state["exp_avg"], state["exp_avg_sq"])
        )
        (beta1, beta2), lr = group["betas"], group["lr"]
        # Element ids stay below 2**40, so that steps and elements have different random bits.
        key = (step.long() << 40) ^ hash64(self.names[parameter])
        for rows, element_ids in iter_element_ids(weights, parameter.shape, offset):
            mean = exp_avg[rows].float().lerp_(gradient[rows], 1 - beta1)
            mean_square = exp_avg_sq[rows].float().mul_(beta2)
            mean_square.addcmul_(gradient[rows], gradient[rows], value=1 - beta2)
            bits = splitmix64(element_ids ^ key)
            exp_avg[rows] = stochastic_round_bf16(mean, bits)
            exp_avg_sq[rows] = stochastic_round_bf16(mean_square, bits >> 16)
            denominator = mean_square.div_(1 - beta2**step).sqrt_().add_(group["eps"])
            weights[rows].mul_(1 - lr * group["weight_decay"])
            weights[rows].addcdiv_(mean.div_(1 - beta1**step), denominator, value=-lr)


def stochastic_round_bf16(values: Tensor, bits: Tensor) -> Tensor:
    """Round fp32 to bf16 without bias. The lower 16 of the random `bits` decide whether to round up or down."""
    rounded = ((values.view(torch.int32) + (bits & 0xFFFF).int()) & -0x10000).view(torch.float32)
    # Leave out NaN: on a GPU all its bits are set, and the addition would overflow.
    return torch.where(values.isfinite(), rounded, values).bfloat16()
