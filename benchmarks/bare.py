"""A minimal model and training loop in plain PyTorch: the baseline of train.py and overhead.py.

`Model` is GPT-2 or Llama in the manner of nanoGPT. It uses F.scaled_dot_product_attention and shares no code with
dist_llm.models, only the config. `Model.iter_dist_llm_parameters` maps its weights to those of dist_llm, so that both
can start from the same values. `Loop` trains any module that returns logits: F.cross_entropy, clip_grad_norm_ and fused
AdamW.
"""

from collections.abc import Iterator
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dist_llm.config.model_section import ModelConfig
from dist_llm.config.optim_sections import OptimConfig


class Attention(nn.Module):
    """Multi-head attention with one projection for q, k and v; applies rotary encoding if angles are given."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.groups, self.head_dim = config.n_heads, config.n_kv_heads, config.head_dim
        self.sizes = [heads * config.head_dim for heads in (self.heads, self.groups, self.groups)]
        self.qkv = nn.Linear(config.d_model, sum(self.sizes), bias=config.bias)
        self.out = nn.Linear(self.sizes[0], config.d_model, bias=config.bias)

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor] | None) -> Tensor:
        B, S, _ = x.shape
        projections = self.qkv(x).split(self.sizes, -1)
        q, k, v = (projection.view(B, S, -1, self.head_dim).transpose(1, 2) for projection in projections)
        if angles is not None:
            q, k = rotate(q, *angles), rotate(k, *angles)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.heads != self.groups)
        return self.out(y.transpose(1, 2).reshape(B, S, -1))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (i, i + E/2) of a head by its angle, in fp32; E is the head dimension."""
    left, right = x.float().chunk(2, dim=-1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1).type_as(x)


class FeedForward(nn.Module):
    """The feed-forward layer of GPT-2 with GELU, or of Llama with SwiGLU."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.d_model, config.d_ff, bias=False) if config.activation == "swiglu" else None
        self.up = nn.Linear(config.d_model, config.d_ff, bias=config.bias)
        self.down = nn.Linear(config.d_ff, config.d_model, bias=config.bias)
        self.approximate = "tanh" if config.activation == "gelu_tanh" else "none"

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is None:
            return self.down(F.gelu(self.up(x), approximate=self.approximate))
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """A transformer block with a norm before attention and before the feed-forward layer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = make_norm(config), make_norm(config)
        self.attention, self.feedforward = Attention(config), FeedForward(config)

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor] | None) -> Tensor:
        x = x + self.attention(self.norm_1(x), angles)
        return x + self.feedforward(self.norm_2(x))


def make_norm(config: ModelConfig) -> nn.Module:
    """Make a norm over d_model: LayerNorm or RMSNorm, as the config says."""
    if config.norm == "layernorm":
        return nn.LayerNorm(config.d_model, eps=config.norm_eps, bias=config.bias)
    return nn.RMSNorm(config.d_model, eps=config.norm_eps)


class Model(nn.Module):
    """A decoder: token ids [B, S] -> logits [B, S, V]. `recompute` uses activation checkpointing for each block."""

    def __init__(self, config: ModelConfig, recompute: bool = False) -> None:
        super().__init__()
        self.config, self.recompute = config, recompute
        self.tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.positions = nn.Embedding(config.max_seq_len, config.d_model) if config.positions == "learned" else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = make_norm(config)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.tokens.weight
        if self.positions is None:
            exponents = torch.arange(0, config.head_dim, 2) / config.head_dim
            angles = torch.arange(config.max_seq_len)[:, None] * config.rope_theta**-exponents
            self.cos: Tensor
            self.sin: Tensor
            self.register_buffer("cos", angles.cos(), persistent=False)
            self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        S = tokens.shape[1]
        x, angles = self.tokens(tokens), None
        if self.positions is not None:
            x = x + self.positions(torch.arange(S, device=tokens.device))
        else:
            angles = (self.cos[:S], self.sin[:S])
        for block in self.blocks:
            x = checkpoint(block, x, angles, use_reentrant=False) if self.recompute else block(x, angles)
        return self.head(self.norm(x))

    def iter_dist_llm_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name of a parameter in dist_llm, the corresponding parameter of this model or a slice of it)."""
        yield "embed.tokens.weight", self.tokens.weight
        if self.positions is not None:
            yield "embed.positions.weight", self.positions.weight
        for block_index, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            for name, parameter in block.named_parameters():
                module, _, kind = name.rpartition(".")
                if module == "attention.qkv":
                    projections = parameter.split(block.attention.sizes)
                    for projection_name, projection in zip("qkv", projections, strict=True):
                        yield f"blocks.{block_index}.attention.{projection_name}.{kind}", projection
                else:
                    module = {"norm_1": "norm_attention", "norm_2": "norm_feedforward"}.get(module, module)
                    yield f"blocks.{block_index}.{module}.{kind}", parameter
        yield from ((f"head.norm.{name}", parameter) for name, parameter in self.norm.named_parameters())
        if not self.config.tie_embeddings:
            yield "head.out.weight", self.head.weight


class Loop:
    """A training loop in plain PyTorch around a module that returns logits."""

    def __init__(self, model: nn.Module, optim: OptimConfig, precision: str, device: torch.device) -> None:
        self.model = model
        self.autocast = torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()
        assert optim.name != "sgd", "the config has SGD, but this loop always uses AdamW"
        groups = [
            {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": optim.weight_decay},
            {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), fused=True)

    def step(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Take one optimizer step and return the loss as a tensor, without waiting for the device."""
        with self.autocast:
            logits = self.model(inputs)
            loss = F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1))
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()
