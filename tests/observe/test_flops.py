"""Model FLOPs equal a manual count and the FLOP counter of torch."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dist_llm.config.model_section import ModelConfig
from dist_llm.models.decoder import Decoder
from dist_llm.observe import flops
from dist_llm.observe.flops import count_flops_per_token, count_matmul_weights, find_peak_flops

SHAPE = {"d_model": 8, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "head_dim": 4, "d_ff": 24}
SHAPE |= {"vocab_size": 10, "max_seq_len": 16}
SWIGLU = ModelConfig(**SHAPE, activation="swiglu", vocab_multiple=64)
GELU = ModelConfig(**SHAPE, activation="gelu", positions="learned", bias=True, norm="layernorm", tie_embeddings=True)
GATED = [ModelConfig(**SHAPE, output_gate=gate) for gate in ("elementwise", "per_head")]


def test_the_weight_count_matches_a_manual_count():
    """One token of the tiny model, multiply-adds of each product.

    q    8 x 8   = 64     (2 heads of 4)
    k, v 8 x 4   = 32 each (1 key-value head of 4)
    out  8 x 8   = 64
    gate, up, down: 8 x 24 = 192 each
    a layer: 64 + 2 * 32 + 64 + 3 * 192 = 768;  two: 1536
    head 8 x 10  = 80     (without the padding to 64 rows; the embedding lookup is no product)
    """
    assert count_matmul_weights(SWIGLU) == 1536 + 80
    assert count_matmul_weights(GELU) == 1536 - 2 * 192 + 80
    # Attention over 5 tokens: scores and mixing take 5 * 4 multiply-adds each per head: 80 in a layer, 160 in two.
    forward = 2 * (1616 + 160)
    assert count_flops_per_token(SWIGLU, seq_len=5) == 3 * forward == 10_656


def count_product(into, left, right, out_shape=None, **options):
    """Return the FLOPs of a product of two matrices from their shapes, as FlopCounterMode expects it."""
    return 2 * left[0] * left[1] * right[1]


IN_PLACE = {torch.ops.aten.addmm_: count_product}  # unknown to torch's counter


@pytest.mark.parametrize("config", [SWIGLU, GELU, *GATED], ids=["swiglu", "gelu", "gates", "gates of heads"])
def test_the_flop_count_matches_the_counter_of_torch(config):
    """The forward pass is a third of the FLOPs of forward and backward."""
    torch.manual_seed(0)
    model = Decoder(config)
    tokens = torch.randint(0, 10, (3, 16))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as forward:
        model(tokens)  # without targets, because the sliced head computes its gradients in forward
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=IN_PLACE) as both:
        model(tokens, tokens).sum().backward()
    expected = count_flops_per_token(config, seq_len=16) * tokens.numel()
    assert 3 * forward.get_total_flops() == expected
    assert both.get_total_flops() == expected


def test_the_flop_count_of_gpt3_matches_the_published_one():
    """Brown et al. 2020, table D.1: 6 * 174,600 M per token; our count includes the head (0.6 G) and no positions."""
    gpt3 = ModelConfig(
        d_model=12288,
        n_layers=96,
        n_heads=96,
        n_kv_heads=96,
        head_dim=128,
        d_ff=4 * 12288,
        vocab_size=50257,
        max_seq_len=2048,
        activation="gelu",
    )
    assert 6 * count_matmul_weights(gpt3) == pytest.approx(6 * 174.6e9, rel=1e-3)
    assert count_flops_per_token(gpt3, seq_len=2048) - count_flops_per_token(gpt3, seq_len=0) == 12 * 96 * 12288 * 2048


def test_a_layer_with_a_window_counts_only_the_keys_of_the_window():
    """Two layers of 2 heads of 4 dimensions: 12 * 8 FLOPs per key. The window of the first layer has 3 keys."""
    kinds = {"near": {"window": 3}, "full": {}}
    windowed = ModelConfig(**SHAPE, layers=("near", "full"), kinds=kinds)
    unlimited = ModelConfig(**SHAPE)
    assert count_flops_per_token(unlimited, seq_len=16) - count_flops_per_token(windowed, seq_len=16) == 12 * 8 * (
        16 - 3
    )
    assert count_flops_per_token(unlimited, seq_len=2) == count_flops_per_token(windowed, seq_len=2)


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA B200", 2250),
    ],
)
def test_published_peaks_are_dense_rates(name, tflops, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    rate, source = find_peak_flops(torch.device("cuda", 0), "bf16")
    assert rate == tflops * 1e12
    assert source.startswith("published for ")


def test_an_unknown_peak_is_measured(monkeypatch):
    calls = []
    monkeypatch.setattr(flops, "get_matmul_rate", lambda device, dtype: calls.append((device.type, dtype)) or 5e9)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    assert find_peak_flops(torch.device("cpu"), "fp32") == (5e9, "measured matmul rate")
    find_peak_flops(torch.device("cpu"), "bf16")
    find_peak_flops(torch.device("cuda", 0), "bf16")
    find_peak_flops(torch.device("cuda", 0), "fp32")
    bf16, fp32 = torch.bfloat16, torch.float32
    assert calls == [("cpu", fp32), ("cpu", bf16), ("cuda", bf16), ("cuda", fp32)]
