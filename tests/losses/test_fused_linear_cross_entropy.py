"""The fused layer and loss equal a separate layer and loss: values and all gradients, for any slice size."""

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dist_llm.losses import fused_linear_cross_entropy
from dist_llm.losses.cross_entropy import IGNORE_INDEX, CrossEntropy, LossTerms
from dist_llm.losses.fused_linear_cross_entropy import VocabShard, linear_cross_entropy

B, S, D = 3, 7, 5  # batch size, sequence length, width of the model
V, ROWS = 11, 16  # vocabulary size, rows of the weight; the last five rows are padding


class LinearInputs(NamedTuple):
    """The inputs of the last layer and of the loss."""

    x_BSD: Tensor
    weight_WD: Tensor
    bias_W: Tensor | None
    targets_BS: Tensor


def make_inputs(*, has_bias: bool, ignored_fraction: float = 0.3) -> LinearInputs:
    """Make random inputs; about `ignored_fraction` of the targets are ignored."""
    generator = torch.Generator().manual_seed(0)
    x_BSD = torch.randn(B, S, D, generator=generator)
    weight_WD = torch.randn(ROWS, D, generator=generator)
    bias_W = torch.randn(ROWS, generator=generator) if has_bias else None
    targets_BS = torch.randint(V, (B, S), generator=generator)
    targets_BS[torch.rand(B, S, generator=generator) < ignored_fraction] = IGNORE_INDEX
    return LinearInputs(x_BSD, weight_WD, bias_W, targets_BS)


def compute_separately(
    x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, loss: CrossEntropy, cap: float
) -> Tensor:
    """Return the summed loss of each sequence [B] from materialized logits."""
    logits = F.linear(x, weight[:V], None if bias is None else bias[:V])
    return loss(cap * torch.tanh(logits / cap) if cap else logits, targets)


def compute_fused(
    x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, loss: CrossEntropy, cap: float
) -> Tensor:
    """Return the summed loss of each sequence [B] from the function under test."""
    return linear_cross_entropy(
        x,
        weight,
        bias_W=bias,
        targets_BS=targets,
        loss=loss,
        softcap=cap,
        vocab_shard=VocabShard(V, first_token=0, num_tokens=V),
    )


def compute_with_gradients(
    compute: Any, *, loss: CrossEntropy, cap: float, has_bias: bool, dtype: torch.dtype, autocast: Any
) -> list[Tensor]:
    """Return losses and gradients of x, weight and bias by the function `compute`, under autocast to `autocast`."""
    inputs = make_inputs(has_bias=has_bias)
    leaves = [tensor.to(dtype).requires_grad_() for tensor in inputs[:3] if tensor is not None]
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        losses = compute(*leaves[:2], leaves[2] if has_bias else None, inputs.targets_BS, loss, cap)
    return [losses.detach(), *torch.autograd.grad(losses.sum() / 7, leaves)]


LOSSES = [
    CrossEntropy(),
    CrossEntropy(label_smoothing=0.1),
    CrossEntropy(label_smoothing=0.0, z_loss=1e-2),
    CrossEntropy(label_smoothing=0.2, z_loss=0.3),
]


