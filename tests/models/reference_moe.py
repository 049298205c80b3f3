"""A second implementation of a mixture of experts: plain loops over sequences, tokens and experts, in fp64.

It shares only the config and the parameters with dist_llm.models, whose `moe.py` names the sources of the formulas.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dist_llm.models.moe import MoE


@dataclass
class ReferenceStats:
    """Sums over the tokens of a layer, as in `RouterStats`."""

    counts_E: list[int]
    balance: Tensor
    z: Tensor
    entropy: Tensor


class ReferenceMoE:
    """Computes the output, the statistics and the new buffers of a layer with experts. `values` get the gradients."""

    def __init__(self, layer: MoE, activation: str = "swiglu") -> None:
        self.moe, self.activation = layer.moe, activation
        self.values = {name: value.detach().clone().requires_grad_() for name, value in layer.named_parameters()}
        self.previous_load_E = layer.previous_load.tolist()
        self.bias_E = [0.0] * self.moe.n_experts if layer.selection_bias is None else layer.selection_bias.tolist()

    def compute(self, x_BSD: Tensor) -> tuple[Tensor, ReferenceStats]:
        """Return (outputs [B, S, D], ReferenceStats)."""
        zero = torch.zeros((), dtype=x_BSD.dtype)
        stats = ReferenceStats([0] * self.moe.n_experts, zero, zero, zero)
        outputs = [self.compute_sequence(x_SD, stats) for x_SD in x_BSD]
        return torch.stack(outputs), stats

    def compute_sequence(self, x_SD: Tensor, stats: ReferenceStats) -> Tensor:
        """Return the outputs [S, D] of a sequence, and add its part to the statistics."""
        num_experts, outputs, normalized = self.moe.n_experts, [], []
        counts_E = [0] * num_experts
        for x_D in x_SD:
            logits_E = self.project(x_D, "router", expert=None)
            scores_E = self.compute_scores(logits_E)
            experts_K = self.choose(scores_E.tolist())
            outputs.append(self.mix(x_D, scores_E, experts_K))
            for expert in experts_K:
                counts_E[expert] += 1
            normalized.append(scores_E / scores_E.sum())
            stats.z = stats.z + logits_E.exp().sum().log() ** 2 / len(x_SD)
            stats.entropy = stats.entropy - (normalized[-1] * normalized[-1].log()).sum() / len(x_SD)
        for expert in range(num_experts):
            load = counts_E[expert] / (self.moe.top_k * len(x_SD))
            if self.moe.balance_over == "previous_step":
                load = self.previous_load_E[expert]
            mean_score = torch.stack(normalized)[:, expert].mean()
            stats.balance = stats.balance + num_experts * load * mean_score
            stats.counts_E[expert] += counts_E[expert]
        return torch.stack(outputs)

    def compute_scores(self, logits_E: Tensor) -> Tensor:
        """Return the scores of the experts of one token, before any normalization."""
        if self.moe.score == "sigmoid":
            return 1 / (1 + (-logits_E).exp())
        return logits_E.exp() / logits_E.exp().sum()

    def choose(self, scores_E: list[float]) -> list[int]:
        """Return the chosen experts of one token, in the order of their biased scores."""
        num_groups = self.moe.n_groups
        group_size = len(scores_E) // num_groups
        biased_E = [score + bias for score, bias in zip(scores_E, self.bias_E, strict=True)]
        groups = [biased_E[start : start + group_size] for start in range(0, len(biased_E), group_size)]
        best_groups = sorted(range(num_groups), key=lambda group: -sum(sorted(groups[group])[-2:]))
        allowed_groups = best_groups[: self.moe.top_groups] if num_groups > 1 else best_groups
        allowed = [expert for expert in range(len(scores_E)) if expert // group_size in allowed_groups]
        return sorted(allowed, key=lambda expert: -biased_E[expert])[: self.moe.top_k]

    def mix(self, x_D: Tensor, scores_E: Tensor, experts_K: list[int]) -> Tensor:
        """Return the weighted sum of the chosen experts, plus the shared experts."""
        total = scores_E[experts_K].sum() if self.moe.normalize_weights else 1.0
        output_D = torch.zeros_like(x_D)
        for expert in experts_K:
            weight = self.moe.weight_scale * scores_E[expert] / total
            output_D = output_D + weight * self.feed_forward(x_D, "experts", expert)
        return output_D + self.feed_forward(x_D, "shared", None) if self.moe.n_shared_experts else output_D

    def feed_forward(self, x_D: Tensor, name: str, expert: int | None) -> Tensor:
        """Return the output of an expert, or of the shared experts, for one token."""
        up_F = self.project(x_D, f"{name}.up", expert)
        if self.activation == "relu_squared":
            return self.project(up_F.clamp(min=0) ** 2, f"{name}.down", expert)
        gate_F = self.project(x_D, f"{name}.gate", expert)
        return self.project(gate_F / (1 + (-gate_F).exp()) * up_F, f"{name}.down", expert)

    def project(self, x_I: Tensor, name: str, expert: int | None) -> Tensor:
        """Apply a linear layer, or that of an expert, to one token."""
        weight, bias = self.values[f"{name}.weight"], self.values.get(f"{name}.bias")
        output_O = (weight if expert is None else weight[expert]) @ x_I
        if bias is None:
            return output_O
        return output_O + (bias if expert is None else bias[expert])

    def update_buffers(self, counts_E: list[int]) -> None:
        """Update the loads and the biases after a step with these choices of the experts."""
        mean = sum(counts_E) / len(counts_E)
        self.previous_load_E = [count / sum(counts_E) for count in counts_E]
        if self.moe.selection_bias:
            for expert, count in enumerate(counts_E):
                self.bias_E[expert] += self.moe.selection_bias_rate * ((count < mean) - (count > mean))
