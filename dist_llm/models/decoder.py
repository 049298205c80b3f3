"""One stack: embedding, blocks, head. GPT-2, Llama and BERT are settings of it.

Whether it is a decoder or an encoder is said by the visibility that comes with each batch. The model knows
nothing of ranks: layouts are laid over it by `parallel`, from outside. It survives being cut: a part of it
runs what it has and hands on what comes out.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_llm.config.derive import round_up
from dist_llm.config.schema import ModelConfig
from dist_llm.losses.cross_entropy import CrossEntropy, LossTerms
from dist_llm.losses.fused_linear_cross_entropy import VocabShard, linear_cross_entropy
from dist_llm.models.attention import KVCache, RotaryCosSin, materialize_mask
from dist_llm.models.attention_mask import CAUSAL, AttentionMask
from dist_llm.models.block import Block
from dist_llm.models.build_norm import build_norm
from dist_llm.models.feedforward import ACTIVATIONS
from dist_llm.models.positional_encoding import RelativeBias, SinusoidalEncoding, rotary_angles
from dist_llm.models.stochastic_depth import stochastic_depth_scale


class Embedding(nn.Module):
    """Token ids -> vectors, with learned or sinusoidal positions added where the model has them."""

    def __init__(self, config: ModelConfig, tokens: nn.Embedding | None = None) -> None:
        super().__init__()
        # Shared with another embedding where one is given.
        self.tokens = tokens or nn.Embedding(round_up(config.vocab_size, config.vocab_multiple), config.d_model)
        self.positions: nn.Module | None = None
        if config.positions == "learned":
            self.positions = nn.Embedding(config.max_seq_len, config.d_model)
        elif config.positions == "sinusoidal":
            self.positions = SinusoidalEncoding(config.d_model)
        self.norm = build_norm(config) if config.norm_embedding else None
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, tokens_BS: Tensor, positions_BS: Tensor) -> Tensor:
        """Ids and positions [B, S] (positions may be [S]) -> [B, S, D]."""
        x_BSD = self.tokens(tokens_BS)
        if self.positions is not None:
            x_BSD = x_BSD + self.positions(positions_BS).to(x_BSD.dtype)
        return self.dropout(x_BSD if self.norm is None else self.norm(x_BSD))


class Head(nn.Module):
    """Final norm, then logits; or, given targets, their loss summed per sequence.

    In evaluation it is the plain cross-entropy, whatever the training loss is; `terms` collects what that is made of.
    """

    def __init__(self, config: ModelConfig, loss: CrossEntropy) -> None:
        super().__init__()
        self.vocab_size, self.softcap, self.loss = config.vocab_size, config.logit_cap, loss
        self.terms = None if loss.is_plain else LossTerms()
        # In post-norm every block has already ended with a norm.
        self.norm = build_norm(config) if config.norm_order == "pre" else nn.Identity()
        rows = round_up(config.vocab_size, config.vocab_multiple)
        self.dense = MaskedDense(config) if config.head == "mlm" else None
        self.bias = nn.Parameter(torch.empty(rows)) if config.head == "mlm" else None
        self.out = None if config.tie_embeddings else nn.Linear(config.d_model, rows, bias=False)

    def forward(self, x_BSD: Tensor, tied_VD: Tensor | None, targets_BS: Tensor | None) -> Tensor:
        """[B, S, D] -> logits [B, S, V], or the losses' sums [B]. Padding rows of the head are left out."""
        weight_VD = tied_VD if self.out is None else self.out.weight
        assert weight_VD is not None
        if targets_BS is not None:
            vocab_shard = VocabShard(self.vocab_size, 0, self.vocab_size)
            loss, terms = self.loss_for_mode()
            return linear_cross_entropy(
                self.pre_logits(x_BSD), weight_VD, self.bias, targets_BS, loss, self.softcap, vocab_shard, terms
            )
        bias_V = None if self.bias is None else self.bias[: self.vocab_size]
        return softcap(F.linear(self.pre_logits(x_BSD), weight_VD[: self.vocab_size], bias_V), self.softcap)

    def loss_for_mode(self) -> tuple[CrossEntropy, LossTerms | None]:
        """The loss of training or of evaluation, and where its terms are collected."""
        return (self.loss, self.terms) if self.training else (CrossEntropy(), None)

    def pre_logits(self, x_BSD: Tensor) -> Tensor:
        """What is projected on the vocabulary, [B, S, D]."""
        x_BSD = self.norm(x_BSD)
        return x_BSD if self.dense is None else self.dense(x_BSD)


