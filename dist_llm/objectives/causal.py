"""Predict each next token from all before it."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dist_llm.models.visibility import CAUSAL
from dist_llm.objectives.batch import Batch


def causal(windows_BW: npt.NDArray[Any]) -> Batch:
    """Windows of W = S + 1 tokens -> S inputs and the S tokens that follow them."""
    windows = torch.from_numpy(windows_BW.astype(np.int64))
    return Batch(windows[:, :-1], windows[:, 1:], CAUSAL, scored=windows_BW.shape[0] * (windows_BW.shape[1] - 1))
