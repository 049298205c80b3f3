"""Layer features equal a second implementation in fp64, and each planted fault makes this comparison fail.

The second implementation, `Reference`, shares only the config and the parameters with dist_llm.models.
"""

import math
from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F

from dist_llm.config.model_section import UnresolvedModelConfig
from dist_llm.models import attention, rope, softmax_attention
from dist_llm.models.attention import Attention
from dist_llm.models.block import Block
from dist_llm.models.kv_cache import KVCache
from dist_llm.models.norm import LayerNorm, RMSNorm

S = 12
LAYERNORM = {"norm": "layernorm", "norm_bias": True}
MODELS = {
    "windows and scales by kind": {
        "layers": ["near", "far", "unrotated"],
        "n_layers": 4,
        "n_kv_heads": 2,
        "attention_scale": 0.9,
        "kinds": {
            "near": {"window": 3, "attention_scale": 0.2},
            "far": {"rope_theta": 50.0, "rotary_fraction": 0.5},
            "unrotated": {"positions": "none", "attention_scale": None, "attention_cap": 1.5},
        },
    },
    "attention sinks": {
        "attention_sinks": True,
        "layers": ["narrow", "wide", "all", "capped", "plain"],
        "n_layers": 5,
        "n_kv_heads": 2,
        "kinds": {
            "narrow": {"window": 3},
            "wide": {"window": 9},
            "all": {},
            "capped": {"attention_cap": 0.4},
            "plain": {"attention_sinks": False},
        },
    },
    "output gates": {
        "layers": ["elementwise", "per_head", "off"],
        "n_layers": 3,
        "n_kv_heads": 2,
        "kinds": {
            "elementwise": {"output_gate": "elementwise", "qkv_bias": True},
            "per_head": {"output_gate": "per_head", "window": 3},
            "off": {},
        },
    },
    "partial rotation": {"rotary_fraction": 0.25, "qkv_bias": True, "out_bias": True},
    "sandwich norms with 1 + weight": {"norm_order": "sandwich", "norm_weight": "plus_one", "residual_scale": 0.6},
    "layer norms with 1 + weight": {**LAYERNORM, "norm_weight": "plus_one"},
    "reordered norms": {"norm_order": "reordered", "residual_scale": 0.6},
    "parallel sublayers, one norm": {**LAYERNORM, "parallel_residual": "one_norm", "residual_scale": 0.6},
    "parallel sublayers, two norms": {"parallel_residual": "two_norms"},
    "scaled embeddings and logits": {"embedding_scale": 3.0, "logit_scale": 0.5, "logit_cap": 2.0},
}


