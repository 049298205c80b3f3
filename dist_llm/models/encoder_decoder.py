"""Encoder-decoder models such as T5 and BART: the decoder attends to the encoder output.

The blocks of the encoder and then those of the decoder form one numbered list. So pipeline stages and wrappers can
treat the model like a single stack.

Shape suffixes: B batch, S decoder tokens, T encoder tokens, D d_model, V vocabulary. `memory` is the encoder output.
"""

import torch
from torch import Tensor, nn

from dist_llm.config.model_section import ModelConfig
from dist_llm.losses.cross_entropy import CrossEntropy
from dist_llm.models.attention import materialize_mask
from dist_llm.models.attention_mask import CAUSAL, FULL, AttentionMask, EncoderInput
from dist_llm.models.block import Block
from dist_llm.models.decoder import Decoder, Embedding
from dist_llm.models.kv_cache import KVCache
from dist_llm.models.layer_context import LayerContext
from dist_llm.models.norm import build_norm
from dist_llm.models.positional_encoding import AlibiBias, RelativeBias
from dist_llm.param_spec import ParamSpec, norm_specs


class EncoderDecoder(Decoder):
    """An encoder-decoder transformer. The encoder, the decoder and a tied head share the token embedding."""

    def __init__(self, config: ModelConfig, loss: CrossEntropy | None = None) -> None:
        super().__init__(config, loss)
        assert self.embed is not None
        num_encoder_layers = config.n_encoder_layers
        self.source_embed: Embedding | None = Embedding(config, self.embed.tokens)
        self.source_relative: RelativeBias | AlibiBias | None = self.relative
        if isinstance(self.relative, RelativeBias):
            self.source_relative = RelativeBias(config, bidirectional=True)
        self.blocks = nn.ModuleDict(
            {
                str(layer): Block(config, layer, has_cross_attention=layer >= num_encoder_layers)
                for layer in range(num_encoder_layers + config.n_layers)
            }
        )
        self.source_norm: nn.Module | None = None if config.norm_order == "post" else build_norm(config)

    def param_specs(self) -> dict[str, ParamSpec]:
        """Describe the norm after the encoder. The submodules describe their own parameters."""
        return norm_specs("source_norm", self.source_norm)

    def trim_to_stage(self, layers: range, is_first: bool, is_last: bool) -> None:
        """Trim as `Decoder.trim_to_stage` does, with the modules of the encoder.

        The first stage keeps the embedding of the encoder, the stage with the first decoder block that of the decoder,
        and the stage with the last encoder block the norm of the encoder.
        """
        super().trim_to_stage(layers, is_first, is_last)
        if self.config.n_encoder_layers - 1 not in layers:
            self.source_norm = None
        if not is_first:
            self.source_embed = None

    def _trim_embedding(self, embeds: bool, projects: bool) -> None:
        embed = self.embed
        has_first_decoder_block = str(self.config.n_encoder_layers) in self.blocks
        super()._trim_embedding(embeds=has_first_decoder_block, projects=projects)
        if embeds:
            # `source_embed` of the first stage uses the token table, whose name in a checkpoint is that in `embed`.
            self.embed = embed

    def forward(  # type: ignore[override]
        self,
        inputs: Tensor,
        x_BSD: Tensor | None = None,
        targets_BS: Tensor | None = None,
        mask: AttentionMask = CAUSAL,
        cache: KVCache | None = None,
        positions_BS: Tensor | None = None,
        sample_hash_B: Tensor | None = None,
        loss_weights_BS: Tensor | None = None,
        encoder_input: EncoderInput | None = None,
        tokens_BS: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Decoder ids [B, S] and the encoder input -> logits [B, S, V] or, with targets, losses per sequence, [B].

        In a pipeline, stages after the first take the activations of the encoder as `inputs` [B, T, D], those of the
        decoder as `x_BSD` (None before its first block), and the decoder ids as `tokens_BS`. Stages before the last
        return these activations. With a cache, only the first call needs `encoder_input`.
        """
        tokens_BS = inputs if self.is_first_stage else tokens_BS
        assert tokens_BS is not None
        memory_BTD = None if encoder_input is None else self._encode(inputs, encoder_input, sample_hash_B)
        decoder_blocks = [
            (layer, block) for layer, block in self._iter_blocks() if layer >= self.config.n_encoder_layers
        ]
        if not decoder_blocks:
            assert memory_BTD is not None
            return memory_BTD
        (B, S), num_cached = tokens_BS.shape, cache.length if cache else 0
        if positions_BS is None:
            positions_BS = torch.arange(num_cached, num_cached + S, device=tokens_BS.device)
        memory_mask = FULL if encoder_input is None else self._materialize_memory_mask(mask, encoder_input, B, S)
        masks = self._materialize_masks(mask, self.relative, (B, S), num_cached, tokens_BS.device)
        if x_BSD is None:
            assert self.embed is not None
            x_BSD = self.embed(tokens_BS, positions_BS)
        rotations = self._rotary_cos_sin(positions_BS)
        for layer, block in decoder_blocks:
            depth_scale_BS1 = self._depth_scale(sample_hash_B, layer)
            context = LayerContext(masks[layer], rotations[layer], cache, depth_scale_BS1, memory_mask)
            x_BSD, _ = block(x_BSD, context, memory_BTD)
        if cache is not None:
            cache.length += S
        if self.head is None:
            assert memory_BTD is not None
            assert x_BSD is not None
            return memory_BTD, x_BSD
        return self._apply_head(x_BSD, targets_BS, loss_weights_BS)

    def _encode(self, inputs: Tensor, encoder_input: EncoderInput, sample_hash_B: Tensor | None) -> Tensor:
        """Run the encoder blocks of this stage. Return the activations of the encoder, [B, T, D]."""
        B, T = encoder_input.tokens_BT.shape
        positions_BT = encoder_input.positions_BT
        if positions_BT is None:
            positions_BT = torch.arange(T, device=inputs.device)
        encoder_blocks = [
            (layer, block) for layer, block in self._iter_blocks() if layer < self.config.n_encoder_layers
        ]
        x_BTD = inputs if self.source_embed is None else self.source_embed(encoder_input.tokens_BT, positions_BT)
        if encoder_blocks:
            masks = self._materialize_masks(encoder_input.mask, self.source_relative, (B, T), 0, inputs.device)
            rotations = self._rotary_cos_sin(positions_BT)
            for layer, block in encoder_blocks:
                depth_scale_BS1 = self._depth_scale(sample_hash_B, layer)
                x_BTD, _ = block(x_BTD, LayerContext(masks[layer], rotations[layer], None, depth_scale_BS1))
        return x_BTD if self.source_norm is None else self.source_norm(x_BTD)

    def _materialize_memory_mask(
        self, mask: AttentionMask, encoder_input: EncoderInput, B: int, S: int
    ) -> AttentionMask:
        T = encoder_input.tokens_BT.shape[1]
        return materialize_mask(
            mask.build_cross_attention_mask(encoder_input.mask, S),
            (B, S, T),
            encoder_input.tokens_BT.device,
            dense=self._needs_dense_mask,
        )