class MaskedDense(nn.Module):
    """BERT's layer before its logits (Devlin et al. 2019, and its source)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.linear = nn.Linear(config.d_model, config.d_model, bias=config.bias)
        self.activation = ACTIVATIONS[config.activation]
        self.norm = build_norm(config)

    def forward(self, x_BSD: Tensor) -> Tensor:
        """[B, S, D] -> [B, S, D]."""
        return self.norm(self.activation(self.linear(x_BSD)))


def softcap(logits: Tensor, cap: float) -> Tensor:
    """cap * tanh(logits / cap): none is larger than `cap` (Gemma Team 2024, section 2)."""
    return cap * torch.tanh(logits / cap) if cap else logits


class Decoder(nn.Module):
    """A transformer of one stack, built from the `model` section of a resolved config.

    `first` and `last` say which ends it has: a whole model has both, see `keep`.
    """

    def __init__(self, config: ModelConfig, loss: CrossEntropy | None = None) -> None:
        super().__init__()
        self.config = config
        self.is_first_stage = self.is_last_stage = True
        self.embed: Embedding | None = Embedding(config)
        self.relative: RelativeBias | None = None
        if config.positions == "relative":
            self.relative = RelativeBias(config, bidirectional=config.architecture == "encoder")
        # By name and not by place: a part of the model holds some of them under their own names.
        self.blocks = nn.ModuleDict({str(layer): Block(config, layer) for layer in range(config.n_layers)})
        self.head: Head | None = Head(config, loss or CrossEntropy())

    def trim_to_stage(self, layers: range, first: bool, last: bool) -> None:
        """Drop all but these blocks and ends. A tied head keeps the table whose weight it uses."""
        self.is_first_stage, self.is_last_stage = first, last
        for name in [name for name in self.blocks if int(name) not in layers]:
            del self.blocks[name]
        self._trim_embedding(embeds=first, projects=last)

    def _trim_embedding(self, embeds: bool, projects: bool) -> None:
        """What a part needs that looks up this stack's tokens, or has the head, or neither."""
        if not embeds and self.embed is not None:
            self.embed.positions = self.embed.norm = None
            self.embed = self.embed if projects and self.config.tie_embeddings else None
        if not projects:
            self.head = None

    def forward(
        self,
        inputs: Tensor,
        targets_BS: Tensor | None = None,
        mask: AttentionMask = CAUSAL,
        cache: KVCache | None = None,
        positions_BS: Tensor | None = None,
        sample_hash_B: Tensor | None = None,
    ) -> Tensor:
        """Token ids [B, S] -> logits [B, S, V]; or, given targets, their losses' sums per sequence, [B].

        With a cache the tokens follow those that it holds. Positions default to 0, 1, 2, ... (or go
        on from the cache). Without the first end `inputs` are activations [B, S, D]; without the
        last the result is. `draws_B`, a hash of each sample, is what stochastic depth draws from.
        """
        past = cache.length if cache else 0
        if positions_BS is None:
            positions_BS = torch.arange(past, past + inputs.shape[1], device=inputs.device)
        mask = self._materialize_mask(mask, self.relative, (len(inputs), positions_BS.shape[-1]), past, inputs.device)
        x_BSD = self.embed(inputs, positions_BS) if self.embed is not None and self.is_first_stage else inputs
        rotation = self._rotary_cos_sin(positions_BS)
        for layer, block in self._iter_blocks():
            x_BSD = block(x_BSD, rotation, mask, cache, self._depth_scale(sample_hash_B, layer))
        return x_BSD if self.head is None else self._apply_head(x_BSD, targets_BS)

    def _iter_blocks(self) -> Iterator[tuple[int, nn.Module]]:
        return ((int(name), block) for name, block in self.blocks.items())

    def _apply_head(self, x_BSD: Tensor, targets_BS: Tensor | None) -> Tensor:
        assert self.head is not None
        tied_VD = self.embed.tokens.weight if self.embed is not None and self.config.tie_embeddings else None
        return self.head(x_BSD, tied_VD, targets_BS)

    def _rotary_cos_sin(self, positions_BS: Tensor) -> RotaryCosSin | None:
        if self.config.positions != "rope":
            return None
        angles = rotary_angles(positions_BS, self.config.head_dim, self.config.rope_theta)
        return angles.cos(), angles.sin()

    def _materialize_mask(
        self, mask: AttentionMask, relative: RelativeBias | None, rows: tuple[int, int], past: int, device: torch.device
    ) -> AttentionMask:
        """The masks of all layers, once."""
        B, S = rows
        T = mask.num_keys or past + S
        bias_HST = None
        if relative is not None:
            keys_T = torch.arange(T, device=device)
            bias_HST = relative(
                keys_T[T - S :] if mask.query_positions_BS is None else mask.query_positions_BS[0], keys_T
            )
        return materialize_mask(mask, (B, S, T), device, self._needs_dense_mask, bias_HST)

    @property
    def _needs_dense_mask(self) -> bool:
        """Whether FlexAttention cannot be had: it knows no dropout and no head below 16 dimensions."""
        return (self.training and self.config.dropout > 0) or self.config.head_dim < 16

    def _depth_scale(self, sample_hash_B: Tensor | None, layer: int) -> Tensor | None:
        if not (self.training and self.config.stochastic_depth) or sample_hash_B is None:
            return None
        layers = self.config.n_layers + self.config.n_encoder_layers
        return stochastic_depth_scale(sample_hash_B, layer, self.config.stochastic_depth * (layer + 1) / layers)[
            :, None, None
        ]
