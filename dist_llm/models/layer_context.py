"""What a layer needs to know about its tokens besides their activations."""

from copy import copy

from torch import Tensor

from dist_llm.models.attention_mask import FULL, AttentionMask
from dist_llm.models.kv_cache import KVCache
from dist_llm.models.rope import RotaryCosSin


class LayerContext:
    """What a layer needs to know about its tokens besides their activations.

    Not a dataclass and not a tuple: FSDP casts the tensors in those to the compute dtype. Cosines and sines of rotary
    positions must stay in fp32, as they are in one process. In bf16 each would have an error of up to 2^-9.
    """

    def __init__(
        self,
        mask: AttentionMask,
        rotation: RotaryCosSin | None = None,
        cache: KVCache | None = None,
        depth_scale_BS1: Tensor | None = None,
        memory_mask: AttentionMask = FULL,
        router_loss_scale: Tensor | None = None,
    ) -> None:
        self.mask = mask  # which keys each query attends to, materialized for this layer
        self.rotation = rotation  # cosines and sines of the rotary positions; None: no rotation
        self.cache = cache  # what the layers keep of earlier tokens, in generation
        self.depth_scale_BS1 = depth_scale_BS1  # factor of the outputs of the sublayers, for stochastic depth
        self.memory_mask = memory_mask  # which tokens of the encoder each query attends to
        # Weight of the balance losses of one sequence in the loss, for a mixture of experts; None: not in the loss.
        self.router_loss_scale = router_loss_scale

    def with_depth_scale(self, depth_scale_BS1: Tensor | None) -> "LayerContext":
        """Return a copy with another factor of the outputs, [B, 1 or S, 1]."""
        context = copy(self)
        context.depth_scale_BS1 = depth_scale_BS1
        return context
