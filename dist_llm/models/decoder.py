"""Transformers with a single stack: embedding, blocks, head. Configs make it GPT-2, Llama or BERT.

The attention mask of the batch makes the model a decoder or an encoder. The model knows nothing about ranks:
`dist_llm/parallel` shards and wraps it. A pipeline stage is a model from which the modules of the other stages were
removed.

Shape suffixes: B batch, S tokens, T keys, D d_model, V vocabulary, H heads.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_llm.config.derive import round_up
from dist_llm.config.model_section import ModelConfig
from dist_llm.config.parametrization import resolve_logit_scale
from dist_llm.losses.cross_entropy import CrossEntropy, LossTerms
from dist_llm.losses.fused_linear_cross_entropy import VocabShard, linear_cross_entropy
from dist_llm.models.attention import materialize_mask
from dist_llm.models.attention_mask import CAUSAL, AttentionMask
from dist_llm.models.block import Block
from dist_llm.models.feedforward import ACTIVATIONS
from dist_llm.models.init import embedding_init, matrix_init
from dist_llm.models.kv_cache import KVCache
from dist_llm.models.layer_context import LayerContext
from dist_llm.models.norm import build_norm
from dist_llm.models.positional_encoding import AlibiBias, RelativeBias, SinusoidalEncoding
from dist_llm.models.rope import RotaryCosSin, compute_rotary_cos_sin
from dist_llm.models.router_stats import RouterLog
from dist_llm.models.stochastic_depth import stochastic_depth_scale
from dist_llm.param_spec import ZEROS, ParamSpec, linear_specs, norm_specs


class Embedding(nn.Module):
    """Token ids -> vectors, plus learned or sinusoidal positions if the model has them."""

    def __init__(self, config: ModelConfig, tokens: nn.Embedding | None = None) -> None:
        super().__init__()
        self.config = config
        # The encoder and the decoder of an encoder-decoder share the token embedding.
        self.tokens = tokens or nn.Embedding(round_up(config.vocab_size, config.vocab_multiple), config.d_model)
        self.positions: nn.Module | None = None
        if config.positions == "learned":
            self.positions = nn.Embedding(config.max_seq_len, config.d_model)
        elif config.positions == "sinusoidal":
            self.positions = SinusoidalEncoding(config.d_model)
        self.norm = build_norm(config) if config.norm_embedding else None
        self.dropout = nn.Dropout(config.dropout)

    def param_specs(self) -> dict[str, ParamSpec]:
        """Describe the tables and the norm."""
        vocab_init = embedding_init(self.config, has_vocab_rows=True)
        specs = {"tokens.weight": ParamSpec(("vocab", "embed"), vocab_init, is_embedding=True)}
        if isinstance(self.positions, nn.Embedding):
            position_init = embedding_init(self.config)
            specs["positions.weight"] = ParamSpec(("position", "embed"), position_init, is_embedding=True)
        return specs | norm_specs("norm", self.norm)

    def forward(self, tokens_BS: Tensor, positions_BS: Tensor) -> Tensor:
        """Token ids [B, S] and positions [B, S] or [S] -> [B, S, D]."""
        x_BSD = self.tokens(tokens_BS)
        if self.config.embedding_scale != 1:
            x_BSD = x_BSD * self.config.embedding_scale
        if self.positions is not None:
            x_BSD = x_BSD + self.positions(positions_BS).to(x_BSD.dtype)
        return self.dropout(x_BSD if self.norm is None else self.norm(x_BSD))


class Head(nn.Module):
    """The final norm and the output projection. With targets, it computes the loss instead of the logits.

    Evaluation uses the cross-entropy without regularization. `terms` collects the terms of a regularized training loss.
    """

    def __init__(self, config: ModelConfig, loss: CrossEntropy) -> None:
        super().__init__()
        self.config = config
        self.vocab_size, self.softcap, self.loss = config.vocab_size, config.logit_cap, loss
        self.terms = None if loss.is_unregularized else LossTerms()
        # With post-norm every block already ends with a norm.
        self.norm = nn.Identity() if config.norm_order == "post" else build_norm(config)
        rows = round_up(config.vocab_size, config.vocab_multiple)
        self.dense = MLMTransform(config) if config.head == "mlm" else None
        has_bias = config.head == "mlm" or config.head_bias
        self.bias = nn.Parameter(torch.empty(rows)) if has_bias else None
        self.out = None if config.tie_embeddings else nn.Linear(config.d_model, rows, bias=False)

    def param_specs(self) -> dict[str, ParamSpec]:
        """Describe the norm, and the bias and the weight of the output projection."""
        vocab_init = embedding_init(self.config, has_vocab_rows=True)
        specs = norm_specs("norm", self.norm) | linear_specs(
            "out", self.out, ("vocab", "embed"), vocab_init, muon=False
        )
        return specs if self.bias is None else specs | {"bias": ParamSpec(("vocab",), ZEROS, decay=False)}

    def forward(
        self,
        x_BSD: Tensor,
        tied_VD: Tensor | None,
        targets_BS: Tensor | None,
        loss_weights_BS: Tensor | None = None,
    ) -> Tensor:
        """[B, S, D] -> logits [B, S, V] or, with targets, weighted losses summed per sequence, [B].

        `tied_VD` is the token embedding if the head is tied to it. The padding rows of the head give no logits.
        """
        weight_VD = tied_VD if self.out is None else self.out.weight
        assert weight_VD is not None
        if targets_BS is not None:
            vocab_shard = VocabShard(self.vocab_size, first_token=0, num_tokens=self.vocab_size)
            loss, terms = self.select_loss()
            x_BSD = self.compute_pre_logits(x_BSD)
            return linear_cross_entropy(
                x_BSD, weight_VD, self.bias, targets_BS, loss, self.softcap, vocab_shard, terms, loss_weights_BS
            )
        bias_V = None if self.bias is None else self.bias[: self.vocab_size]
        return apply_softcap(
            F.linear(self.compute_pre_logits(x_BSD), weight_VD[: self.vocab_size], bias_V), self.softcap
        )

    def select_loss(self) -> tuple[CrossEntropy, LossTerms | None]:
        """Return (the loss, the collector of its terms) for training or for evaluation."""
        return (self.loss, self.terms) if self.training else (CrossEntropy(), None)

    def compute_pre_logits(self, x_BSD: Tensor) -> Tensor:
        """Return the vectors that are multiplied by the vocabulary matrix, [B, S, D]."""
        x_BSD = self.norm(x_BSD)
        if self.dense is not None:
            x_BSD = self.dense(x_BSD)
        logit_scale = resolve_logit_scale(self.config)
        # Scaling the vectors scales the logits.
        return x_BSD if logit_scale == 1 else x_BSD * logit_scale


class MLMTransform(nn.Module):
    """The layer that BERT has before its output projection (Devlin et al. 2019, and the code of BERT)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.linear = nn.Linear(config.d_model, config.d_model, bias=config.bias)
        self.activation = ACTIVATIONS[config.activation]
        self.norm = build_norm(config)

    def param_specs(self) -> dict[str, ParamSpec]:
        """Describe the dense layer and the norm."""
        init = matrix_init(self.config, self.linear)
        return linear_specs("linear", self.linear, ("embed", "embed"), init, muon=False) | norm_specs("norm", self.norm)

    def forward(self, x_BSD: Tensor) -> Tensor:
        """[B, S, D] -> [B, S, D]."""
        return self.norm(self.activation(self.linear(x_BSD)))


