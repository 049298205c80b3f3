"""Casts to the dtype of autocast."""

import torch
from torch import Tensor


def cast_to_autocast_dtype(x: Tensor) -> Tensor:
    """Cast to the autocast dtype once, instead of once per consumer (q, k, v)."""
    device_type = x.device.type
    return x.to(torch.get_autocast_dtype(device_type)) if torch.is_autocast_enabled(device_type) else x
