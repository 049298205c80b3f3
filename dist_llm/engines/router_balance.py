"""Balance the experts of all layers: the weight of the balance losses, and the updates of the routers' buffers."""

from collections.abc import Sequence

import torch
from torch.distributed.device_mesh import DeviceMesh

from dist_llm.config.feedforward_sections import MoEConfig
from dist_llm.config.model_section import ModelConfig
from dist_llm.config.schema import Config
from dist_llm.models.decoder import Decoder
from dist_llm.models.moe import MoE
from dist_llm.models.router_stats import NUM_LOSS_STATS, RouterStats
from dist_llm.parallel.mesh import ROUTER_AXES, all_reduce_over_axes_


class RouterBalancer:
    """Sums the statistics of the routers over a step and all ranks, and updates the buffers of the routers.

    One all-reduce per step carries the statistics of all layers.
    """

    def __init__(
        self, config: Config, model_parts: Sequence[Decoder], mesh: DeviceMesh | None, device: torch.device
    ) -> None:
        self.global_batch, self.model_parts = config.data.global_batch, model_parts
        self.mesh, self.device = mesh, device
        self.packed_sizes = {
            layer: num_experts + NUM_LOSS_STATS for layer, num_experts in count_experts(config.model).items()
        }

    def start_step(self, loss_scale: float) -> None:
        """Set the weight of the balance losses: each is a mean over the sequences of the global batch."""
        weight = torch.full((), loss_scale / self.global_batch, device=self.device) if self.packed_sizes else None
        for model_part in self.model_parts:
            model_part.router_log.loss_scale = weight

    def finish_step(self, num_microbatches: int, is_applied: bool) -> dict[int, RouterStats]:
        """Return the statistics of all layers with experts, on every rank: counts of the global batch, and means.

        If the optimizer step `is_applied`, the buffers of the routers on this rank move too.
        """
        if not self.packed_sizes:
            return {}
        latest = {
            layer: packed
            for model_part in self.model_parts
            for layer, packed in model_part.router_log.pop_latest(num_microbatches).items()
        }
        dtype = next(iter(latest.values())).dtype if latest else torch.get_default_dtype()
        sums = torch.cat(
            [
                latest[layer] if layer in latest else torch.zeros(size, dtype=dtype, device=self.device)
                for layer, size in self.packed_sizes.items()
            ]
        )
        if self.mesh is not None:
            sums = all_reduce_over_axes_(sums, self.mesh, ROUTER_AXES)
        by_layer = zip(self.packed_sizes, sums.split(list(self.packed_sizes.values())), strict=True)
        stats = {layer: RouterStats.unpack(packed).average(self.global_batch) for layer, packed in by_layer}
        if is_applied:
            for model_part in self.model_parts:
                for name, block in model_part.blocks.items():
                    if isinstance(block.feedforward, MoE):
                        block.feedforward.update_router_state_(stats[int(name)].counts_E)
        return stats


def count_experts(model: ModelConfig) -> dict[int, int]:
    """Return {layer: number of experts} of the layers with a mixture of experts."""
    sections = {layer: model.layer_config(layer).feedforward for layer in range(model.n_layers)}
    return {layer: section.n_experts for layer, section in sections.items() if isinstance(section, MoEConfig)}
