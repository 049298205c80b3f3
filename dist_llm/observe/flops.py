"""Count the FLOPs of a model and look up the peak FLOP/s of a device. MFU is computed from both.

MFU is the model FLOPs utilization. The convention is that of PaLM (Chowdhery et al. 2022, appendix B). A trained token
costs 6 FLOPs per weight of a matrix product, plus 12 * heads * head_dim * seq_len per layer for attention; in a layer
with a shorter window, the window replaces seq_len. The head counts as a matrix product; the embedding lookup does not.
A causal mask does not halve the cost. Recomputation is not counted.
"""

from typing import NamedTuple

import torch

from dist_llm.config.model_section import ModelConfig
from dist_llm.models.block import Block
from dist_llm.models.cost import Cost
from dist_llm.observe.matmul_rate import get_matmul_rate

CONVENTION = "6N + 12LHES, causal not halved"  # printed in the log

# Dense bf16 TFLOP/s from data sheets (sparse figures halved), by a substring of the device name. The first match
# applies.
PUBLISHED_BF16_TFLOPS = {
    "B200": 2250.0,
    "GH200": 989.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
}


def count_matmul_weights(model: ModelConfig) -> int:
    """Count the weights of the matrix products that each token of a decoder-only or encoder-only model uses."""
    return sum(cost.weights for cost in _decoder_costs(model)) + _head_weights(model)


def count_flops_per_token(model: ModelConfig, seq_len: int) -> int:
    """Return the FLOPs of forward and backward for one token of a decoder-only or encoder-only model."""
    return sum(cost.count_flops(seq_len) for cost in _decoder_costs(model)) + 6 * _head_weights(model)


def count_flops_per_sample(model: ModelConfig, num_inputs: int, num_encoder_inputs: int) -> int:
    """Return the FLOPs of forward and backward for one sample of `num_inputs` tokens in the stack with the head.

    `num_encoder_inputs` is the number of tokens in the encoder. In cross-attention, the projections of queries and
    outputs process each token of the decoder, and those of keys and values each token of the encoder.
    """
    flops = num_inputs * count_flops_per_token(model, num_inputs)
    if not num_encoder_inputs:
        return flops
    flops += num_encoder_inputs * model.n_encoder_layers * Block.cost(model).count_flops(num_encoder_inputs)
    weights_per_head = model.d_model * model.head_dim
    query_and_out_weights = 2 * weights_per_head * model.n_heads
    key_and_value_weights = 2 * weights_per_head * model.n_kv_heads
    num_products = num_inputs * query_and_out_weights + num_encoder_inputs * key_and_value_weights
    score_flops = 12 * model.n_heads * model.head_dim * num_inputs * num_encoder_inputs
    return flops + model.n_layers * (6 * num_products + score_flops)


def _decoder_costs(model: ModelConfig) -> list[Cost]:
    """Return the cost of each layer of the stack with the head."""
    return [Block.cost(model.layer_config(layer)) for layer in range(model.n_layers)]


def _head_weights(model: ModelConfig) -> int:
    """Return the number of weights of the output head. The head of BERT also has a square matrix."""
    return model.d_model * (model.vocab_size + (model.d_model if model.head == "mlm" else 0))


class PeakFlops(NamedTuple):
    """The peak FLOP/s of a device."""

    flops_per_second: float
    origin: str  # where the figure comes from, for the log


def find_peak_flops(device: torch.device, precision: str) -> PeakFlops:
    """Return the peak of a device: the published figure of a known GPU, or else the measured matmul rate."""
    if device.type == "cuda" and precision != "fp32":  # fp16 and bf16 have the same rate
        device_name = torch.cuda.get_device_name(device)
        for gpu_name, tflops in PUBLISHED_BF16_TFLOPS.items():
            if gpu_name in device_name:
                return PeakFlops(tflops * 1e12, f"published for {gpu_name}")
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    return PeakFlops(get_matmul_rate(device, dtype), "measured matmul rate")
