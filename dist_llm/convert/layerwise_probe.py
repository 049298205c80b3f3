"""Compute the probe of weights with at most one block of the model in memory. Conversions use this.

The probe is the loss and some logits of a fixed batch, see `checkpoint/probe.py`.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from dist_llm.checkpoint.probe import Probe, build_probe_batch, count_probe_tokens, select_logits
from dist_llm.config.model_section import ModelConfig
from dist_llm.convert.weights import Weights
from dist_llm.convert.write_weights import DTYPES
from dist_llm.models.build_model import build_model
from dist_llm.param_spec import iter_weights


@torch.no_grad()
def compute_probe_layerwise(weights: Weights, config: ModelConfig, dtype: str = "fp32") -> Probe:
    """Compute the probe of weights under our names, rounded to `dtype`, in fp32. Embedding and head stay in memory."""
    with torch.device("meta"):
        model = build_model(config).eval()

    def load(names: Iterable[str]) -> None:
        """Read parameters and buffers into the model."""
        for name in names:
            owner, _, attribute = name.rpartition(".")
            value = weights.read(f"model.{name}").to(DTYPES[dtype]).float()
            module = model.get_submodule(owner)
            is_buffer = attribute in dict(module.named_buffers(recurse=False))
            setattr(module, attribute, value if is_buffer else nn.Parameter(value, requires_grad=False))

    def free(block: nn.Module) -> None:
        """Replace the parameters of a block by meta tensors."""
        for module in block.modules():
            for attribute, value in list(module.named_parameters(recurse=False)):
                setattr(module, attribute, nn.Parameter(value.to("meta"), requires_grad=False))

    load([name for name, _ in model.named_parameters() if not name.startswith("blocks.")])
    for block_name, block in model.blocks.items():
        names = [f"blocks.{block_name}.{name}" for name, _ in iter_weights(block)]
        block.register_forward_pre_hook(lambda _module, _inputs, names=names: load(names))
        block.register_forward_hook(lambda module, _inputs, _output: free(module))
    head_inputs: list[tuple[Any, ...]] = []
    assert model.head is not None
    model.head.register_forward_pre_hook(lambda _module, inputs: head_inputs.append(inputs))
    batch = build_probe_batch(config)
    loss = float(model(batch.inputs_BS, **batch.forward_arguments()).double().sum()) / count_probe_tokens(config)
    x_BSD, tied_VD, *_ = head_inputs[0]
    return Probe(loss, select_logits(model.head(x_BSD[:1, -1:], tied_VD, None)[0, -1]), "fp32", dtype)