class Reference:
    """Computes the logits of one sequence from the parameters of a decoder, as the config defines them."""

    def __init__(self, model):
        self.config = model.config
        self.values = {
            name: parameter.detach().clone().requires_grad_() for name, parameter in model.named_parameters()
        }

    def compute_logits(self, tokens_S):
        """Return the logits [S, V] of one sequence."""
        config = self.config
        x_SD = self.values["embed.tokens.weight"][tokens_S] * config.embedding_scale
        for layer in range(config.n_layers):
            x_SD = self.apply_block(x_SD, layer)
        logits_SV = self.normalize(x_SD, "head.norm") @ self.values["head.out.weight"].T * config.logit_scale
        cap = config.logit_cap
        return logits_SV if cap is None else cap * torch.tanh(logits_SV / cap)

    def apply_block(self, x_SD, layer):
        """Return the residual stream [S, D] after a block."""
        order, scale, name = self.config.norm_order, self.config.residual_scale, f"blocks.{layer}."
        sublayers = {"attention": self.attend, "feedforward": self.apply_feedforward}
        if self.config.parallel_residual != "off":
            norms = ["attention", "feedforward"]
            if self.config.parallel_residual == "one_norm":
                norms = ["attention", "attention"]
            inputs = [self.normalize(x_SD, f"{name}norm_{norm}") for norm in norms]
            outputs = [apply(input_SD, layer) for apply, input_SD in zip(sublayers.values(), inputs, strict=True)]
            return x_SD + scale * outputs[0] + scale * outputs[1]
        for sublayer, apply in sublayers.items():
            norm = f"{name}norm_{sublayer}"
            out_SD = apply(x_SD if order == "reordered" else self.normalize(x_SD, norm), layer)
            if order != "pre":
                out_SD = self.normalize(out_SD, norm if order == "reordered" else f"{norm}_out")
            x_SD = x_SD + scale * out_SD
        return x_SD

    def normalize(self, x_SD, name):
        """Apply the norm with this name."""
        weight, bias = self.values.get(f"{name}.weight"), self.values.get(f"{name}.bias")
        centered = x_SD - x_SD.mean(-1, keepdim=True) if self.config.norm == "layernorm" else x_SD
        out_SD = centered / (centered.square().mean(-1, keepdim=True) + self.config.norm_eps).sqrt()
        if weight is not None:
            out_SD = out_SD * (1 + weight if self.config.norm_weight == "plus_one" else weight)
        return out_SD if bias is None else out_SD + bias

    def attend(self, x_SD, layer):
        """Return the output of attention [S, D]."""
        setting = self.get_settings(layer)
        E, name = self.config.head_dim, f"blocks.{layer}.attention."
        q, k, v = (self.project(x_SD, name + projection).unflatten(-1, (-1, E)) for projection in "qkv")
        if setting["positions"] == "rope":
            q, k = (self.rotate(x_SHE, setting["rope_theta"], setting["rotary_fraction"]) for x_SHE in (q, k))
        groups = q.shape[1] // k.shape[1]
        scores_HST = torch.einsum("she,the->hst", q, k.repeat_interleave(groups, 1))
        scores_HST = scores_HST * (setting["attention_scale"] or 1 / math.sqrt(E))
        if cap := setting["attention_cap"]:
            scores_HST = cap * torch.tanh(scores_HST / cap)
        distance = torch.arange(len(x_SD))[:, None] - torch.arange(len(x_SD))
        allowed = (distance >= 0) & (distance < (setting["window"] or math.inf))
        weights_HST = self.divide(scores_HST.masked_fill(~allowed, -torch.inf).exp(), name)
        out_SHE = torch.einsum("hst,the->she", weights_HST, v.repeat_interleave(groups, 1))
        if f"{name}gate.weight" in self.values:  # a gate per head, or per dimension of each head
            gates = self.project(x_SD, name + "gate").unflatten(-1, (self.config.n_heads, -1))
            out_SHE = out_SHE / (1 + (-gates).exp())
        return self.project(out_SHE.flatten(-2), name + "out")

    def divide(self, exp_HST, name):
        """Divide exp(score) by the sum over the keys, and by exp(sink) of the head if there is one."""
        sums_HS1 = exp_HST.sum(-1, keepdim=True)
        sinks_H = self.values.get(f"{name}sinks")
        return exp_HST / (sums_HS1 if sinks_H is None else sums_HS1 + sinks_H[:, None, None].exp())

    def get_settings(self, layer):
        """Return the keys of a layer that its kind may change."""
        names = ("positions", "rope_theta", "rotary_fraction", "attention_scale", "attention_cap", "window")
        settings = {name: getattr(self.config, name) for name in names}
        if not self.config.layers:
            return settings
        kind = self.config.kinds[self.config.layers[layer % len(self.config.layers)]]
        return settings | {name: getattr(kind, name) for name in names if name in kind.model_fields_set}

    def rotate(self, x_SHE, theta, fraction):
        """Multiply each pair (i, i + F) of the first 2 F dimensions, as a complex number, by exp(i angle)."""
        F_ = int(x_SHE.shape[-1] * fraction) // 2
        angles_SF = torch.arange(len(x_SHE))[:, None] * theta ** (-torch.arange(F_) / F_)
        turns_S1F = torch.polar(torch.ones_like(angles_SF), angles_SF)[:, None]
        rotated = torch.complex(x_SHE[..., :F_], x_SHE[..., F_ : 2 * F_]) * turns_S1F
        return torch.cat((rotated.real, rotated.imag, x_SHE[..., 2 * F_ :]), -1)

    def apply_feedforward(self, x_SD, layer):
        """Return the output of the feed-forward layer [S, D]."""
        name = f"blocks.{layer}.feedforward."
        return self.project(F.silu(self.project(x_SD, name + "gate")) * self.project(x_SD, name + "up"), name + "down")

    def project(self, x_SD, name):
        """Apply the linear layer with this name."""
        out_SD = x_SD @ self.values[f"{name}.weight"].T
        return out_SD + self.values[f"{name}.bias"] if f"{name}.bias" in self.values else out_SD


@pytest.fixture
def build_visible(build):
    """Build a model in fp64 whose norm weights and biases differ from their initial 1 and 0, so that each matters."""

    def build_changed(name):
        model = build(**MODELS[name]).double()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        return model

    return build_changed


def make_tokens():
    """Return a sequence of token ids [1, S]."""
    return torch.arange(S)[None] * 7 % 20


