"""Compute the probe of weights that are read one tensor at a time: at most one block of the model is in memory."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from dist_llm.checkpoint.probe import Probe, count_probe_tokens, probe_batch, select_logits
from dist_llm.config.schema import ModelConfig
from dist_llm.convert.weights import Weights
from dist_llm.convert.write_weights import DTYPES
from dist_llm.models.build_model import build_model


@torch.no_grad()
def compute_probe_layerwise(weights: Weights, model: ModelConfig, dtype: str = "fp32") -> Probe:
    """Compute the probe in fp32 from weights under our names, rounded to `dtype`. Embedding and head stay in memory."""
    with torch.device("meta"):
        net = build_model(model).eval()

    def load(names: Iterable[str]) -> None:
        for name in names:
            owner, _, leaf = name.rpartition(".")
            value = weights.read(f"model.{name}").to(DTYPES[dtype]).float()
            setattr(net.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))

    def free(block: nn.Module) -> None:
        for module in block.modules():
            for leaf, value in list(module.named_parameters(recurse=False)):
                setattr(module, leaf, nn.Parameter(value.to("meta"), requires_grad=False))

    load([name for name, _ in net.named_parameters() if not name.startswith("blocks.")])
    for number, block in net.blocks.items():
        names = [f"blocks.{number}.{name}" for name, _ in block.named_parameters()]
        block.register_forward_pre_hook(lambda _module, _inputs, names=names: load(names))
        block.register_forward_hook(lambda module, _inputs, _output: free(module))
    heads: list[tuple[Any, ...]] = []
    assert net.head is not None
    net.head.register_forward_pre_hook(lambda _module, inputs: heads.append(inputs))
    batch = probe_batch(model)
    loss = float(net(batch.inputs_BS, **batch.forward_arguments()).double().sum()) / count_probe_tokens(model)
    x_BSD, tied_VD, _ = heads[0]
    return Probe(loss, select_logits(net.head(x_BSD[:1, -1:], tied_VD, None)[0, -1]), "fp32", dtype)
