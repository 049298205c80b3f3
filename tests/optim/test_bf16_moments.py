"""AdamW with bf16 moments uses half the memory, equals fp32 on average, and does not depend on the layout."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from dist_llm import counter_rng
from dist_llm.checkpoint.checkpoint_state import TorchState
from dist_llm.config.optim_sections import AdamWConfig
from dist_llm.optim.adamw import BF16AdamW, stochastic_round_bf16
from dist_llm.optim.build_optimizer import build_optimizer
from tests.optim.specs import make_spec


def random_bits(count: int) -> Tensor:
    """Return `count` random 64-bit numbers."""
    return counter_rng.splitmix64(torch.arange(count))


def test_stochastic_rounding_is_unbiased_between_two_neighbours() -> None:
    for value in (1.0 + 1 / 1000, -3.3e-7, 1e20, 0.3):
        values = torch.full((1 << 16,), value)
        rounded = stochastic_round_bf16(values, random_bits(1 << 16)).double()
        step = float(torch.tensor(value).abs().log2().floor().exp2()) * 2**-7  # spacing of bf16 numbers
        neighbours = rounded.unique()
        assert len(neighbours) == 2
        assert neighbours[1] - neighbours[0] == step
        # The mean of 65,536 draws has a standard deviation of at most step / 512.
        assert abs(rounded.mean() - values[0].double()) < 5 * step / 512


def test_exact_and_non_finite_values_are_not_rounded() -> None:
    exact = torch.tensor([0.0, 1.0, -2.5, 2.0**-126, float("inf"), -float("inf")])
    for seed in range(100):
        assert torch.equal(
            stochastic_round_bf16(exact, counter_rng.splitmix64(torch.arange(6) + 6 * seed)).float(), exact
        )
    for pattern in (0x7FC00000, 0x7FFFFFFF, -1):  # the NaN of a CPU, of a GPU, and a negative one
        nan = torch.tensor([pattern], dtype=torch.int32).view(torch.float32)
        assert stochastic_round_bf16(nan, torch.tensor([0xFFFF])).isnan()


def test_a_second_moment_grows_where_round_to_nearest_stalls() -> None:
    """With a gradient of 1 and beta2 = 0.999, a step adds 1/1000 of the remaining difference.

    Round-to-nearest stops halfway.
    """
    config = AdamWConfig(moments="bf16", beta2=0.999, lr=1e-9)
    parameter = nn.Parameter(torch.zeros(256, 16))
    optimizer = build_optimizer(config, [("w", parameter)], {"w": make_spec(parameter)})
    nearest = torch.zeros((), dtype=torch.bfloat16)
    for _ in range(3000):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        nearest = (0.999 * nearest.float() + 0.001).bfloat16()
    second_moment = optimizer.state[parameter]["exp_avg_sq"].float()
    expected = 1 - 0.999**3000
    assert abs(second_moment.mean() - expected) < 0.005 * expected
    assert nearest < 0.6 * expected


class OptimizedParameter(NamedTuple):
    """A parameter after some steps, and its optimizer."""

    value: Tensor
    optimizer: BF16AdamW


def run_steps(moments: str, shape: tuple[int, ...], count: int) -> OptimizedParameter:
    """Take `count` steps with random gradients. `moments` is the config value of optim.moments."""
    parameter = nn.Parameter(torch.full(shape, 0.5))
    config = AdamWConfig(moments=moments, lr=1e-2, beta2=0.95, weight_decay=0.1)
    optimizer = build_optimizer(config, [("w", parameter)], {"w": make_spec(parameter)})
    for step in range(count):
        parameter.grad = parameter.detach() - 0.1 + torch.randn(shape, generator=torch.Generator().manual_seed(step))
        optimizer.step()
    return OptimizedParameter(parameter.detach(), optimizer)


def test_first_bf16_step_equals_fp32() -> None:
    for shape in ((6, 5), (7,)):
        torch.testing.assert_close(
            run_steps("bf16", shape=shape, count=1).value,
            run_steps("fp32", shape=shape, count=1).value,
            rtol=1e-6,
            atol=1e-7,
        )


def test_bf16_steps_stay_near_fp32() -> None:
    bf16_value, optimizer = run_steps("bf16", shape=(40, 50), count=100)
    fp32_value, _ = run_steps("fp32", shape=(40, 50), count=100)
    mean_change = (fp32_value - 0.5).abs().mean()
    assert (bf16_value - fp32_value).abs().mean() < 0.02 * mean_change
    (state,) = optimizer.state.values()
    assert {key: value.dtype for key, value in state.items()} == {
        "step": torch.float32,
        "exp_avg": torch.bfloat16,
        "exp_avg_sq": torch.bfloat16,
    }


def test_update_of_a_shard_equals_the_slice_of_the_full_update(monkeypatch) -> None:
    """The random bits of an element depend on its index in the full tensor and not on the chunk size."""
    full_value, _ = run_steps("bf16", shape=(12, 5), count=20)
    monkeypatch.setattr(counter_rng, "CHUNK_ELEMENTS", 20)
    parameter = nn.Parameter(torch.full((4, 5), 0.5))
    config = AdamWConfig(moments="bf16", lr=1e-2, beta2=0.95, weight_decay=0.1)
    optimizer = build_optimizer(
        config, [("w", parameter)], {"w": make_spec(parameter)}, local_with_offset=lambda tensor: (tensor, (6, 0))
    )
    for step in range(20):
        noise = torch.randn(12, 5, generator=torch.Generator().manual_seed(step))
        parameter.grad = parameter.detach() - 0.1 + noise[6:10]
        optimizer.step()
    assert torch.equal(parameter.detach(), full_value[6:10])


def test_resume_keeps_the_moments_in_bf16() -> None:
    """A checkpoint is loaded into the moments that `allocate_moments` creates. They must be bf16, not fp32."""
    model = nn.Module()
    model.w = nn.Parameter(torch.full((3, 4), 0.5))
    state = TorchState(
        model, build_optimizer(AdamWConfig(moments="bf16"), model.named_parameters(), {"w": make_spec(model.w)})
    )
    state.allocate_moments({"optim.w.step": (), "optim.w.exp_avg": (3, 4), "optim.w.exp_avg_sq": (3, 4)})
    dtypes = {name: moment.dtype for name, moment in state.moments().items()}
    bf16 = torch.bfloat16
    assert dtypes == {"optim.w.step": torch.float32, "optim.w.exp_avg": bf16, "optim.w.exp_avg_sq": bf16}