@torch.no_grad()
def assert_equals_the_reference(model):
    """Raise AssertionError unless the model computes the logits of Reference."""
    tokens_BS = make_tokens()
    # RoPE computes its angles in fp32.
    torch.testing.assert_close(model(tokens_BS)[0], Reference(model).compute_logits(tokens_BS[0]), rtol=1e-5, atol=1e-5)


def assert_gradients_equal_the_reference(model):
    """Compare the gradients of all parameters. Equal logits do not prove them: the backward of sinks is ours."""
    tokens_BS, reference = make_tokens(), Reference(model)
    weights_SV = torch.randn(S, 20, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (model(tokens_BS)[0] * weights_SV).sum().backward()
    (reference.compute_logits(tokens_BS[0]) * weights_SV).sum().backward()
    for name, parameter in model.named_parameters():
        expected = reference.values[name].grad
        assert expected.abs().max() > 1e-4, f"{name} has no gradient, so the comparison proves nothing"
        tolerance = 1e-5 * float(expected.abs().max())  # RoPE computes its angles in fp32
        torch.testing.assert_close(
            parameter.grad, expected, rtol=0, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


@torch.no_grad()
def assert_generation_equals_the_full_sequence(model):
    """Compare one token at a time, with the rolling cache, with the logits of the full sequence."""
    tokens_BS, cache = make_tokens(), KVCache()
    logits = torch.cat([model(tokens_BS[:, index : index + 1], cache=cache) for index in range(S)], dim=1)
    torch.testing.assert_close(logits, model(tokens_BS), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_the_reference(name, build_visible):
    assert_equals_the_reference(build_visible(name))


@pytest.mark.parametrize("name", MODELS)
def test_gradients_equal_the_reference(name, build_visible):
    assert_gradients_equal_the_reference(build_visible(name))


@pytest.mark.parametrize("name", MODELS)
def test_generation_equals_the_full_sequence(name, build_visible):
    assert_generation_equals_the_full_sequence(build_visible(name))


@contextmanager
def the_rolling_cache_keeps_one_key_too_many():
    """Keep `window` keys, all of which the next query attends to."""
    original = KVCache.append

    def append(self, layer, k_BSKE, v_BSKE, window):
        return original(self, layer, k_BSKE, v_BSKE, None if window is None else window + 1)

    with patch.object(KVCache, "append", append):
        yield


@contextmanager
def norm_weights_are_multiplied_without_the_one():
    """Planted bug: a norm multiplies by w, not by 1 + w."""
    get_weight = property(lambda self: lambda: self.weight)
    with patch.object(RMSNorm, "effective_weight", get_weight), patch.object(LayerNorm, "effective_weight", get_weight):
        yield


@contextmanager
def all_dimensions_rotate():
    """Planted bug: RoPE rotates all dimensions of a head, not a fraction."""
    with patch.object(rope, "count_rotated_dims", lambda config: config.head_dim):
        yield


@contextmanager
def all_kinds_have_the_attention_scale_of_the_model():
    """Planted bug: the attention scale of a kind of layer is ignored."""
    original = UnresolvedModelConfig.with_kind

    def with_kind(self, kind):
        return original(self, kind).model_copy(update={"attention_scale": self.attention_scale})

    with patch.object(UnresolvedModelConfig, "with_kind", with_kind):
        yield


@contextmanager
def outputs_are_scaled_twice():
    """Planted bug: outputs of sublayers are multiplied by the square of the residual scale."""
    original = Block.__init__

    def init(self, config, *args, **kwargs):
        scaled_twice = config.model_copy(update={"residual_scale": config.residual_scale**2})
        original(self, scaled_twice, *args, **kwargs)

    with patch.object(Block, "__init__", init):
        yield


@contextmanager
def the_feedforward_reads_the_updated_residual_stream():
    """Planted bug: parallel sublayers run in sequence."""

    def forward(self, x_BSD, context):
        scale = self.config.residual_scale
        x_BSD = x_BSD + scale * self.attention(self.norm_attention(x_BSD), context)
        norm = self.norm_feedforward or self.norm_attention
        return x_BSD + scale * self.feedforward(norm(x_BSD)), None

    with patch.object(Block, "forward", forward):
        yield


@contextmanager
def no_head_has_a_sink():
    original = attention.scaled_dot_product
    with patch.object(attention, "scaled_dot_product", lambda *args: original(*args[:-1], None)):
        yield


@contextmanager
def sinks_belong_to_the_heads_in_reverse_order():
    original = attention.scaled_dot_product

    def reverse(*args):
        return original(*args[:-1], None if args[-1] is None else args[-1].flip(0))

    with patch.object(attention, "scaled_dot_product", reverse):
        yield


@contextmanager
def sinks_are_capped():
    original = attention.dense_attention

    def cap_sinks(*args):
        *rest, cap, sinks_H = args
        return original(*rest, cap, None if sinks_H is None else cap * torch.tanh(sinks_H / cap))

    with patch.object(attention, "dense_attention", cap_sinks):
        yield


@contextmanager
def backward_divides_by_the_sum_without_the_sink():
    """The backward kernel then gets the log-sum-exp that the forward kernel returned."""
    original = softmax_attention.cpu_flash_attention_backward

    def backward(grad, q, k, v, out, lse, *args, **kwargs):
        _, lse = softmax_attention.cpu_flash_attention(q, k, v, *args, **kwargs)
        return original(grad, q, k, v, out, lse, *args, **kwargs)

    with patch.object(softmax_attention, "cpu_flash_attention_backward", backward):
        yield


@contextmanager
def backward_uses_the_output_without_the_sink():
    original = softmax_attention.cpu_flash_attention_backward

    def backward(grad, q, k, v, out, lse, *args, **kwargs):
        out, _ = softmax_attention.cpu_flash_attention(q, k, v, *args, **kwargs)
        return original(grad, q, k, v, out, lse, *args, **kwargs)

    with patch.object(softmax_attention, "cpu_flash_attention_backward", backward):
        yield


@contextmanager
def gates_belong_to_the_next_head():
    original = Attention._apply_gate
    with patch.object(Attention, "_apply_gate", lambda self, out, gate: original(self, out, gate.roll(1, dims=-1))):
        yield


@contextmanager
def gates_are_applied_without_sigmoid():
    def apply_gate(self, out_BSHE, gate_BSG):
        return out_BSHE * gate_BSG.unflatten(-1, (out_BSHE.shape[2], -1))

    with patch.object(Attention, "_apply_gate", apply_gate):
        yield


@contextmanager
def gates_have_no_gradient():
    original = Attention._apply_gate
    with patch.object(Attention, "_apply_gate", lambda self, out, gate: original(self, out, gate.detach() + 0 * gate)):
        yield


FAULTS = [
    (gates_belong_to_the_next_head, "output gates", assert_equals_the_reference),
    (gates_are_applied_without_sigmoid, "output gates", assert_equals_the_reference),
    (gates_have_no_gradient, "output gates", assert_gradients_equal_the_reference),
    (no_head_has_a_sink, "attention sinks", assert_equals_the_reference),
    (sinks_belong_to_the_heads_in_reverse_order, "attention sinks", assert_equals_the_reference),
    (sinks_are_capped, "attention sinks", assert_equals_the_reference),
    (backward_divides_by_the_sum_without_the_sink, "attention sinks", assert_gradients_equal_the_reference),
    (backward_uses_the_output_without_the_sink, "attention sinks", assert_gradients_equal_the_reference),
    (
        the_rolling_cache_keeps_one_key_too_many,
        "windows and scales by kind",
        assert_generation_equals_the_full_sequence,
    ),
    (norm_weights_are_multiplied_without_the_one, "sandwich norms with 1 + weight", assert_equals_the_reference),
    (norm_weights_are_multiplied_without_the_one, "layer norms with 1 + weight", assert_equals_the_reference),
    (all_dimensions_rotate, "partial rotation", assert_equals_the_reference),
    (all_dimensions_rotate, "windows and scales by kind", assert_equals_the_reference),
    (all_kinds_have_the_attention_scale_of_the_model, "windows and scales by kind", assert_equals_the_reference),
    (outputs_are_scaled_twice, "sandwich norms with 1 + weight", assert_equals_the_reference),
    (outputs_are_scaled_twice, "reordered norms", assert_equals_the_reference),
    (outputs_are_scaled_twice, "parallel sublayers, one norm", assert_equals_the_reference),
    (
        the_feedforward_reads_the_updated_residual_stream,
        "parallel sublayers, one norm",
        assert_equals_the_reference,
    ),
    (
        the_feedforward_reads_the_updated_residual_stream,
        "parallel sublayers, two norms",
        assert_equals_the_reference,
    ),
]


@pytest.mark.parametrize(
    ("fault", "name", "compare"), FAULTS, ids=[f"{fault.__name__}, {name}" for fault, name, _ in FAULTS]
)
def test_a_planted_fault_is_detected(fault, name, compare, build_visible):
    with fault():
        model = build_visible(name)
        with pytest.raises(AssertionError, match="not close"):
            compare(model)
