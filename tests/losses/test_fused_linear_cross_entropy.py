"""A layer and its loss in one are the two apart: value and every gradient, in slices or not."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dist_llm.losses import fused_linear_cross_entropy
from dist_llm.losses.cross_entropy import IGNORE, CrossEntropy, LossTerms
from dist_llm.losses.fused_linear_cross_entropy import VocabShard, linear_cross_entropy

B, S, D, V, ROWS = 3, 7, 5, 11, 16  # five rows of the weight are padding


def case(bias: bool, ignored: float = 0.3) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Vectors, a weight with padding, a bias, targets."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(B, S, D, generator=generator), torch.randn(ROWS, D, generator=generator)
    b = torch.randn(ROWS, generator=generator) if bias else None
    targets = torch.randint(V, (B, S), generator=generator)
    targets[torch.rand(B, S, generator=generator) < ignored] = IGNORE
    return x, weight, b, targets


def apart(x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, loss: CrossEntropy, cap: float) -> Tensor:
    logits = F.linear(x, weight[:V], None if bias is None else bias[:V])
    return loss(cap * torch.tanh(logits / cap) if cap else logits, targets)


def together(x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, loss: CrossEntropy, cap: float) -> Tensor:
    return linear_cross_entropy(x, weight, bias, targets, loss, cap, VocabShard(V, 0, V))


def outcome(way: Any, loss: CrossEntropy, cap: float, bias: bool, dtype: torch.dtype, autocast: Any) -> list[Tensor]:
    x, weight, b, targets = case(bias)
    leaves = [each.to(dtype).requires_grad_() for each in (x, weight, *([b] if b is not None else []))]
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        losses = way(*leaves[:2], leaves[2] if bias else None, targets, loss, cap)
    return [losses.detach(), *torch.autograd.grad(losses.sum() / 7, leaves)]


LOSSES = [CrossEntropy(), CrossEntropy(0.1), CrossEntropy(0.0, 1e-2), CrossEntropy(0.2, 0.3)]


@pytest.mark.parametrize("slices", [1 << 30, 4 * ROWS * 4, 1], ids=["whole", "slices", "tokens"])
@pytest.mark.parametrize("blocks", [1 << 30, 2 * V * 4])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("cap", "bias"), [(0.0, False), (0.0, True), (2.0, True)])
def test_value_and_gradients(
    slices: int, blocks: int, loss: CrossEntropy, cap: float, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused_linear_cross_entropy, "SLICE_BYTES", {"cpu": slices})
    monkeypatch.setattr(fused_linear_cross_entropy, "BLOCK_BYTES", blocks)
    for found, wanted in zip(
        outcome(together, loss, cap, bias, torch.float64, None),
        outcome(apart, loss, cap, bias, torch.float64, None),
        strict=True,
    ):
        # The loss apart is computed in fp64 as well, since logits are.
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("autocast", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("loss", LOSSES)
def test_under_autocast(loss: CrossEntropy, autocast: torch.dtype, tolerance: float) -> None:
    ours, theirs, exact = (
        outcome(way, loss, 0.0, True, torch.float32, kind)
        for way, kind in ((together, autocast), (apart, autocast), (apart, None))
    )
    for found, plain, wanted in zip(ours, theirs, exact, strict=True):
        assert found.dtype == wanted.dtype == torch.float32
        largest = wanted.abs().max()
        assert (found - wanted).abs().max() <= tolerance * largest
        assert (found - wanted).abs().max() <= 2 * (plain - wanted).abs().max() + 1e-3 * tolerance * largest


def test_small_probabilities_survive_fp16() -> None:
    """Of 50 000 tokens each has 2e-5: in fp16, unscaled, an eighth of the gradient would be gone or rounded away."""
    generator = torch.Generator().manual_seed(1)
    x, weight = torch.randn(1, 4, 8, generator=generator), 0.01 * torch.randn(50_000, 8, generator=generator)
    targets = torch.zeros(1, 4, dtype=torch.int64)

    def gradient(autocast: bool) -> Tensor:
        leaf = weight.clone().requires_grad_()
        with torch.autocast("cpu", torch.float16, enabled=autocast):
            losses = linear_cross_entropy(x, leaf, None, targets, CrossEntropy(), 0.0, VocabShard(50_000, 0, 50_000))
        (found,) = torch.autograd.grad(losses.sum() * 1024, leaf)
        return found[1:]  # all but the target

    exact = gradient(False)
    assert float((gradient(True) - exact).norm() / exact.norm()) < 5e-3


def test_nothing_scored() -> None:
    x, weight, _, targets = case(False, ignored=2.0)
    x.requires_grad_(), weight.requires_grad_()
    losses = together(x, weight, None, targets, CrossEntropy(0.1, 0.1), 0.0)
    assert losses.tolist() == [0.0] * B
    assert all(not gradient.any() for gradient in torch.autograd.grad(losses.sum(), (x, weight)))


def test_losses_multiplied_differently_afterwards_are_refused() -> None:
    x, weight, _, targets = case(False)
    weight.requires_grad_()
    losses = together(x, weight, None, targets, CrossEntropy(), 0.0)
    with pytest.raises(RuntimeError, match="pass the numbers as its loss_weights_BS"):
        torch.autograd.grad((losses * torch.tensor([1.0, 2.0, 3.0])).sum(), weight)


@pytest.mark.parametrize("slices", [1 << 30, 1], ids=["whole", "tokens"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("per_token", [False, True], ids=["sequences", "tokens"])
def test_weights_known_in_forward(
    per_token: bool, loss: CrossEntropy, slices: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One per sequence or per token, some 0, some negative: value and every gradient are those of the plain formula."""
    monkeypatch.setattr(fused_linear_cross_entropy, "SLICE_BYTES", {"cpu": slices})
    x, weight, bias, targets = case(True)
    assert bias is not None
    weights = torch.tensor([1.0, -0.5, 3.0], dtype=torch.float64)[:, None].expand(B, S).clone()
    if per_token:
        weights *= torch.arange(S) % 3
    leaves = [each.double().requires_grad_() for each in (x, weight, bias)]
    terms = LossTerms()
    found = linear_cross_entropy(*leaves, targets, loss, 2.0, VocabShard(V, 0, V), terms, weights)

    logits = 2.0 * torch.tanh(F.linear(leaves[0], leaves[1][:V], leaves[2][:V]) / 2.0)
    each_BS = loss(logits.unsqueeze(-2), targets.unsqueeze(-1))
    wanted = (each_BS * weights).sum(-1)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
    for ours, theirs in zip(
        torch.autograd.grad(found.sum() / 7, leaves), torch.autograd.grad(wanted.sum() / 7, leaves), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_gradients_asked_for_twice() -> None:
    """As a pipeline does that wants those of the activations first."""
    x, weight, _, targets = case(False)
    x.requires_grad_(), weight.requires_grad_()
    losses = together(x, weight, None, targets, CrossEntropy(), 0.0).sum() / 5
    (first,) = torch.autograd.grad(losses, x, retain_graph=True)
    second, of_weight = torch.autograd.grad(losses, (x, weight))
    assert torch.equal(first, second)
    wanted = torch.autograd.grad(apart(x, weight, None, targets, CrossEntropy(), 0.0).sum() / 5, weight)
    torch.testing.assert_close(of_weight, *wanted, rtol=1e-5, atol=1e-6)


def test_without_gradients_none_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    monkeypatch.setattr(fused_linear_cross_entropy, "_add_matmul_", lambda *given: made.append(given))
    x, weight, bias, targets = case(True)
    weight.requires_grad_()
    with torch.no_grad():
        losses = together(x, weight, bias, targets, CrossEntropy(), 0.0)
    assert not made
    torch.testing.assert_close(losses, apart(x, weight, bias, targets, CrossEntropy(), 0.0))


def test_slices_cover_all_and_hold_no_more_than_they_may() -> None:
    for length, width, most in ((10, 3, 24), (7, 100, 1), (1, 1, 4), (513, 32000, 64 << 20), (5, 0, 8)):
        found = list(fused_linear_cross_entropy.iter_slices(length, width, most))
        assert [row for part in found for row in range(length)[part]] == list(range(length))
        rows = max(part.stop - part.start for part in found)
        assert rows == 1 or rows * width * 4 <= most + width * 4


def test_a_target_that_is_no_token_is_not_passed_over() -> None:
    x, weight, _, targets = case(False, ignored=0.0)
    targets[1, 2] = V
    assert together(x, weight, None, targets, CrossEntropy(), 0.0).isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("slices", [1 << 30, 1], ids=["whole", "tokens"])
@pytest.mark.parametrize("loss", LOSSES[1:])
def test_what_a_regularised_loss_is_made_of(loss: CrossEntropy, slices: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cross-entropy as without regularisation, z-loss by hand; by both ways, and gradients are as without them."""
    monkeypatch.setattr(fused_linear_cross_entropy, "SLICE_BYTES", {"cpu": slices})
    x, weight, bias, targets = (each.double() if each.is_floating_point() else each for each in case(True))
    logits = apart_logits(x, weight, bias)
    plain = CrossEntropy()(logits, targets).sum()
    z_loss = loss.z_loss * (logits.logsumexp(-1).square() * (targets != IGNORE)).sum()
    collected, of_logits = LossTerms(), LossTerms()
    linear_cross_entropy(x, weight, bias, targets, loss, 0.0, VocabShard(V, 0, V), collected)
    loss(logits, targets, of_logits)
    for terms in (collected, of_logits):
        torch.testing.assert_close(terms.pop_latest(1), torch.stack((plain, z_loss)))
        assert terms.pop_latest(1) is None


def apart_logits(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(x, weight[:V], bias[:V])


def test_only_the_terms_of_the_newest_microbatches_count() -> None:
    terms = LossTerms()
    for value in (7.0, 1.0, 2.0):
        terms.add(torch.tensor([value, 10 * value]))
    assert terms.pop_latest(2).tolist() == [3.0, 30.0]  # type: ignore[union-attr]
