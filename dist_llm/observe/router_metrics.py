"""Metrics of the routers of a mixture of experts: the load of the experts, and the balance losses."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from dist_llm.models.router_stats import RouterStats

log = logging.getLogger("dist_llm")

CELL_PIXELS = 8  # width and height of the cell of an expert in the heat map
MAX_NAMED_EXPERTS = 8  # experts that a warning lists

RouterStatsByLayer = Mapping[int, RouterStats]


class RouterMetrics:
    """Computes the metrics of routers, and warns of dead experts: no token chose them in a logging interval."""

    def __init__(self) -> None:
        self.dead_experts: list[tuple[int, int]] = []  # (layer, expert) of the last warning

    def summarize(self, steps: Sequence[RouterStatsByLayer]) -> list[dict[str, Any]]:
        """Return the metrics of each step of a logging interval. Losses are means over layers, without coefficient.

        The last step also has `expert_load`: for each layer, the share of each expert in the choices of the interval.
        """
        if not steps or not steps[0]:
            return [{} for _ in steps]
        layers = list(steps[0])
        packed = torch.stack([torch.cat([stats.pack() for stats in step.values()]) for step in steps]).double().cpu()
        sizes = [len(steps[0][layer].pack()) for layer in layers]
        by_layer = [
            [RouterStats.unpack(layer_stats) for layer_stats in step_values.split(sizes)] for step_values in packed
        ]
        rows = [_summarize_step(step_stats) for step_stats in by_layer]
        counts = {
            layer: torch.stack([step_stats[index].counts_E for step_stats in by_layer]).sum(0)
            for index, layer in enumerate(layers)
        }
        self._warn_of_dead_experts(counts, len(steps))
        rows[-1]["expert_load"] = {
            str(layer): [round(share, 6) for share in (counts_E / counts_E.sum()).tolist()]
            for layer, counts_E in counts.items()
        }
        return rows

    def _warn_of_dead_experts(self, counts: Mapping[int, torch.Tensor], num_steps: int) -> None:
        dead_experts = [
            (layer, expert)
            for layer, counts_E in counts.items()
            for expert in torch.nonzero(counts_E == 0).flatten().tolist()
        ]
        if dead_experts and dead_experts != self.dead_experts:
            names = ", ".join(f"{expert} of layer {layer}" for layer, expert in dead_experts[:MAX_NAMED_EXPERTS])
            more = f" and {len(dead_experts) - MAX_NAMED_EXPERTS} more" if len(dead_experts) > MAX_NAMED_EXPERTS else ""
            log.warning(
                "no token chose expert %s%s in the last %d steps; raise model.feedforward.balance_loss, or set "
                "selection_bias",
                *(names, more, num_steps),
            )
        self.dead_experts = dead_experts


def _summarize_step(layers: Sequence[RouterStats]) -> dict[str, Any]:
    """Return the metrics of one step, given the statistics of each layer."""

    def mean(values: Sequence[torch.Tensor]) -> float:
        return float(torch.stack(list(values)).mean())

    return {
        "balance_loss": mean([stats.balance for stats in layers]),
        "router_z_loss": mean([stats.z for stats in layers]),
        "router_entropy": mean([stats.entropy for stats in layers]),
        "expert_load_max_over_mean": max(float(stats.counts_E.max() / stats.counts_E.mean()) for stats in layers),
        "idle_experts": sum(int((stats.counts_E == 0).sum()) for stats in layers),
    }


def draw_load(expert_load: Mapping[str, Sequence[float]]) -> np.ndarray:
    """Draw a heat map of the metric `expert_load`, [height, width, 3] in 0..255: a row per layer, a column per expert.

    White is the mean load, blue an expert without tokens, red twice the mean load or more. Grey: the layer has no such
    expert.
    """
    num_experts = max(map(len, expert_load.values()))
    image = np.full((len(expert_load), num_experts, 3), 128, dtype=np.uint8)
    for row, load in enumerate(expert_load.values()):
        deviation = np.clip(np.asarray(load) * len(load) - 1, -1, 1)  # 0: the mean load
        fade = np.rint(255 * (1 - np.abs(deviation))).astype(np.uint8)
        image[row, : len(load)] = np.stack((fade, fade, fade), axis=-1)
        image[row, : len(load), 0][deviation >= 0] = 255
        image[row, : len(load), 2][deviation <= 0] = 255
    return image.repeat(CELL_PIXELS, axis=0).repeat(CELL_PIXELS, axis=1)
