"""AdamW with bf16 moments: half the memory, on average the same, whatever the layout."""

import torch
from torch import Tensor, nn

from dist_llm import counter_rng
from dist_llm.checkpoint.checkpoint_state import TorchState
from dist_llm.config.optim_sections import AdamWConfig
from dist_llm.optim.adamw import BF16AdamW, stochastic_round_bf16
from dist_llm.optim.build_optimizer import build_optimizer


def bits(count: int) -> Tensor:
    return counter_rng.splitmix64(torch.arange(count))


def test_rounding_gives_one_of_the_two_neighbours_and_the_value_on_average() -> None:
    for value in (1.0 + 1 / 1000, -3.3e-7, 1e20, 0.3):
        values = torch.full((1 << 16,), value)
        found = stochastic_round_bf16(values, bits(1 << 16)).double()
        step = float(torch.tensor(value).abs().log2().floor().exp2()) * 2**-7  # between bf16 numbers
        neighbours = found.unique()
        assert len(neighbours) == 2
        assert neighbours[1] - neighbours[0] == step
        # The mean of 65,536 draws has a standard deviation of at most step / 512.
        assert abs(found.mean() - values[0].double()) < 5 * step / 512


def test_what_bf16_holds_is_kept_and_so_is_what_is_not_finite() -> None:
    exact = torch.tensor([0.0, 1.0, -2.5, 2.0**-126, float("inf"), -float("inf")])
    for seed in range(100):
        assert torch.equal(
            stochastic_round_bf16(exact, counter_rng.splitmix64(torch.arange(6) + 6 * seed)).float(), exact
        )
    for pattern in (0x7FC00000, 0x7FFFFFFF, -1):  # a CPU's NaN, a GPU's, and one with a sign
        nan = torch.tensor([pattern], dtype=torch.int32).view(torch.float32)
        assert stochastic_round_bf16(nan, torch.tensor([0xFFFF])).isnan()


def test_a_second_moment_grows_where_the_nearest_would_stand_still() -> None:
    """A gradient of 1 under beta2 = 0.999: a step adds 1/1000 of what is missing; the nearest stops halfway."""
    config = AdamWConfig(moments="bf16", beta2=0.999, lr=1e-9)
    held = nn.Parameter(torch.zeros(256, 16))
    optimizer = build_optimizer(config, [("w", held)])
    nearest = torch.zeros((), dtype=torch.bfloat16)
    for _ in range(3000):
        held.grad = torch.ones_like(held)
        optimizer.step()
        nearest = (0.999 * nearest.float() + 0.001).bfloat16()
    second = optimizer.state[held]["exp_avg_sq"].float()
    want = 1 - 0.999**3000
    assert abs(second.mean() - want) < 0.005 * want
    assert nearest < 0.6 * want


def taken(moments: str, shape: tuple[int, ...], count: int) -> tuple[Tensor, BF16AdamW]:
    held = nn.Parameter(torch.full(shape, 0.5))
    config = AdamWConfig(moments=moments, lr=1e-2, beta2=0.95, weight_decay=0.1)
    optimizer = build_optimizer(config, [("w", held)])
    for step in range(count):
        held.grad = held.detach() - 0.1 + torch.randn(shape, generator=torch.Generator().manual_seed(step))
        optimizer.step()
    return held.detach(), optimizer


def test_the_first_step_is_that_of_fp32() -> None:
    for shape in ((6, 5), (7,)):
        torch.testing.assert_close(taken("bf16", shape, 1)[0], taken("fp32", shape, 1)[0], rtol=1e-6, atol=1e-7)


def test_a_hundred_steps_stay_near_those_of_fp32() -> None:
    half, optimizer = taken("bf16", (40, 50), 100)
    full, _ = taken("fp32", (40, 50), 100)
    moved = (full - 0.5).abs().mean()
    assert (half - full).abs().mean() < 0.02 * moved
    (state,) = optimizer.state.values()
    assert {key: value.dtype for key, value in state.items()} == {
        "step": torch.float32,
        "exp_avg": torch.bfloat16,
        "exp_avg_sq": torch.bfloat16,
    }


def test_a_slice_steps_as_it_does_in_the_whole(monkeypatch) -> None:
    """The chance of an element is that of its place in the whole, whatever rows are done at a time."""
    whole, _ = taken("bf16", (12, 5), 20)
    monkeypatch.setattr(counter_rng, "CHUNK_ELEMENTS", 20)
    held = nn.Parameter(torch.full((4, 5), 0.5))
    config = AdamWConfig(moments="bf16", lr=1e-2, beta2=0.95, weight_decay=0.1)
    optimizer = build_optimizer(config, [("w", held)], local_with_offset=lambda tensor: (tensor, (6, 0)))
    for step in range(20):
        noise = torch.randn(12, 5, generator=torch.Generator().manual_seed(step))
        held.grad = held.detach() - 0.1 + noise[6:10]
        optimizer.step()
    assert torch.equal(held.detach(), whole[6:10])


def test_a_resume_allocates_the_moments_in_bf16() -> None:
    """A checkpoint loads into the dtypes that `allocate_moments` chooses; fp32 moments would not be rounded again."""
    model = nn.Module()
    model.w = nn.Parameter(torch.full((3, 4), 0.5))
    state = TorchState(model, build_optimizer(AdamWConfig(moments="bf16"), model.named_parameters()))
    state.allocate_moments({"optim.w.step": (), "optim.w.exp_avg": (3, 4), "optim.w.exp_avg_sq": (3, 4)})
    dtypes = {name: moment.dtype for name, moment in state.moments().items()}
    bf16 = torch.bfloat16
    assert dtypes == {"optim.w.step": torch.float32, "optim.w.exp_avg": bf16, "optim.w.exp_avg_sq": bf16}
