"""Mixed precision: the dtype of products, and what FSDP gathers and reduces. Weights and reductions stay fp32."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy

COMPUTE_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}  # fp32 needs no cast


def autocast(precision: str, device: torch.device) -> AbstractContextManager[None]:
    """Run matrix products inside the context in the compute dtype of `precision`."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, COMPUTE_DTYPES[precision])


def fsdp_policy(precision: str) -> MixedPrecisionPolicy:
    """Return FSDP's policy: gather weights in the compute dtype, which halves the bytes; reduce gradients in fp32."""
    dtype = COMPUTE_DTYPES.get(precision)
    return MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32 if dtype else None)
