"""Compute the probe of weights with at most one block of the model in memory. Conversions use this.

The probe is the loss and some logits of a fixed batch, see `checkpoint/probe.py`.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from dist_llm.checkpoint.probe import Probe, build_probe_batch, count_probe_tokens, select_logits
from dist_llm.config.model_section import ModelConfig
from dist_llm.convert.weights import Weights
from dist_llm.convert.write_weights import DTYPES
from dist_llm.models.build_model import build_model
from dist_llm.param_spec import iter_weights


@torch.no_grad()
def compute_probe_layerwise(weights: Weights, config: ModelConfig, dtype: str = "fp32") -> Probe:
    """Compute the probe of weights under our names, rounded to `dtype`, in fp32.

    Of the blocks, only one is in memory. The embedding stays there only if the head is tied to it.
    """
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

    def free(module: nn.Module) -> None:
        """Replace all parameters of a module by meta tensors."""
        for submodule in module.modules():
            for attribute, value in list(submodule.named_parameters(recurse=False)):
                setattr(submodule, attribute, nn.Parameter(value.to("meta"), requires_grad=False))

    lazy_modules = {f"blocks.{block_name}": block for block_name, block in model.blocks.items()}
    assert model.embed is not None
    assert model.head is not None
    if config.architecture != "encoder_decoder" and not config.tie_embeddings:
        # The two largest matrices are then never in memory at the same time.
        lazy_modules |= {"embed": model.embed, "head": model.head}
    load([name for name, _ in model.named_parameters() if not name.startswith(tuple(lazy_modules))])
    load_handles: dict[str, RemovableHandle] = {}
    for path, module in lazy_modules.items():
        names = [f"{path}.{name}" for name, _ in iter_weights(module)]
        load_handles[path] = module.register_forward_pre_hook(lambda _module, _inputs, names=names: load(names))
        if module is not model.head:  # it runs twice
            module.register_forward_hook(lambda module, _inputs, _output: free(module))
    head_inputs: list[tuple[Any, ...]] = []
    model.head.register_forward_pre_hook(lambda _module, inputs: head_inputs.append(inputs))
    batch = build_probe_batch(config)
    loss = float(model(batch.inputs_BS, **batch.forward_arguments()).double().sum()) / count_probe_tokens(config)
    if "head" in load_handles:
        load_handles["head"].remove()  # the head is in memory now
    x_BSD, tied_VD, *_ = head_inputs[0]
    return Probe(loss, select_logits(model.head(x_BSD[:1, -1:], tied_VD, None)[0, -1]), "fp32", dtype)
