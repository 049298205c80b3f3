"""Model FLOPs and peak device FLOP/s, from which MFU is computed.

The convention, which the log states, is that of PaLM (Chowdhery et al. 2022, appendix B). A trained token costs 6 FLOPs
per weight of a matrix product (the head counts, the embedding lookup does not), plus 12 * layers * heads * head_dim *
seq_len for attention, without halving it for a causal mask. Recomputation is not counted.
"""

import torch

from dist_llm.config.derive import gated
from dist_llm.config.schema import ModelConfig
from dist_llm.observe.matmul_rate import matmul_rate

CONVENTION = "6N + 12LHES, causal not halved"

# Dense bf16 TFLOP/s from data sheets (sparse figures halved), by a part of the device name; the first match is used.
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
    return model.n_layers * _block_weights(model) + _head_weights(model)


def flops_per_token(model: ModelConfig, seq_len: int) -> int:
    """Return the FLOPs of forward and backward for one token of a decoder-only or encoder-only model."""
    return 6 * count_matmul_weights(model) + 12 * model.n_layers * model.n_heads * model.head_dim * seq_len


def flops_per_sample(model: ModelConfig, num_inputs: int, num_encoder_inputs: int) -> int:
    """Return the FLOPs of forward and backward for one sample of `num_inputs` tokens in the stack with the head.

    `num_encoder_inputs`: tokens in the encoder. In cross-attention, queries and outputs cost per input of the decoder,
    keys and values per input of the encoder.
    """
    width = model.d_model * model.head_dim
    query_weights, key_weights = 2 * width * model.n_heads, 2 * width * model.n_kv_heads
    n_cross_layers = model.n_layers if num_encoder_inputs else 0
    products = num_inputs * (count_matmul_weights(model) + n_cross_layers * query_weights)
    products += num_encoder_inputs * (model.n_encoder_layers * _block_weights(model) + n_cross_layers * key_weights)
    scores = model.n_layers * num_inputs**2 + model.n_encoder_layers * num_encoder_inputs**2
    scores += n_cross_layers * num_inputs * num_encoder_inputs
    return 6 * products + 12 * model.n_heads * model.head_dim * scores


def _block_weights(model: ModelConfig) -> int:
    attention = model.d_model * model.head_dim * 2 * (model.n_heads + model.n_kv_heads)
    return attention + model.d_model * model.d_ff * (3 if gated(model) else 2)


def _head_weights(model: ModelConfig) -> int:
    return model.d_model * (model.vocab_size + (model.d_model if model.head == "mlm" else 0))


def peak_flops(device: torch.device, precision: str) -> tuple[float, str]:
    """Return (peak FLOP/s of a device, source): the published figure of known GPUs, else the measured matmul rate."""
    if device.type == "cuda" and precision != "fp32":  # fp16 has the rate of bf16
        name = torch.cuda.get_device_name(device)
        for part, tflops in PUBLISHED_BF16_TFLOPS.items():
            if part in name:
                return tflops * 1e12, f"published for {part}"
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    return matmul_rate(device, dtype), "measured matmul rate"
