"""The summed loss and its gradient equal a direct computation from their definition."""

import pytest
import torch
import torch.nn.functional as F

from dist_llm.losses.cross_entropy import IGNORE_INDEX, CrossEntropy

B, S, V = 3, 5, 11  # batch size, sequence length, vocabulary size


def make_logits_and_targets(dtype=torch.float32, scale=3.0, seed=0):
    """Make logits [B, S, V] and targets [B, S], some of them ignored."""
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(B, S, V, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, V, (B, S), generator=generator)
    targets[0, :3] = targets[2, 4] = IGNORE_INDEX
    return logits.to(dtype), targets


def sum_loss_by_definition(logits, targets, smoothing=0.0, z_loss=0.0):
    """Sum the loss target by target in fp64, by the formulas of the papers."""
    total = torch.zeros((), dtype=torch.float64)
    for row, target in zip(logits.double().flatten(0, -2), targets.flatten().tolist(), strict=True):
        if target == IGNORE_INDEX:
            continue
        normalizer = row.exp().sum()
        log_probs = (row.exp() / normalizer).log()
        target_probs = torch.full((len(row),), smoothing / len(row), dtype=torch.float64)
        target_probs[target] += 1 - smoothing
        total = total - (target_probs * log_probs).sum() + z_loss * normalizer.log() ** 2
    return total


@pytest.mark.parametrize("seed", range(3))
def test_loss_equals_torch_and_the_definition(seed):
    logits, targets = make_logits_and_targets(seed=seed)
    by_row = CrossEntropy()(logits, targets)
    rows = zip(logits[:, None], targets[:, None], strict=True)
    torch.testing.assert_close(by_row, torch.stack([sum_loss_by_definition(*row) for row in rows]).float())
    actual = by_row.sum()
    torch.testing.assert_close(
        actual, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"), rtol=1e-6, atol=0
    )
    torch.testing.assert_close(actual.double(), sum_loss_by_definition(logits, targets), rtol=1e-6, atol=0)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("z_loss", [0.0, 1e-4, 0.3])
def test_smoothing_and_z_loss_equal_computed_values(smoothing, z_loss):
    logits, targets = make_logits_and_targets()
    actual = CrossEntropy(label_smoothing=smoothing, z_loss=z_loss)(logits, targets).sum()
    torch.testing.assert_close(
        actual.double(), sum_loss_by_definition(logits, targets, smoothing, z_loss), rtol=2e-6, atol=0
    )


def test_two_equal_logits_give_log_2():
    """Two logits of ln 2 give Z = 4 and p = 1/2. So the loss is ln 2, and the z-loss is z * (ln 4)^2."""
    ln2 = torch.tensor(2.0).log()
    logits, targets = torch.stack((ln2, ln2)).view(1, 1, 2), torch.tensor([[1]])
    torch.testing.assert_close(CrossEntropy()(logits, targets), ln2[None])
    torch.testing.assert_close(CrossEntropy(z_loss=0.5)(logits, targets).sum(), ln2 + 0.5 * 4 * ln2**2)


@pytest.mark.parametrize(
    "loss",
    [
        CrossEntropy(),
        CrossEntropy(label_smoothing=0.2),
        CrossEntropy(label_smoothing=0.0, z_loss=0.3),
        CrossEntropy(label_smoothing=0.1, z_loss=0.01),
    ],
)
def test_gradients_match_finite_differences(loss):
    logits, targets = make_logits_and_targets(torch.float64)
    assert torch.autograd.gradcheck(lambda x: loss(x, targets), logits.requires_grad_(), fast_mode=True)


def test_z_loss_gradient_equals_the_formula():
    """The gradient of z * (log Z)^2 is 2 z log Z softmax(x) at valid targets, and 0 at ignored targets."""
    logits, targets = make_logits_and_targets(torch.float64)
    logits.requires_grad_()
    (with_z_loss,) = torch.autograd.grad(CrossEntropy(z_loss=0.7)(logits, targets).sum(), logits)
    (plain,) = torch.autograd.grad(CrossEntropy()(logits, targets).sum(), logits)
    expected = (
        2 * 0.7 * logits.logsumexp(-1, keepdim=True) * logits.softmax(-1) * (targets != IGNORE_INDEX).unsqueeze(-1)
    )
    torch.testing.assert_close(with_z_loss - plain, expected.detach())


@pytest.mark.parametrize(
    "loss", [CrossEntropy(), CrossEntropy(label_smoothing=0.1), CrossEntropy(label_smoothing=0.1, z_loss=1e-4)]
)
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_extreme_logits_give_finite_losses(loss, size):
    logits = torch.zeros(1, 2, V)
    logits[..., 0] = size
    logits.requires_grad_()
    value = loss(logits, torch.tensor([[0, 1]])).sum()
    value.backward()
    assert value.isfinite()
    assert logits.grad.isfinite().all()
    if loss == CrossEntropy() and size > 0:
        assert value == 1e4


@pytest.mark.parametrize("loss", [CrossEntropy(), CrossEntropy(label_smoothing=0.1, z_loss=0.3)])
def test_ignored_targets_have_no_loss_and_no_gradient(loss):
    logits, targets = make_logits_and_targets()
    logits.requires_grad_()
    value = loss(logits, targets).sum()
    (gradient,) = torch.autograd.grad(value, logits)
    ignored = targets == IGNORE_INDEX
    assert (gradient[ignored] == 0).all()
    assert (gradient[~ignored] != 0).any(-1).all()

    other = logits.detach().clone()
    other[ignored] = 1e4
    assert loss(other, targets).sum() == value
    without_ignored = loss(logits[~ignored][None], targets[~ignored][None]).sum()
    torch.testing.assert_close(without_ignored, value)


@pytest.mark.parametrize(
    "loss", [CrossEntropy(), CrossEntropy(label_smoothing=0.1), CrossEntropy(label_smoothing=0.1, z_loss=0.3)]
)
def test_loss_without_valid_targets_is_zero(loss):
    logits = make_logits_and_targets()[0].requires_grad_()
    value = loss(logits, torch.full((B, S), IGNORE_INDEX)).sum()
    value.backward()
    assert value == 0
    assert (logits.grad == 0).all()


@pytest.mark.parametrize("loss", [CrossEntropy(), CrossEntropy(label_smoothing=0.1, z_loss=0.01)])
def test_bf16_logits_are_summed_in_fp32(loss):
    logits, targets = make_logits_and_targets(torch.bfloat16)
    actual = loss(logits, targets)
    assert actual.dtype == torch.float32
    assert torch.equal(actual, loss(logits.float(), targets))


def test_loss_of_a_sequence_does_not_depend_on_the_batch():
    loss = CrossEntropy(label_smoothing=0.1, z_loss=0.01)
    logits, targets = make_logits_and_targets(torch.float64)
    per_row = torch.cat([loss(row[None], target[None]) for row, target in zip(logits, targets, strict=True)])
    torch.testing.assert_close(per_row, loss(logits, targets))
