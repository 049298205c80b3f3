"""The decoder equals its definition: parameter counts, attention masks, KV cache, tied weights, padding, dropout."""

import math

import pytest
import torch

from dist_llm.config.model_section import ModelConfig
from dist_llm.losses.cross_entropy import IGNORE_INDEX, CrossEntropy
from dist_llm.models.attention import scaled_dot_product
from dist_llm.models.attention_mask import CAUSAL, FULL
from dist_llm.models.decoder import Decoder, Embedding
from dist_llm.models.kv_cache import KVCache
from tests.models.reference_decoder import ReferenceDecoder

GPT2 = {
    "positions": "learned",
    "norm": "layernorm",
    "activation": "gelu_tanh",
    "bias": True,
    "tie_embeddings": True,
}
LLAMA = {"positions": "rope", "norm": "rmsnorm", "activation": "swiglu", "n_kv_heads": 2}
POSITIONS = ("rope", "learned", "sinusoidal")
NORM_ORDERS = ("pre", "post")

SIZE_KEYS = ("d_model", "n_layers", "n_heads", "n_kv_heads", "head_dim", "d_ff", "vocab_size", "max_seq_len")
# Name: (published number of parameters, keys of the model, values of SIZE_KEYS). The sources are the released GPT-2 of
# Radford et al. 2019, and table 3 of Dubey et al. 2024.
PUBLISHED = {
    "GPT-2 small": (124_439_808, GPT2, (768, 12, 12, 12, 64, 3072, 50257, 1024)),
    "GPT-2 XL": (1_557_611_200, GPT2, (1600, 48, 25, 25, 64, 6400, 50257, 1024)),
    "Llama 3 8B": (8_030_261_248, {}, (4096, 32, 32, 8, 128, 14336, 128256, 8192)),
    "Llama 3 70B": (70_553_706_496, {}, (8192, 80, 64, 8, 128, 28672, 128256, 8192)),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_equal_the_published_counts(name):
    expected_count, keys, sizes = PUBLISHED[name]
    config = ModelConfig(**keys, **dict(zip(SIZE_KEYS, sizes, strict=True)), vocab_multiple=1)
    with torch.device("meta"):
        model = Decoder(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == expected_count
    assert not list(model.buffers()), "the model has buffers"


def distinct_tokens(length, vocab=20):
    """Return a sequence [1, length] of different token ids."""
    return torch.randperm(vocab, generator=torch.Generator().manual_seed(1))[:length][None]


@pytest.mark.parametrize("norm_order", NORM_ORDERS)
@pytest.mark.parametrize("positions", POSITIONS)
def test_causal_prediction_depends_only_on_previous_tokens(positions, norm_order, build):
    model = build(positions=positions, norm_order=norm_order, n_kv_heads=2)
    tokens = distinct_tokens(7)
    logits = model(tokens)
    for position in range(7):
        (gradient,) = torch.autograd.grad(
            logits[0, position].square().sum(), model.embed.tokens.weight, retain_graph=True
        )
        depends = gradient[tokens[0]].abs().sum(-1) > 0
        assert depends.tolist() == [other <= position for other in range(7)]


def test_full_mask_attends_to_later_tokens(build):
    model = build()
    tokens = distinct_tokens(5)
    (gradient,) = torch.autograd.grad(model(tokens, mask=FULL)[0, 0].square().sum(), model.embed.tokens.weight)
    assert (gradient[tokens[0]].abs().sum(-1) > 0).all()


@pytest.mark.parametrize("positions", POSITIONS)
def test_logits_depend_on_the_token_order(positions, build):
    """The prediction after a token changes if the previous tokens come in another order."""
    model = build(positions=positions)
    one, other = model(torch.tensor([[1, 2, 3]])), model(torch.tensor([[2, 1, 3]]))
    assert (one[0, -1] - other[0, -1]).abs().max() > 1e-3


@pytest.mark.parametrize("chunk_lengths", [[1] * 9, [4, 1, 3, 1], [9], [1, 8], [8, 1]], ids=str)
@pytest.mark.parametrize(
    "kind", [GPT2, LLAMA, {"positions": "sinusoidal", "norm_order": "post"}], ids=["gpt2", "llama", "post"]
)
def test_cached_forward_equals_the_full_forward(kind, chunk_lengths, build):
    model = build(**kind)
    tokens = torch.stack([distinct_tokens(9)[0], distinct_tokens(9)[0].flip(0)])
    cache, chunk_logits = KVCache(), []
    for chunk in tokens.split(chunk_lengths, dim=1):
        chunk_logits.append(model(chunk, cache=cache))
    assert cache.length == 9
    torch.testing.assert_close(torch.cat(chunk_logits, dim=1), model(tokens), rtol=1e-4, atol=1e-5)


def test_grouped_queries_are_heads_with_repeated_keys_and_values(build):
    grouped, full = build(n_kv_heads=2), build(n_kv_heads=4)
    state = grouped.state_dict()
    for name in state:
        if name.endswith(("attention.k.weight", "attention.v.weight")):
            state[name] = state[name].view(2, 8, 32).repeat_interleave(2, dim=0).reshape(32, 32)
    full.load_state_dict(state)
    tokens = distinct_tokens(8)
    torch.testing.assert_close(full(tokens), grouped(tokens), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("S", "T"), [(1, 1), (1, 6), (3, 3), (3, 6), (5, 6), (2, 9)])
@pytest.mark.parametrize("mask", [CAUSAL, FULL], ids=["causal", "full"])
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_attention_is_softmax_under_an_explicit_mask(S, T, mask, kv_heads):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, S, 4, 8, generator=generator)
    k, v = (torch.randn(2, T, kv_heads, 8, generator=generator) for _ in range(2))
    actual = scaled_dot_product(q, k, v, mask, dropout=0.0)
    expected = torch.empty_like(q)
    for row in range(2):
        for head in range(4):
            kv_head = head * kv_heads // 4
            for position in range(S):
                num_keys = T - S + position + 1 if mask.causal else T
                scores = k[row, :num_keys, kv_head] @ q[row, position, head] / math.sqrt(8)
                expected[row, position, head] = scores.softmax(0) @ v[row, :num_keys, kv_head]
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "kind",
    [
        GPT2,
        LLAMA,
        {**GPT2, "norm_order": "post", "positions": "sinusoidal", "activation": "gelu"},
        {**LLAMA, "norm_order": "post", "head_dim": 6, "rope_theta": 500.0, "norm_eps": 0.1},
        {**LLAMA, "norm": "layernorm", "bias": False, "positions": "learned"},
        {**LLAMA, "activation": "swiglu_clamped", "bias": True, "init_std": 1.0},
    ],
    ids=["gpt2", "llama", "post-gelu", "post-rope", "layernorm-no-bias", "clamped"],
)
def test_logits_equal_the_definition(kind, build):
    model = build(**kind)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:  # norms and biases start at 1 and 0: change them so that a mix-up shows
                parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
        tokens = distinct_tokens(9)
        expected = ReferenceDecoder(model).compute_logits(tokens[0])
        torch.testing.assert_close(model(tokens)[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tie", [False, True])
def test_forward_with_targets_returns_the_loss(tie, build):
    loss = CrossEntropy(label_smoothing=0.1, z_loss=0.01)
    model = build(loss, tie_embeddings=tie)
    tokens = distinct_tokens(8)
    targets = tokens.flip(1)
    targets[0, 2] = IGNORE_INDEX
    torch.testing.assert_close(model(tokens, targets), CrossEntropy()(model(tokens), targets), rtol=1e-6, atol=0)
    model.train()
    torch.testing.assert_close(model(tokens, targets), loss(model(tokens), targets), rtol=1e-6, atol=0)


def test_tied_head_shares_the_embedding(build):
    tied, untied = build(tie_embeddings=True), build()
    assert "head.out.weight" not in dict(tied.named_parameters())
    untied.load_state_dict({**tied.state_dict(), "head.out.weight": tied.embed.tokens.weight.detach()})
    tokens = distinct_tokens(8)
    for model in (tied, untied):
        model(tokens, tokens.flip(1)).backward()
    assert torch.equal(tied(tokens), untied(tokens))
    total_grad = untied.embed.tokens.weight.grad + untied.head.out.weight.grad
    torch.testing.assert_close(tied.embed.tokens.weight.grad, total_grad)


@pytest.mark.parametrize("tie", [False, True])
def test_vocabulary_padding_stays_zero(tie, build):
    model = build(CrossEntropy(label_smoothing=0.1, z_loss=0.01), tie_embeddings=tie, vocab_multiple=64)
    plain = build(CrossEntropy(label_smoothing=0.1, z_loss=0.01), tie_embeddings=tie, vocab_multiple=1)
    tokens = distinct_tokens(8)
    assert torch.equal(model(tokens), plain(tokens)), "the padding changes the logits"
    model.train()
    model(tokens, tokens.flip(1)).backward()
    for weight in (model.embed.tokens.weight, *([] if tie else [model.head.out.weight])):
        assert weight.shape == (64, 32)
        assert (weight[20:] == 0).all()
        assert (weight[:20] != 0).all()
        assert (weight.grad[20:] == 0).all()
        assert (weight.grad != 0).any()


def test_embedding_dropout_scales_the_remaining_values(settings):
    torch.manual_seed(0)
    embedding = Embedding(settings(dropout=0.25)).train()
    tokens = torch.zeros(64, 16, dtype=torch.int64)
    out = embedding(tokens, torch.arange(16))
    nonzero = out != 0
    assert 0.72 < nonzero.float().mean() < 0.78
    torch.testing.assert_close(out[nonzero], (embedding.tokens(tokens) / 0.75)[nonzero])
    assert torch.equal(embedding.eval()(tokens, torch.arange(16)), embedding.tokens(tokens))


def test_attention_dropout_scales_the_remaining_weights():
    torch.manual_seed(0)
    T = 64
    q = k = torch.zeros(1, T, 1, T)
    weights = scaled_dot_product(q, k, torch.eye(T)[None, :, None], FULL, dropout=0.25)
    assert 0.70 < (weights != 0).float().mean() < 0.80
    torch.testing.assert_close(weights[weights != 0], torch.full_like(weights[weights != 0], 1 / T / 0.75))


def test_residual_dropout_acts_only_in_training(build):
    model, plain = build(dropout=0.5), build()
    tokens = distinct_tokens(8)
    assert torch.equal(model(tokens), plain(tokens)), "dropout is on in eval"
    model.train()
    runs = []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        runs.append(model(tokens))
    assert torch.equal(runs[0], runs[2])
    assert not torch.equal(runs[0], runs[1])
    block = model.blocks["0"]
    calls = []
    block.dropout.register_forward_hook(lambda module, inputs, output: calls.append((inputs[0], output)))
    model(tokens)
    assert len(calls) == 2
    for before, after in calls:
        nonzero = after != 0
        assert 0.3 < nonzero.float().mean() < 0.7
        torch.testing.assert_close(after[nonzero], 2 * before[nonzero])


@pytest.mark.parametrize("kind", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_logits_and_gradients_are_finite_in_bf16(kind, build):
    model = build(**kind)
    tokens = distinct_tokens(16)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(tokens)
        loss = model(tokens, tokens.flip(1))
    loss.backward()
    assert logits.isfinite().all()
    assert loss.dtype == torch.float32
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    torch.testing.assert_close(logits.float(), model(tokens), rtol=0.1, atol=0.3)


@pytest.mark.parametrize("first_back_layer", [0, 1, 3])
@pytest.mark.parametrize("kind", [GPT2, LLAMA, {"norm_order": "post"}], ids=["gpt2", "llama", "post"])
def test_pipeline_stages_equal_the_full_model(kind, first_back_layer, build):
    model, front, back = (build(n_layers=3, **kind) for _ in range(3))
    front.trim_to_stage(range(first_back_layer), is_first=True, is_last=False)
    back.trim_to_stage(range(first_back_layer, 3), is_first=False, is_last=True)
    tokens = distinct_tokens(8)
    targets = tokens.flip(1)
    assert torch.equal(back(front(tokens)), model(tokens))
    assert torch.equal(back(front(tokens), targets), model(tokens, targets))
    names = {name for stage in (front, back) for name, _ in stage.named_parameters()}
    assert names == {name for name, _ in model.named_parameters()}
    assert front.head is None
    assert (back.embed is None) == (not model.config.tie_embeddings)


@pytest.mark.parametrize("positions_kind", POSITIONS)
def test_forward_uses_given_positions(positions_kind, build):
    model = build(positions=positions_kind)
    tokens = torch.stack([distinct_tokens(6)[0], distinct_tokens(6)[0].flip(0)])
    positions = torch.arange(6)
    assert torch.equal(model(tokens, positions_BS=positions), model(tokens))
    torch.testing.assert_close(model(tokens, positions_BS=positions.expand(2, 6)), model(tokens))
    shifted_logits = model(tokens, positions_BS=torch.stack((positions, positions + 5)))
    torch.testing.assert_close(shifted_logits[0], model(tokens)[0])
    is_equal = torch.allclose(shifted_logits[1], model(tokens)[1], atol=1e-3)
    assert is_equal == (positions_kind == "rope"), (
        "a shift changes the logits of rope, or does not change those of other kinds"
    )


def test_stage_keeps_the_parameter_names_of_the_full_model(build):
    names = {name.split(".")[1] for name, _ in build(n_layers=3).named_parameters() if name.startswith("blocks.")}
    assert names == {"0", "1", "2"}
