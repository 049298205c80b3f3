"""Every layout computes the steps of one process with parameter groups, and leaves frozen parameters unchanged."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dist_llm.optim.param_groups import is_frozen
from tests.laws.law import assert_close, assert_matches_one_process, make_config, trace_one_process
from tests.laws.layouts import ADAMW, CLIPPED_SGD, MUON, Layout, index_by_name
from tests.laws.test_reshape import run_two_steps
from tests.laws.worlds import WorldError, get_world

# Frozen: the embedding, the attention of one layer, all norms of the blocks. Other rates, and another weight decay.
GROUPS: list[dict[str, Any]] = [
    {"pattern": "embed.*", "freeze": True},
    {"pattern": "blocks.1.attention.*", "freeze": True},
    {"pattern": "blocks.*.norm_*", "freeze": True},
    {"pattern": "blocks.[23].attention.*", "lr_mult": 0.25, "weight_decay_mult": 0.0},
    {"pattern": "blocks.*.feedforward.*", "lr_mult": 4.0, "weight_decay_mult": 2.0},
]
OPTIMIZERS = {"sgd": CLIPPED_SGD | {"momentum": 0.5, "weight_decay": 0.1}, "adamw": ADAMW, "muon": MUON}
LAYOUTS = index_by_name(
    Layout(ranks=4, parallel={"dp_shard": 2, "tp": 2}, micro_batch=4),
    Layout(ranks=4, parallel={"pp": 2, "cp": 2}, micro_batch=6),
    Layout(ranks=4, parallel={"dp_replicate": 2, "dp_shard": 2}),
    Layout(ranks=2, parallel={"tp": 2, "sequence_parallel": False}),
    Layout(ranks=2, parallel={"dp_shard": 2, "cpu_offload": True}, micro_batch=4),
    Layout(ranks=2, parallel={"pp": 2, "pp_schedule": "interleaved_1f1b"}, micro_batch=6),
    Layout(ranks=2, parallel={"tp": 2}, model="tied"),
    Layout(ranks=2, parallel={"cp": 2}, model="bounded"),
    Layout(ranks=2, parallel={"dp_shard": 2, "recompute": "full"}),
)
# All layers of a pipeline stage are frozen.
FROZEN_STAGES = {
    "first": [{"pattern": "embed.*", "freeze": True}, {"pattern": "blocks.[012].*", "freeze": True}],
    "last": [{"pattern": "head.*", "freeze": True}, {"pattern": "blocks.[123].*", "freeze": True}],
}
FAST = {("dp_shard2_tp2_micro4_llama", "adamw"), ("pp2_cp2_micro6_llama", "muon")}


def make_optim(name: str) -> dict[str, Any]:
    return {**OPTIMIZERS[name], "groups": GROUPS}


@pytest.mark.parametrize(
    ("layout", "optimizer"),
    [
        pytest.param(layout, name, marks=[] if (layout_name, name) in FAST else pytest.mark.slow)
        for layout_name, layout in LAYOUTS.items()
        for name in OPTIMIZERS
        if not (name == "muon" and "cpu_offload" in layout.parallel)
    ],
    ids=str,
)
def test_a_layout_computes_the_steps_of_one_process_with_parameter_groups(layout: Layout, optimizer: str) -> None:
    assert_matches_one_process(layout, optim=make_optim(optimizer), steps=3)


@pytest.mark.parametrize("schedule", ["1f1b", pytest.param("interleaved_1f1b", marks=pytest.mark.slow)])
@pytest.mark.parametrize("stage", FROZEN_STAGES)
def test_a_pipeline_stage_may_be_frozen(stage: str, schedule: str) -> None:
    optim = {**ADAMW, "groups": FROZEN_STAGES[stage]}
    assert_matches_one_process(
        Layout(ranks=2, parallel={"pp": 2, "pp_schedule": schedule, "pp_split": "count"}, micro_batch=6),
        optim=optim,
        steps=2,
    )


@pytest.mark.parametrize(
    ("bug", "optimizer"),
    [
        ("parameter_groups_ignore_their_learning_rate", "adamw"),
        ("tensor_parallel_parameters_are_not_frozen", "adamw"),
        ("matrices_are_orthogonalized_in_the_order_of_the_groups", "muon"),
    ],
)
def test_a_planted_bug_in_parameter_groups_is_detected(bug: str, optimizer: str) -> None:
    # gloo refuses the shards of another matrix if their sizes differ.
    with pytest.raises((AssertionError, WorldError), match=r"off by|gradients|LengthPerRank"):
        assert_matches_one_process(Layout(ranks=2, parallel={"tp": 2}), optim=make_optim(optimizer), steps=3, bug=bug)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_frozen_parameters_keep_their_bits_and_have_no_gradients(optimizer: str) -> None:
    config = make_config(ranks=1, model={}, optim=make_optim(optimizer))
    trace = trace_one_process(config, steps=3)
    untrained = trace_one_process(make_config(ranks=1, model={}, optim={**CLIPPED_SGD, "lr": 1e-30}), steps=1)
    for name, initial in untrained.parameters[0].items():
        is_unchanged = torch.equal(trace.parameters[-1][name], initial)
        assert is_unchanged == (name not in trace.gradients[0]) == is_frozen(config.optim, name), name
    squares = [gradient.square().sum() for gradient in trace.gradients[0].values()]
    assert trace.grad_norms[0] == pytest.approx(float(torch.stack(squares).sum().sqrt()), rel=1e-6)


@pytest.mark.parametrize("parallel", [{"tp": 2}, pytest.param({"pp": 2}, marks=pytest.mark.slow)], ids=str)
def test_a_run_with_groups_resumes_in_another_layout(parallel: dict[str, Any], tmp_path: Path) -> None:
    optim, data = {**make_optim("adamw"), "lr": 1e-2}, {"micro_batch": 6}
    one_process = make_config(ranks=1, model={}, optim=optim, data=data)
    first_losses, first_state = run_two_steps(one_process, tmp_path, 0)
    assert all(
        (f"optim.{name}.exp_avg" in first_state) != is_frozen(one_process.optim, name)
        for name in (key.removeprefix("model.") for key in first_state if key.startswith("model."))
    )
    results = get_world(2).run(
        run_two_steps, make_config(ranks=2, model={}, optim=optim, data=data, parallel=parallel), tmp_path, 2
    )
    expected = trace_one_process(make_config(ranks=1, model={}, optim=optim), steps=4)
    assert first_losses + results[0][0] == pytest.approx(expected.losses, rel=1e-5)
    state = {name: value for _, tensors in results for name, value in tensors.items()}
    for name, value in expected.parameters[-1].items():
        assert_close(name, state[f"model.{name}"], value, tolerance=2e-5, noise=1e-6)


@pytest.mark.parametrize("is_frozen_first", [True, False])
def test_a_resume_may_freeze_and_unfreeze(is_frozen_first: bool, tmp_path: Path) -> None:
    """Moments of newly frozen parameters are dropped. Those of newly trained parameters start from zero."""
    frozen = make_config(ranks=1, model={}, optim={**ADAMW, "groups": GROUPS[:1]})
    trained = make_config(ranks=1, model={}, optim=ADAMW)
    configs = (frozen, trained) if is_frozen_first else (trained, frozen)
    for first_step, config in zip((0, 2), configs, strict=True):
        _, state = run_two_steps(config, tmp_path, first_step)
    moment = "optim.embed.tokens.weight.step"
    assert (moment in state) == is_frozen_first
    if is_frozen_first:
        assert (state[moment], state["optim.head.out.weight.step"]) == (2, 4)


@pytest.mark.parametrize(
    "layout",
    [
        Layout(ranks=4, parallel={"dp_shard": 2, "tp": 2}, model="completep", micro_batch=4),
        Layout(ranks=2, parallel={"pp": 2}, model="completep", micro_batch=6),
        pytest.param(Layout(ranks=2, parallel={"cp": 2}, model="completep"), marks=pytest.mark.slow),
        pytest.param(
            Layout(ranks=2, parallel={"tp": 2, "sequence_parallel": False}, model="completep", micro_batch=4),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            Layout(ranks=2, parallel={"pp": 2, "pp_schedule": "zbv"}, model="completep", micro_batch=6),
            marks=pytest.mark.slow,
        ),
        pytest.param(Layout(ranks=2, parallel={"dp_replicate": 2}, model="completep"), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_layout_computes_the_steps_of_one_process_with_completep(layout: Layout) -> None:
    assert_matches_one_process(layout, optim=ADAMW, steps=3)


def test_unscaled_learning_rates_of_completep_are_detected() -> None:
    bug = "parameter_groups_ignore_their_learning_rate"
    with pytest.raises(AssertionError, match="off by"):
        assert_matches_one_process(
            Layout(ranks=2, parallel={"tp": 2}, model="completep"), optim=ADAMW, steps=3, bug=bug
        )
