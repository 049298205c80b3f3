"""Model FLOPs, and the rate that a device could reach: the two sides of MFU.

Convention, printed beside the number: PaLM's (Chowdhery et al. 2022, appendix B). Per trained
token 6 per weight of a matrix product (the head counts, the embedding look-up does not) plus
12 * layers * heads * head_dim * seq_len for attention, the causal half not taken off.
Recomputation is not counted.
"""

import torch

from dist_llm.config.derive import gated
from dist_llm.config.schema import ModelConfig
from dist_llm.observe.matmul_rate import matmul_rate

CONVENTION = "6N + 12LHES, causal not halved"

# Dense bf16 TFLOP/s from the makers' data sheets (their sparse figures halved), by name; first match wins.
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


def matmul_weights(model: ModelConfig) -> int:
    """Weights that take part in a matrix product for each token of a decoder or an encoder."""
    return model.n_layers * _block(model) + _head(model)


def flops_per_token(model: ModelConfig, seq_len: int) -> int:
    """FLOPs to train on one token of a decoder or an encoder: forward and backward."""
    return 6 * matmul_weights(model) + 12 * model.n_layers * model.n_heads * model.head_dim * seq_len


def flops_per_sample(model: ModelConfig, inputs: int, source: int) -> int:
    """FLOPs to train on one sample: `inputs` tokens through the stack with the head, `source` through an encoder.

    Of cross-attention, queries and outputs count for the former, keys and values for the latter.
    """
    width = model.d_model * model.head_dim
    queries, keys = 2 * width * model.n_heads, 2 * width * model.n_kv_heads
    crossing = model.n_layers if source else 0
    weights = inputs * (matmul_weights(model) + crossing * queries)
    weights += source * (model.n_encoder_layers * _block(model) + crossing * keys)
    pairs = model.n_layers * inputs**2 + model.n_encoder_layers * source**2 + crossing * inputs * source
    return 6 * weights + 12 * model.n_heads * model.head_dim * pairs


def _block(model: ModelConfig) -> int:
    attention = model.d_model * model.head_dim * 2 * (model.n_heads + model.n_kv_heads)
    return attention + model.d_model * model.d_ff * (3 if gated(model) else 2)


def _head(model: ModelConfig) -> int:
    return model.d_model * (model.vocab_size + (model.d_model if model.head == "mlm" else 0))


def peak_flops(device: torch.device, precision: str) -> tuple[float, str]:
    """(FLOP/s of one device, where the figure is from): published for known GPUs, else measured."""
    if device.type == "cuda" and precision != "fp32":  # fp16 runs at bf16's rate
        name = torch.cuda.get_device_name(device)
        for known, tflops in PUBLISHED_BF16_TFLOPS.items():
            if known in name:
                return tflops * 1e12, f"published for {known}"
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    return matmul_rate(device, dtype), "measured matmul rate"
