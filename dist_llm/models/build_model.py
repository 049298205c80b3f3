"""Build the model of a config."""

import torch

from dist_llm.config.model_section import ModelConfig
from dist_llm.losses.cross_entropy import CrossEntropy
from dist_llm.models.block import Block
from dist_llm.models.decoder import Decoder
from dist_llm.models.encoder_decoder import EncoderDecoder
from dist_llm.models.moe import MoE
from dist_llm.models.parametrization import apply_parametrization
from dist_llm.param_spec import ParamSpecs, collect_param_specs


def build_model(config: ModelConfig, loss: CrossEntropy | None = None) -> Decoder:
    """Build the model of `model.architecture`.

    An encoder-only model is a Decoder too: its batches have a bidirectional attention mask.
    """
    return EncoderDecoder(config, loss) if config.architecture == "encoder_decoder" else Decoder(config, loss)


def count_parameters(config: ModelConfig) -> tuple[int, int]:
    """Return (number of parameters, number of parameters that one token uses).

    They differ by the experts that a token does not choose. Tied embeddings count once.
    """
    with torch.device("meta"):
        model = build_model(config)
    num_total = sum(parameter.numel() for parameter in model.parameters())
    num_unused = 0
    for module in model.modules():
        if isinstance(module, MoE):
            num_expert_params = sum(parameter.numel() for parameter in module.experts.parameters())
            num_unused += num_expert_params // module.moe.n_experts * (module.moe.n_experts - module.moe.top_k)
    return num_total, num_total - num_unused


def format_parameter_counts(config: ModelConfig) -> str:
    """Format the numbers of parameters, such as `46,702,792,704, of which a token uses 12,879,425,536`."""
    num_total, num_active = count_parameters(config)
    return f"{num_total:,}" + (f", of which a token uses {num_active:,}" if num_active < num_total else "")


def build_param_specs(config: ModelConfig) -> ParamSpecs:
    """Return {parameter name: spec} of the full model, which is built without memory for its weights."""
    with torch.device("meta"):
        model = build_model(config)
    block_params = {
        parameter for block in model.modules() if isinstance(block, Block) for parameter in block.parameters()
    }
    block_names = {name for name, parameter in model.named_parameters() if parameter in block_params}
    return apply_parametrization(collect_param_specs(model), block_names, config)
