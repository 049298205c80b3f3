"""Mixture of experts: a router chooses some of many feed-forward layers for each token (Shazeer et al. 2017).

Every token gets all experts that it chooses; no token is dropped. The balance losses are defined per sequence or by the
previous step, never per microbatch or rank, so they do not depend on the layout (docs/design/experts.md).

Shape suffixes: B sequences of S tokens, N tokens that this rank routes, E experts, K chosen experts of a token,
R = N * K rows, D d_model.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dist_llm.config.derive import is_gated
from dist_llm.config.feedforward_sections import MoEConfig
from dist_llm.config.model_section import ModelConfig
from dist_llm.models.cost import Cost
from dist_llm.models.feedforward import ACTIVATIONS, DenseFeedForward, apply_gate
from dist_llm.models.grouped_linear import GroupedLinear
from dist_llm.models.init import block_matrix_init, matrix_init
from dist_llm.models.router_stats import RouterStats
from dist_llm.models.token_dispatcher import LocalTokenDispatcher
from dist_llm.param_spec import ZEROS, ParamSpec
from dist_llm.sharded import to_local


class Router(nn.Module):
    """The linear layer that computes the logits of the experts, in fp32 or, for fp64 inputs, in fp64.

    The weight is first rounded to the dtype of the other matrix products, because FSDP rounds it too: all layouts then
    compute the same logits.
    """

    def __init__(self, config: ModelConfig, num_experts: int, bias: bool) -> None:
        super().__init__()
        self.config = config
        self.in_features, self.out_features = config.d_model, num_experts
        self.weight = nn.Parameter(torch.empty(num_experts, config.d_model))
        self.bias = nn.Parameter(torch.empty(num_experts)) if bias else None

    def param_specs(self) -> dict[str, ParamSpec]:
        """Describe the weight and the bias. Tokens are split over tp, so the gradients of a rank are partial sums."""
        init = matrix_init(self.config, self)
        specs = {"weight": ParamSpec(("expert_logit", "embed"), init, muon=True, is_partial_under_tp=True)}
        if self.bias is not None:
            specs["bias"] = ParamSpec(("expert_logit",), ZEROS, decay=False, is_partial_under_tp=True)
        return specs

    def forward(self, x_ND: Tensor) -> Tensor:
        """[N, D] -> logits [N, E]."""
        weight_ED, device_type = to_local(self.weight), x_ND.device.type
        if torch.is_autocast_enabled(device_type):
            dtype = torch.get_autocast_dtype(device_type)
            x_ND, weight_ED = x_ND.to(dtype), weight_ED.to(dtype)
        logits_dtype = torch.promote_types(x_ND.dtype, torch.float32)
        bias_E = None if self.bias is None else to_local(self.bias).to(logits_dtype)
        with torch.autocast(device_type, enabled=False):
            return F.linear(x_ND.to(logits_dtype), weight_ED.to(logits_dtype), bias_E)


class Experts(nn.Module):
    """The feed-forward layers of all experts, with the parameters of all experts in one tensor each."""

    def __init__(self, config: ModelConfig, layer: int, moe: MoEConfig) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        num_experts, d_model, d_expert = moe.n_experts, config.d_model, moe.d_expert
        self.activation, bias = ACTIVATIONS[config.activation], config.bias or config.feedforward_bias
        self.gate = GroupedLinear(num_experts, d_model, d_expert, bias) if is_gated(config) else None
        self.up = GroupedLinear(num_experts, d_model, d_expert, bias)
        self.down = GroupedLinear(num_experts, d_expert, d_model, bias)

    def grouped_linears(self) -> Iterator[GroupedLinear]:
        """Yield the layers of all experts."""
        yield from (layer for layer in (self.gate, self.up, self.down) if layer is not None)

    def param_specs(self) -> dict[str, ParamSpec]:
        """Describe the parameters: the experts are sharded, the matrix of an expert never is."""
        input_init = block_matrix_init(self.config, self.layer, self.up, role="input")
        down_init = block_matrix_init(self.config, self.layer, self.down, role="residual_output")
        specs = {
            "up.weight": ParamSpec(("expert", "expert_ffn", "embed"), input_init, muon=True),
            "down.weight": ParamSpec(("expert", "embed", "expert_ffn"), down_init, muon=True),
            "up.bias": ParamSpec(("expert", "expert_ffn"), ZEROS, decay=False),
            "down.bias": ParamSpec(("expert", "embed"), ZEROS, decay=False),
        }
        specs |= {name.replace("up", "gate"): spec for name, spec in specs.items() if name.startswith("up")}
        return {name: specs[name] for name, _ in self.named_parameters()}

    def forward(self, x_RD: Tensor, counts_E: Tensor) -> Tensor:
        """Apply each expert to its rows, [R, D] -> [R, D]. The rows are sorted by expert."""
        ends_E = counts_E.cumsum(0).to(torch.int32)
        if self.gate is None:
            return self.down(self.activation(self.up(x_RD, ends_E)), ends_E)
        gated_RF = apply_gate(self.config.activation, self.gate(x_RD, ends_E), self.up(x_RD, ends_E))
        return self.down(gated_RF, ends_E)


class MoE(nn.Module):
    """A feed-forward layer of experts.

    The buffers are part of a checkpoint: `selection_bias` is added to the scores for the choice of experts, and
    `previous_load` is the share of each expert in the choices of the previous step. `update_router_state_` changes
    them once per optimizer step.
    """

    previous_load: Tensor
    selection_bias: Tensor | None

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        moe = config.feedforward
        assert isinstance(moe, MoEConfig)
        self.moe = moe
        self.router = Router(config, moe.n_experts, moe.router_bias)
        self.experts = Experts(config, layer, moe)
        self.shared = None
        if moe.n_shared_experts:
            shared_config = config.model_copy(update={"d_ff": moe.d_expert * moe.n_shared_experts})
            self.shared = DenseFeedForward(shared_config, layer)
        self.register_buffer("previous_load", None)
        self.register_buffer("selection_bias", None)
        self.dispatcher = LocalTokenDispatcher()
        self.init_buffers()

    def init_buffers(self, device: torch.device | None = None) -> None:
        """Create the buffers on a device, with their values before the first step."""
        num_experts = self.moe.n_experts
        self.previous_load = torch.full((num_experts,), 1 / num_experts, device=device)
        if self.moe.selection_bias:
            self.selection_bias = torch.zeros(num_experts, device=device)

    @staticmethod
    def cost(config: ModelConfig) -> Cost:
        """Return the cost of the router, and of the experts that one token uses."""
        moe = config.feedforward
        assert isinstance(moe, MoEConfig)
        weights_per_expert = config.d_model * moe.d_expert * (3 if is_gated(config) else 2)
        return Cost(config.d_model * moe.n_experts + (moe.top_k + moe.n_shared_experts) * weights_per_expert)

    def forward(self, x_BSD: Tensor, loss_scale: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """[B, S, D] -> ([B, S, D], packed `RouterStats` or, in evaluation, None).

        `loss_scale` is the weight of the balance losses of one sequence in the loss of the step. Their gradients flow
        as if `loss_scale` times their sum were part of the loss. None: they are not part of the loss.
        """
        x_ND = self.dispatcher.shard_tokens(x_BSD)
        logits_NE = self.router(x_ND)
        scores_NE = logits_NE.softmax(-1) if self.moe.score == "softmax" else logits_NE.sigmoid()
        experts_NK = self.choose_experts(scores_NE.detach())
        weights_NK = self._compute_weights(scores_NE, experts_NK)
        is_chosen_NE = torch.zeros_like(scores_NE).scatter(1, experts_NK, 1.0)
        stats = None
        if self.training:
            stats = self._compute_stats(logits_NE, scores_NE, is_chosen_NE, num_sequences=len(x_BSD))
        if stats is not None and loss_scale is not None:
            balance_loss = self.moe.balance_loss * stats.balance + self.moe.router_z_loss * stats.z
            weights_NK = attach_loss(weights_NK, balance_loss * loss_scale)
        y_ND = self._apply_experts(x_ND, experts_NK, weights_NK, is_chosen_NE.sum(0))
        y_BSD = self.dispatcher.gather_tokens(y_ND, x_BSD)
        if self.shared is not None:
            y_BSD = y_BSD + self.shared(x_BSD)
        return y_BSD, None if stats is None else stats.pack()

    def choose_experts(self, scores_NE: Tensor) -> Tensor:
        """Return the indices of the chosen experts of each token, [N, K], in the order of their scores."""
        if self.selection_bias is not None:
            scores_NE = scores_NE + self.selection_bias
        num_groups = self.moe.n_groups
        if num_groups > 1:
            # A group counts as much as its two best experts together (DeepSeek-V3 2412.19437, 2.1.2).
            scores_NGe = scores_NE.unflatten(-1, (num_groups, -1))
            group_scores_NG = scores_NGe.topk(min(2, scores_NGe.shape[-1]), dim=-1).values.sum(-1)
            groups = group_scores_NG.topk(self.moe.top_groups, dim=-1).indices
            is_excluded_NG = torch.ones_like(group_scores_NG, dtype=torch.bool).scatter_(1, groups, False)
            scores_NE = scores_NGe.masked_fill(is_excluded_NG[..., None], -torch.inf).flatten(1)
        return scores_NE.topk(self.moe.top_k, dim=-1).indices

    def _compute_weights(self, scores_NE: Tensor, experts_NK: Tensor) -> Tensor:
        """Return the factors of the outputs of the chosen experts, [N, K]."""
        weights_NK = scores_NE.gather(1, experts_NK)
        if self.moe.normalize_weights:
            weights_NK = weights_NK / (weights_NK.sum(-1, keepdim=True) + 1e-20)
        return weights_NK * self.moe.weight_scale

    def _compute_stats(
        self, logits_NE: Tensor, scores_NE: Tensor, is_chosen_NE: Tensor, num_sequences: int
    ) -> RouterStats:
        """Compute the sums of the balance losses of all sequences, over the tokens of this rank.

        `is_chosen_NE` is 1 for the experts that a token has chosen.

        The balance loss of a sequence of T tokens is sum_e f_e P_e (DeepSeek-V3, equations 17-20): f_e is the number
        of choices of expert e, times E / (K T), and P_e the mean of its normalized scores. No gradient flows through
        f_e, so a rank that knows the counts of the full sequence can compute the part of its own tokens.
        """
        num_tokens, num_experts = scores_NE.shape
        sequence_ids_N = self.dispatcher.sequence_ids(num_tokens, num_sequences, scores_NE.device)
        sequence_tokens = num_tokens * self.dispatcher.num_sequence_shards / num_sequences
        if self.moe.balance_over == "previous_step":
            load_NE = self.previous_load.expand(num_tokens, -1)
        elif self.moe.balance_loss:
            # A matrix product counts the choices: torch 2.13 compiles index_add_ and scatter_add_ with these indices to
            # a kernel that loses some counts.
            is_in_sequence_NB = F.one_hot(sequence_ids_N, num_sequences).to(scores_NE.dtype)
            with torch.autocast(scores_NE.device.type, enabled=False):  # integers are exact in fp32
                counts_BE = self.dispatcher.all_reduce_counts(is_in_sequence_NB.T @ is_chosen_NE)
                load_NE = is_in_sequence_NB @ counts_BE / (self.moe.top_k * sequence_tokens)
        else:
            load_NE = torch.zeros_like(scores_NE)
        share_NE = scores_NE
        if self.moe.score == "sigmoid":
            share_NE = scores_NE / (scores_NE.sum(-1, keepdim=True) + 1e-20)
        balance = (load_NE * share_NE).sum() * (num_experts / sequence_tokens)
        z = logits_NE.logsumexp(-1).square().sum() / sequence_tokens
        entropy = torch.special.entr(share_NE.detach()).sum() / sequence_tokens
        return RouterStats(is_chosen_NE.sum(0), balance, z, entropy)

    def _apply_experts(self, x_ND: Tensor, experts_NK: Tensor, weights_NK: Tensor, counts_E: Tensor) -> Tensor:
        """Return the weighted sum of the outputs of the chosen experts of each token, [N, D]."""
        top_k = experts_NK.shape[1]
        order_R = experts_NK.flatten().argsort(stable=True)  # row of the sorted order -> token * K + choice
        position_R = invert_permutation(order_R)
        rows_RD = _CopyTokens.apply(x_ND, order_R, position_R, top_k)  # type: ignore[no-untyped-call]
        dispatched = self.dispatcher.dispatch(rows_RD, counts_E.long())
        outputs_RD = dispatched.return_rows(self.experts(dispatched.rows_RD, dispatched.counts_e))
        outputs_NKD = permute_rows(outputs_RD, position_R, order_R).unflatten(0, (-1, top_k))
        return (outputs_NKD * weights_NK[..., None]).sum(1).to(x_ND.dtype)

    @torch.no_grad()
    def update_router_state_(self, counts_E: Tensor) -> None:
        """Update the buffers after an optimizer step. `counts_E`: choices of each expert by all tokens of the step.

        The bias of an expert with less than the mean load grows (Wang et al. 2024, 2408.15664, algorithm 1).
        """
        self.previous_load.copy_(counts_E / counts_E.sum())
        if self.selection_bias is not None:
            self.selection_bias.add_(torch.sign(counts_E.mean() - counts_E), alpha=self.moe.selection_bias_rate)


def invert_permutation(order_R: Tensor) -> Tensor:
    """Return the permutation that undoes `order_R`."""
    return torch.empty_like(order_R).scatter_(0, order_R, torch.arange(len(order_R), device=order_R.device))


def permute_rows(x_RD: Tensor, order_R: Tensor, inverse_R: Tensor) -> Tensor:
    """Return x_RD[order_R]. In backward, indexing by the inverse permutation replaces a scatter."""
    permuted_RD: Tensor = _PermuteRows.apply(x_RD, order_R, inverse_R)  # type: ignore[no-untyped-call]
    return permuted_RD


class _PermuteRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, order_R: Tensor, inverse_R: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_R)
        return x_RD[order_R]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None, None]:
        (inverse_R,) = ctx.saved_tensors
        return grad_RD[inverse_R], None, None


class _CopyTokens(torch.autograd.Function):
    """Copy each token once per chosen expert, in the order of the experts: [N, D] -> [R, D].

    In backward, the gradients of the K copies of a token are summed in the order of its choices, which no layout
    changes. A scatter-add would sum them in any order.
    """

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, order_R: Tensor, position_R: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(position_R)
        ctx.top_k = top_k
        return x_ND[order_R // top_k]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None, None, None]:
        (position_R,) = ctx.saved_tensors
        return grad_RD[position_R].unflatten(0, (-1, ctx.top_k)).sum(1), None, None, None


def attach_loss(x: Tensor, loss: Tensor) -> Tensor:
    """Return `x`. In backward, the gradient of `loss` is 1, as if it were added to the loss of the model.

    A pipeline stage can so add a loss that only depends on its own activations.
    """
    attached: Tensor = _AttachLoss.apply(x, loss)  # type: ignore[no-untyped-call]
    return attached


class _AttachLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, grad.new_ones(())