def apply_softcap(logits: Tensor, cap: float | None) -> Tensor:
    """Return cap * tanh(logits / cap), which is bounded by `cap` (Gemma Team 2024, section 2). None: no cap."""
    return cap * torch.tanh(logits / cap) if cap else logits


class Decoder(nn.Module):
    """A transformer with a single stack, built from the `model` section of a resolved config.

    It is also the base class of `EncoderDecoder`, which adds an encoder: embedding, head, loss and pipeline stages are
    the same. So a parameter of type `Decoder` accepts every model.

    `trim_to_stage` makes a pipeline stage of it. In a full model `is_first_stage` and `is_last_stage` are both true.
    """

    def __init__(self, config: ModelConfig, loss: CrossEntropy | None = None) -> None:
        super().__init__()
        self.config = config
        self.is_first_stage = self.is_last_stage = True
        self.embed: Embedding | None = Embedding(config)
        self.relative: RelativeBias | AlibiBias | None = None
        if config.positions == "relative":
            self.relative = RelativeBias(config, bidirectional=config.architecture == "encoder")
        elif config.positions == "alibi":
            self.relative = AlibiBias(config.n_heads)
        # Keyed by layer number, so that the parameters of a pipeline stage have the same names as in the full model.
        self.blocks = nn.ModuleDict(
            {str(layer): Block(config.layer_config(layer), layer) for layer in range(config.n_layers)}
        )
        self.head: Head | None = Head(config, loss or CrossEntropy())
        self.router_log = RouterLog()

    def trim_to_stage(self, layers: range, is_first: bool, is_last: bool) -> None:
        """Remove all but these blocks; remove the embedding and the head unless this is the first or the last stage.

        The last stage keeps the token embedding if the head is tied to it.
        """
        self.is_first_stage, self.is_last_stage = is_first, is_last
        for name in [name for name in self.blocks if int(name) not in layers]:
            del self.blocks[name]
        self._trim_embedding(embeds=is_first, projects=is_last)

    def is_tied_copy(self, name: str) -> bool:
        """Return whether the parameter is the second copy of a tied embedding, on the last pipeline stage."""
        return name == "embed.tokens.weight" and not self.is_first_stage

    def _trim_embedding(self, embeds: bool, projects: bool) -> None:
        """Remove the embedding, unless this stage embeds tokens or projects on tied embeddings; remove an unused
        head."""
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
        loss_weights_BS: Tensor | None = None,
    ) -> Tensor:
        """Token ids [B, S] -> logits [B, S, V] or, with targets, losses summed per sequence, [B].

        With a cache, the tokens follow the cached tokens. Positions default to 0, 1, 2, ..., counted from the first
        cached token. In a pipeline, stages after the first take activations [B, S, D], and stages before the last
        return them. `sample_hash_B` provides the random bits of stochastic depth. `loss_weights_BS` are factors of the
        losses of the targets.
        """
        num_cached = cache.length if cache else 0
        if positions_BS is None:
            positions_BS = torch.arange(num_cached, num_cached + inputs.shape[1], device=inputs.device)
        shape_BS = len(inputs), positions_BS.shape[-1]
        masks = self._materialize_masks(mask, self.relative, shape_BS, num_cached, inputs.device)
        x_BSD = self.embed(inputs, positions_BS) if self.embed is not None and self.is_first_stage else inputs
        rotations = self._rotary_cos_sin(positions_BS)
        for layer, block in self._iter_blocks():
            context = LayerContext(
                masks[layer],
                rotations[layer],
                cache,
                self._depth_scale(sample_hash_B, layer),
                router_loss_scale=self.router_log.loss_scale if self.training else None,
            )
            x_BSD, router_stats = block(x_BSD, context)
            if router_stats is not None and self.training and torch.is_grad_enabled():
                self.router_log.add(layer, router_stats)
        if cache is not None:
            cache.length += shape_BS[1]
        return x_BSD if self.head is None else self._apply_head(x_BSD, targets_BS, loss_weights_BS)

    def _iter_blocks(self) -> Iterator[tuple[int, Block]]:
        return ((int(name), cast(Block, block)) for name, block in self.blocks.items())

    def _apply_head(self, x_BSD: Tensor, targets_BS: Tensor | None, loss_weights_BS: Tensor | None = None) -> Tensor:
        assert self.head is not None
        tied_VD = self.embed.tokens.weight if self.embed is not None and self.config.tie_embeddings else None
        return self.head(x_BSD, tied_VD, targets_BS, loss_weights_BS)

    def _rotary_cos_sin(self, positions_BS: Tensor) -> dict[int, RotaryCosSin | None]:
        """Return the rotation of each layer; None for a layer without rotary positions. Equal layers share it."""
        rotations: dict[tuple[Any, ...], RotaryCosSin] = {}
        by_layer: dict[int, RotaryCosSin | None] = {}
        for layer, block in self._iter_blocks():
            config = block.config
            if config.positions != "rope":
                by_layer[layer] = None
                continue
            key = config.head_dim, config.rotary_fraction, config.rope_theta, config.rope_scaling
            if key not in rotations:
                rotations[key] = compute_rotary_cos_sin(positions_BS, config)
            by_layer[layer] = rotations[key]
        return by_layer

    def _materialize_masks(
        self,
        mask: AttentionMask,
        relative: RelativeBias | AlibiBias | None,
        shape_BS: tuple[int, int],
        num_cached: int,
        device: torch.device,
    ) -> dict[int, AttentionMask]:
        """Compute the mask of each layer. It includes the relative position bias if there is one.

        Layers share a mask if they have the same window, and alike have capped scores and sinks or not.
        """
        B, S = shape_BS
        masks: dict[tuple[int | None, bool, bool], AttentionMask] = {}
        by_layer = {}
        for layer, block in self._iter_blocks():
            config = block.config
            key = window, has_cap, has_sinks = config.window, config.attention_cap is not None, config.attention_sinks
            if key not in masks:
                # With a window, the cache has the last window - 1 tokens.
                T = mask.num_keys or S + (num_cached if window is None else min(num_cached, window - 1))
                bias_HST = None if relative is None else self._relative_bias(relative, mask, S, T, device)
                window_mask = mask if window is None else replace(mask, window=window)
                masks[key] = materialize_mask(
                    window_mask, (B, S, T), device, self._needs_dense_mask, bias_HST, not has_cap, has_sinks
                )
            by_layer[layer] = masks[key]
        return by_layer

    def _relative_bias(
        self, relative: RelativeBias | AlibiBias, mask: AttentionMask, S: int, T: int, device: torch.device
    ) -> Tensor:
        """Return the relative position bias of the last S of T tokens, or of `mask.query_positions_BS`, [H, S, T]."""
        keys_T = torch.arange(T, device=device)
        queries_S = keys_T[T - S :] if mask.query_positions_BS is None else mask.query_positions_BS[0]
        bias_HST: Tensor = relative(queries_S, keys_T)
        return bias_HST

    @property
    def _needs_dense_mask(self) -> bool:
        """Whether FlexAttention cannot be used: it has no dropout, here no cap, and no heads below 16 dimensions."""
        layers = [block.config for _, block in self._iter_blocks()]
        is_unsupported = any(layer.head_dim < 16 or layer.attention_cap for layer in layers)
        return (self.training and self.config.dropout > 0) or is_unsupported

    def _depth_scale(self, sample_hash_B: Tensor | None, layer: int) -> Tensor | None:
        if not (self.training and self.config.stochastic_depth) or sample_hash_B is None:
            return None
        num_layers = self.config.n_layers + self.config.n_encoder_layers
        rate = self.config.stochastic_depth * (layer + 1) / num_layers  # grows linearly with the depth of the layer
        return stochastic_depth_scale(sample_hash_B, layer, rate)[:, None, None]
