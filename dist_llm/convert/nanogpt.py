"""Convert between nanoGPT's ckpt.pt and our checkpoints.

The file is a dictionary: `model` has the tensors of GPT-2, not transposed, and `model_args` has the sizes.
torch.compile adds the prefix `_orig_mod.` to each name. The head is the token embedding under a second name.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from dist_llm.config.compare import get_function_keys
from dist_llm.config.model_section import ModelConfig
from dist_llm.config.optim_sections import AdamWConfig, AdamWKeys
from dist_llm.config.schema import Config
from dist_llm.convert.hf_export import to_huggingface
from dist_llm.convert.hf_tensors import list_tensor_mappings
from dist_llm.convert.weights import DictWeights, Weights, require_tensors
from dist_llm.errors import CheckpointError

# nanoGPT's name of a size -> our config key.
SIZES = {
    "n_layer": "n_layers",
    "n_head": "n_heads",
    "n_embd": "d_model",
    "block_size": "max_seq_len",
    "vocab_size": "vocab_size",
}
ARGUMENTS = {*SIZES, "bias", "dropout"}
COMPILED_PREFIX = "_orig_mod."
EMBEDDING, HEAD = "transformer.wte.weight", "lm_head.weight"
BLOCKS = "transformer.h."
MODEL_ORDER = ("transformer.wte.", "transformer.wpe.", BLOCKS, "transformer.ln_f.")  # name prefixes in module order
BLOCK_ORDER = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
UNKNOWN_LOSS = 1e9  # initial best_val_loss of nanoGPT


class NanoGPTModel(NamedTuple):
    """The content of a ckpt.pt that a conversion uses."""

    config: ModelConfig
    weights: Weights  # by the names of nanoGPT, see family `nanogpt` in hf_tensors.py


def parse_nanogpt(content: Mapping[Any, Any], location: str = "ckpt.pt") -> NanoGPTModel:
    """Check and convert the content of a ckpt.pt.

    Raises CheckpointError, which names `location`, if the content is not from nanoGPT.
    """
    arguments = content.get("model_args")
    if not isinstance(arguments, dict) or "model" not in content:
        raise CheckpointError(f"{location}: not a checkpoint of nanoGPT: has no model and model_args")
    if unknown := sorted(map(str, arguments.keys() - ARGUMENTS)):
        raise CheckpointError(f"{location}: nanoGPT's model_args: {unknown[0]} ({arguments[unknown[0]]!r}) is unknown")
    if missing := sorted(ARGUMENTS - {"dropout"} - arguments.keys()):
        raise CheckpointError(f"{location}: nanoGPT's model_args: {missing[0]} is missing")
    sizes = {key: arguments[argument] for argument, key in SIZES.items()}
    if not all(type(size) is int and size > 0 for size in sizes.values()):
        raise CheckpointError(
            f"{location}: nanoGPT's model_args: sizes must be whole numbers above 0, found {arguments}"
        )
    try:
        model = ModelConfig(
            **sizes,
            n_kv_heads=sizes["n_heads"],
            head_dim=sizes["d_model"] // sizes["n_heads"],
            d_ff=4 * sizes["d_model"],
            positions="learned",
            norm="layernorm",
            activation="gelu",
            bias=arguments["bias"],
            tie_embeddings=True,
        )
    except ValidationError as error:
        raise CheckpointError(
            f"{location}: nanoGPT's model_args: {error.errors()[0]['msg']}, found {arguments}"
        ) from None
    tensors = require_tensors(content["model"], f"{location}: model")
    return NanoGPTModel(
        model, DictWeights({name.removeprefix(COMPILED_PREFIX): tensor for name, tensor in tensors.items()})
    )


def build_nanogpt(weights: Weights, config: Config, step: int = 0) -> dict[str, Any]:
    """Return the content of a ckpt.pt for nanoGPT's sample.py and train.py, with a new optimizer state.

    All tensors are in memory, in fp32. Raises CheckpointError if nanoGPT cannot express the model.
    """
    model = config.model
    arguments: dict[str, Any] = {argument: getattr(model, key) for argument, key in SIZES.items()}
    arguments |= {"bias": model.bias, "dropout": model.dropout}
    expected, actual = (
        get_function_keys(model),
        get_function_keys(parse_nanogpt({"model_args": arguments, "model": {}}).config),
    )
    if mismatches := [f"{key} {expected[key]} (not {actual[key]})" for key in expected if actual[key] != expected[key]]:
        raise CheckpointError(f"nanoGPT does not support this model: it has {', '.join(mismatches)}")
    view = to_huggingface(weights, model, "nanogpt")
    # nanoGPT's optimizer numbers the parameters in module order.
    names = [
        name
        for _, name in sorted(
            (_module_order(mapping.hf_name), mapping.hf_name) for mapping in list_tensor_mappings("nanogpt", model)
        )
    ]
    tensors = {name: view.read(name).float().contiguous() for name in dict.fromkeys(names)}
    optimizer = _build_adamw_state(
        list(tensors.values()), config.optim if isinstance(config.optim, AdamWKeys) else AdamWConfig()
    )
    tensors[HEAD] = tensors[EMBEDDING]
    return {
        "model": tensors,
        "optimizer": optimizer,
        "model_args": arguments,
        "iter_num": step,
        "best_val_loss": UNKNOWN_LOSS,
        "config": {},
    }


def _module_order(name: str) -> tuple[int, int, int]:
    """Return the sort key of a parameter in nanoGPT's order: (index of its module, layer, index in the layer)."""
    module = next(prefix for prefix in MODEL_ORDER if name.startswith(prefix))
    if module != BLOCKS:
        return MODEL_ORDER.index(module), 0, name.endswith(".bias")
    layer, _, rest = name.removeprefix(BLOCKS).partition(".")
    module, _, kind = rest.rpartition(".")
    return MODEL_ORDER.index(BLOCKS), int(layer), 2 * BLOCK_ORDER.index(module) + (kind == "bias")


def _build_adamw_state(tensors: Sequence[Tensor], optim: AdamWKeys) -> dict[str, Any]:
    """Return the state of a new optimizer with nanoGPT's two groups: matrices have weight decay, vectors do not."""
    with torch.device("meta"):
        parameters = [nn.Parameter(torch.empty(tensor.shape)) for tensor in tensors]
    groups = [
        {"params": [parameter for parameter in parameters if parameter.ndim >= 2], "weight_decay": optim.weight_decay},
        {"params": [parameter for parameter in parameters if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=optim.lr, betas=(optim.beta1, optim.beta2)).state_dict()