@pytest.mark.parametrize("slice_bytes", [1 << 30, 4 * ROWS * 4, 1], ids=["whole", "slices", "tokens"])
@pytest.mark.parametrize("block_bytes", [1 << 30, 2 * V * 4])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("cap", "has_bias"), [(0.0, False), (0.0, True), (2.0, True)])
def test_fused_loss_equals_the_unfused_loss(
    slice_bytes: int, block_bytes: int, loss: CrossEntropy, cap: float, has_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused_linear_cross_entropy, "SLICE_BYTES", {"cpu": slice_bytes})
    monkeypatch.setattr(fused_linear_cross_entropy, "BLOCK_BYTES", block_bytes)
    for actual, expected in zip(
        compute_with_gradients(
            compute_fused, loss=loss, cap=cap, has_bias=has_bias, dtype=torch.float64, autocast=None
        ),
        compute_with_gradients(
            compute_separately, loss=loss, cap=cap, has_bias=has_bias, dtype=torch.float64, autocast=None
        ),
        strict=True,
    ):
        # The logits are fp64, so the separate loss is also computed in fp64.
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("autocast", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("loss", LOSSES)
def test_fused_loss_under_autocast(loss: CrossEntropy, autocast: torch.dtype, tolerance: float) -> None:
    fused, separate, exact = (
        compute_with_gradients(compute, loss=loss, cap=0.0, has_bias=True, dtype=torch.float32, autocast=kind)
        for compute, kind in ((compute_fused, autocast), (compute_separately, autocast), (compute_separately, None))
    )
    for actual, plain, expected in zip(fused, separate, exact, strict=True):
        assert actual.dtype == expected.dtype == torch.float32
        largest = expected.abs().max()
        assert (actual - expected).abs().max() <= tolerance * largest
        assert (actual - expected).abs().max() <= 2 * (plain - expected).abs().max() + 1e-3 * tolerance * largest


def test_small_probabilities_do_not_underflow_in_fp16() -> None:
    """Each of 50,000 tokens has probability 2e-5. Without the scale, fp16 would lose an eighth of the gradient."""
    generator = torch.Generator().manual_seed(1)
    x, weight = torch.randn(1, 4, 8, generator=generator), 0.01 * torch.randn(50_000, 8, generator=generator)
    targets = torch.zeros(1, 4, dtype=torch.int64)

    def compute_gradient(autocast: bool) -> Tensor:
        leaf = weight.clone().requires_grad_()
        with torch.autocast("cpu", torch.float16, enabled=autocast):
            losses = linear_cross_entropy(
                x,
                leaf,
                bias_W=None,
                targets_BS=targets,
                loss=CrossEntropy(),
                softcap=0.0,
                vocab_shard=VocabShard(vocab_size=50_000, first_token=0, num_tokens=50_000),
            )
        (weight_grad,) = torch.autograd.grad(losses.sum() * 1024, leaf)
        return weight_grad[1:]  # without the row of the target

    exact = compute_gradient(autocast=False)
    assert float((compute_gradient(autocast=True) - exact).norm() / exact.norm()) < 5e-3


def test_gradients_without_valid_targets_are_zero() -> None:
    x, weight, _, targets = make_inputs(has_bias=False, ignored_fraction=2.0)
    x.requires_grad_(), weight.requires_grad_()
    losses = compute_fused(
        x, weight, bias=None, targets=targets, loss=CrossEntropy(label_smoothing=0.1, z_loss=0.1), cap=0.0
    )
    assert losses.tolist() == [0.0] * B
    assert all(not gradient.any() for gradient in torch.autograd.grad(losses.sum(), (x, weight)))


def test_different_loss_factors_after_forward_are_rejected() -> None:
    x, weight, _, targets = make_inputs(has_bias=False)
    weight.requires_grad_()
    losses = compute_fused(x, weight, bias=None, targets=targets, loss=CrossEntropy(), cap=0.0)
    with pytest.raises(RuntimeError, match="pass the numbers as its loss_weights_BS"):
        torch.autograd.grad((losses * torch.tensor([1.0, 2.0, 3.0])).sum(), weight)


@pytest.mark.parametrize("slice_bytes", [1 << 30, 1], ids=["whole", "tokens"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("per_token", [False, True], ids=["sequences", "tokens"])
def test_loss_weights_scale_losses_and_gradients(
    per_token: bool, loss: CrossEntropy, slice_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses and gradients equal the formula for weights per sequence and per token, including 0 and negative ones."""
    monkeypatch.setattr(fused_linear_cross_entropy, "SLICE_BYTES", {"cpu": slice_bytes})
    x, weight, bias, targets = make_inputs(has_bias=True)
    assert bias is not None
    weights = torch.tensor([1.0, -0.5, 3.0], dtype=torch.float64)[:, None].expand(B, S).clone()
    if per_token:
        weights *= torch.arange(S) % 3
    leaves = [tensor.double().requires_grad_() for tensor in (x, weight, bias)]
    vocab_shard = VocabShard(V, first_token=0, num_tokens=V)
    actual = linear_cross_entropy(
        *leaves,
        targets_BS=targets,
        loss=loss,
        softcap=2.0,
        vocab_shard=vocab_shard,
        terms=LossTerms(),
        loss_weights_BS=weights,
    )

    logits = 2.0 * torch.tanh(F.linear(leaves[0], leaves[1][:V], leaves[2][:V]) / 2.0)
    losses_BS = loss(logits.unsqueeze(-2), targets.unsqueeze(-1))
    expected = (losses_BS * weights).sum(-1)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)
    for actual_grad, expected_grad in zip(
        torch.autograd.grad(actual.sum() / 7, leaves), torch.autograd.grad(expected.sum() / 7, leaves), strict=True
    ):
        torch.testing.assert_close(actual_grad, expected_grad, rtol=1e-9, atol=1e-12)


def test_backward_may_run_twice() -> None:
    """A pipeline first computes the gradients of the activations, then the gradients of the weights."""
    x, weight, _, targets = make_inputs(has_bias=False)
    x.requires_grad_(), weight.requires_grad_()
    losses = compute_fused(x, weight, bias=None, targets=targets, loss=CrossEntropy(), cap=0.0).sum() / 5
    (first,) = torch.autograd.grad(losses, x, retain_graph=True)
    second, weight_grad = torch.autograd.grad(losses, (x, weight))
    assert torch.equal(first, second)
    expected = torch.autograd.grad(
        compute_separately(x, weight, bias=None, targets=targets, loss=CrossEntropy(), cap=0.0).sum() / 5, weight
    )
    torch.testing.assert_close(weight_grad, *expected, rtol=1e-5, atol=1e-6)


def test_forward_without_grad_computes_no_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    matmuls: list[Any] = []
    monkeypatch.setattr(fused_linear_cross_entropy, "_add_matmul_", lambda *args: matmuls.append(args))
    x, weight, bias, targets = make_inputs(has_bias=True)
    weight.requires_grad_()
    with torch.no_grad():
        losses = compute_fused(x, weight, bias=bias, targets=targets, loss=CrossEntropy(), cap=0.0)
    assert not matmuls
    torch.testing.assert_close(
        losses, compute_separately(x, weight, bias=bias, targets=targets, loss=CrossEntropy(), cap=0.0)
    )


def test_slices_cover_all_rows_within_the_size_limit() -> None:
    for length, width, max_bytes in ((10, 3, 24), (7, 100, 1), (1, 1, 4), (513, 32000, 64 << 20), (5, 0, 8)):
        slices = list(fused_linear_cross_entropy.iter_slices(length, width, max_bytes))
        assert [row for slice_ in slices for row in range(length)[slice_]] == list(range(length))
        rows = max(slice_.stop - slice_.start for slice_ in slices)
        assert rows == 1 or rows * width * 4 <= max_bytes + width * 4


def test_target_outside_the_vocabulary_gives_nan() -> None:
    x, weight, _, targets = make_inputs(has_bias=False, ignored_fraction=0.0)
    targets[1, 2] = V
    assert compute_fused(x, weight, bias=None, targets=targets, loss=CrossEntropy(), cap=0.0).isnan().tolist() == [
        False,
        True,
        False,
    ]


@pytest.mark.parametrize("slice_bytes", [1 << 30, 1], ids=["whole", "tokens"])
@pytest.mark.parametrize("loss", LOSSES[1:])
def test_loss_terms_of_a_regularized_loss(
    loss: CrossEntropy, slice_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fused and the separate loss report the same terms: unregularized cross-entropy and z-loss."""
    monkeypatch.setattr(fused_linear_cross_entropy, "SLICE_BYTES", {"cpu": slice_bytes})
    x, weight, bias, targets = (
        tensor.double() if tensor.is_floating_point() else tensor for tensor in make_inputs(has_bias=True)
    )
    logits = compute_logits(x, weight, bias)
    plain = CrossEntropy()(logits, targets).sum()
    z_loss = loss.z_loss * (logits.logsumexp(-1).square() * (targets != IGNORE_INDEX)).sum()
    from_fused, from_logits = LossTerms(), LossTerms()
    linear_cross_entropy(
        x,
        weight,
        bias_W=bias,
        targets_BS=targets,
        loss=loss,
        softcap=0.0,
        vocab_shard=VocabShard(V, first_token=0, num_tokens=V),
        terms=from_fused,
    )
    loss(logits, targets, from_logits)
    for terms in (from_fused, from_logits):
        torch.testing.assert_close(terms.pop_latest(1), torch.stack((plain, z_loss)))
        assert terms.pop_latest(1) is None


def compute_logits(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return the logits [B, S, V] without the rows that pad the vocabulary."""
    return F.linear(x, weight[:V], bias[:V])


def test_pop_latest_returns_the_latest_microbatches() -> None:
    terms = LossTerms()
    for value in (7.0, 1.0, 2.0):
        terms.add(torch.tensor([value, 10 * value]))
    assert terms.pop_latest(2).tolist() == [3.0, 30.0]  # type: ignore[union-attr]
