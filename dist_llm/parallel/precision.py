"""Mixed precision: the dtypes of matrix products and of the collectives of FSDP. Weights and reductions stay fp32."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy

COMPUTE_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}  # fp32 needs no cast


def autocast(precision: str, device: torch.device) -> AbstractContextManager[None]:
    """Return a context in which matrix products run in the compute dtype of `precision`."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, COMPUTE_DTYPES[precision])


def fsdp_policy(precision: str) -> MixedPrecisionPolicy:
    """Return the policy of FSDP: gather weights in the compute dtype, and reduce gradients in fp32."""
    dtype = COMPUTE_DTYPES.get(precision)
    return MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32 if dtype else None)
