"""DeepSpeed and accelerate compute the steps of one native process, and load the checkpoints of other engines."""

import math
from pathlib import Path
from typing import Any

import pytest

from dist_llm.checkpoint.store import CheckpointStore
from dist_llm.config.schema import Config
from tests.laws.engines import (
    BUGS,
    ENGINE_SECTIONS,
    OFFLOADED_ENGINE_SECTIONS,
    assert_engine_matches_one_process,
    make_accelerate_sections,
    make_deepspeed_sections,
    merge_engine_traces,
    run_steps,
    trace_native_process,
    write_json,
)
from tests.laws.law import Trace, assert_traces_match, make_config
from tests.laws.layouts import ADAMW, CLIPPED_SGD, MODELS, SGD
from tests.laws.test_param_groups import GROUPS
from tests.laws.worlds import WorldError, get_world, restart_world

pytestmark = pytest.mark.usefixtures("restart_worlds_afterwards")
CLIPPED_MOMENTUM_SGD: dict[str, Any] = {**CLIPPED_SGD, "momentum": 0.5}
# By default ZeRO stage 3 does not shard small parameters. All parameters of the test models are small.
NO_THRESHOLD = {"zero_optimization": {"stage3_param_persistence_threshold": 0, "sub_group_size": 500}}


def make_engine_config(
    *,
    ranks: int,
    engine: dict[str, Any],
    model: str,
    optim: dict[str, Any],
    micro_batch: int,
    prompt_loss_weight: float = 0.0,
    **sections: Any,
) -> Config:
    """Return the config of a run.

    `engine` are config sections, such as those of ENGINE_SECTIONS; {} is the native engine. `model` is a key of MODELS.
    """
    data = {"micro_batch": micro_batch, "prompt_loss_weight": prompt_loss_weight}
    return make_config(ranks=ranks, model=MODELS[model], optim=optim, data=data, **engine, **sections)


@pytest.mark.parametrize("optim", [CLIPPED_MOMENTUM_SGD, ADAMW], ids=["sgd", "adamw"])
@pytest.mark.parametrize("engine", ENGINE_SECTIONS)
def test_an_engine_computes_three_microbatches_on_two_ranks(engine: str, optim: dict[str, Any]) -> None:
    assert_engine_matches_one_process(
        ranks=2,
        config=make_engine_config(ranks=2, engine=ENGINE_SECTIONS[engine], model="tied", optim=optim, micro_batch=4),
        steps=3,
    )


@pytest.mark.parametrize("engine", ["zero2", "ddp"])
def test_an_engine_weights_the_losses_of_prompts(engine: str) -> None:
    config = make_engine_config(
        ranks=2,
        engine=ENGINE_SECTIONS[engine],
        model="llama",
        optim=CLIPPED_MOMENTUM_SGD,
        micro_batch=4,
        prompt_loss_weight=0.25,
    )
    assert_engine_matches_one_process(ranks=2, config=config, steps=2)


@pytest.mark.parametrize("engine", ["zero0", pytest.param("zero1", marks=pytest.mark.slow), "zero3", "ddp"])
def test_an_engine_computes_parameter_groups(engine: str) -> None:
    """The config refuses frozen parameter groups under DeepSpeed."""
    groups = GROUPS if engine == "ddp" else [group for group in GROUPS if "freeze" not in group]
    config = make_engine_config(
        ranks=2, engine=ENGINE_SECTIONS[engine], model="llama", optim={**ADAMW, "groups": groups}, micro_batch=4
    )
    assert_engine_matches_one_process(ranks=2, config=config, steps=3)


@pytest.mark.parametrize("engine", ["zero0", "zero1", "zero3", "ddp"])
def test_clip_0_disables_clipping(engine: str) -> None:
    assert_engine_matches_one_process(
        ranks=2,
        config=make_engine_config(ranks=2, engine=ENGINE_SECTIONS[engine], model="gpt", optim=SGD, micro_batch=12),
        steps=2,
    )


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_shards_parameters_unevenly_over_three_ranks(stage: int) -> None:
    assert_engine_matches_one_process(
        ranks=3,
        config=make_engine_config(
            ranks=3, engine=make_deepspeed_sections(stage=stage), model="gpt", optim=CLIPPED_MOMENTUM_SGD, micro_batch=4
        ),
        steps=2,
    )


@pytest.mark.parametrize("engine", OFFLOADED_ENGINE_SECTIONS)
def test_offload_to_host_memory_does_not_change_the_step(engine: str) -> None:
    assert_engine_matches_one_process(
        ranks=2,
        config=make_engine_config(
            ranks=2, engine=OFFLOADED_ENGINE_SECTIONS[engine], model="llama", optim=ADAMW, micro_batch=4
        ),
        steps=2,
    )


@pytest.mark.parametrize("model", ["tied", "t5", "bounded"])
def test_zero_3_gathers_small_weights(model: str, tmp_path: Path) -> None:
    engine_config = write_json(tmp_path / "ds.json", NO_THRESHOLD)
    assert_engine_matches_one_process(
        ranks=2,
        config=make_engine_config(
            ranks=2,
            engine=make_deepspeed_sections(stage=3, config=engine_config),
            model=model,
            optim=CLIPPED_MOMENTUM_SGD,
            micro_batch=4,
        ),
        steps=2,
    )


@pytest.mark.parametrize("engine", ["zero1", "zero3", "ddp"])
def test_recomputation_does_not_change_the_step_of_an_engine(engine: str) -> None:
    assert_engine_matches_one_process(
        ranks=2,
        config=make_engine_config(
            ranks=2,
            engine=ENGINE_SECTIONS[engine],
            model="llama",
            optim=CLIPPED_MOMENTUM_SGD,
            micro_batch=12,
            parallel={"recompute": "full"},
        ),
        steps=2,
    )


@pytest.mark.parametrize("engine", ["zero2", "ddp"])
def test_dropout_masks_are_those_of_the_native_engine(engine: str) -> None:
    """The reference is the native engine on two ranks, since one process has other masks."""
    engine_config = make_config(
        ranks=2, model={"dropout": 0.2}, optim=SGD, data={"micro_batch": 6}, **ENGINE_SECTIONS[engine]
    )
    native = engine_config.model_copy(update={"engine": "native", "deepspeed": make_config(ranks=1).deepspeed})
    engine_steps, native_steps = (
        get_world(2).run(run_steps, config, steps=range(2))[0] for config in (engine_config, native)
    )
    assert engine_steps.losses == pytest.approx(native_steps.losses, rel=1e-5)
    assert engine_steps.grad_norms == pytest.approx(native_steps.grad_norms, rel=1e-5)


@pytest.mark.parametrize("engine", ["zero1", "zero3", "ddp"])
def test_an_engine_evaluates_to_the_native_heldout_loss(engine: str) -> None:
    engine_config = make_engine_config(ranks=2, engine=ENGINE_SECTIONS[engine], model="tied", optim=SGD, micro_batch=12)
    native = engine_config.model_copy(update={"engine": "native"})
    engine_loss, native_loss = (
        get_world(2).run(run_steps, config, steps=range(1))[0].heldout_loss for config in (engine_config, native)
    )
    assert engine_loss == pytest.approx(native_loss, rel=1e-5)


@pytest.mark.parametrize("name", BUGS)
@pytest.mark.parametrize("engine", ["zero0", "zero2", "ddp"])
def test_a_planted_bug_is_detected(engine: str, name: str) -> None:
    with pytest.raises(AssertionError, match=r"differ|off by|have the learning rates"):
        assert_engine_matches_one_process(
            ranks=2,
            config=make_engine_config(
                ranks=2, engine=ENGINE_SECTIONS[engine], model="tied", optim=CLIPPED_MOMENTUM_SGD, micro_batch=4
            ),
            steps=3,
            bug=name,
        )


CHAIN = [  # (ranks, config sections of the engine); each entry takes two steps
    (2, {"engine": "native"}),
    (2, make_deepspeed_sections(stage=1)),
    (3, make_deepspeed_sections(stage=3)),
    (1, {"engine": "native"}),
    (2, make_accelerate_sections(plugin="ddp")),
    (3, make_deepspeed_sections(stage=2)),
    (2, make_accelerate_sections(plugin="deepspeed", deepspeed={"stage": 3})),
]


def test_a_run_moves_from_engine_to_engine(tmp_path: Path) -> None:
    """Two steps on each engine of CHAIN equal the steps of one native run; checkpoints have weights and moments."""
    native = make_engine_config(ranks=1, engine={}, model="tied", optim=ADAMW, micro_batch=24)
    expected = trace_native_process(native, steps=2 * len(CHAIN))
    newest: Path | None = None
    for index, (ranks, engine) in enumerate(CHAIN):
        steps = range(2 * index, 2 * index + 2)
        by_rank = get_world(ranks).run(
            run_steps,
            make_engine_config(ranks=ranks, engine=engine, model="tied", optim=ADAMW, micro_batch=24 // ranks),
            steps=steps,
            load=newest,
            save=tmp_path,
        )
        assert by_rank[0].losses == pytest.approx(expected.losses[steps.start : steps.stop], rel=2e-5), (
            f"{engine} {ranks}"
        )
        assert by_rank[0].grad_norms == pytest.approx(expected.grad_norms[steps.start : steps.stop], rel=1e-4), (
            f"{engine} {ranks}"
        )
        newest = CheckpointStore(tmp_path).list_committed()[-1].local_path


@pytest.mark.parametrize("engine", ["zero2", "zero3", "ddp"])
def test_moments_of_another_optimizer_are_refused(engine: str, tmp_path: Path) -> None:
    get_world(1).run(
        run_steps,
        make_engine_config(ranks=1, engine={}, model="tied", optim=CLIPPED_MOMENTUM_SGD, micro_batch=24),
        steps=range(2),
        save=tmp_path,
    )
    (saved,) = CheckpointStore(tmp_path).list_committed()
    message = (
        "optim.name: the checkpoint's optimizer has momentum_buffer of .*, this one needs exp_avg, exp_avg_sq, step"
    )
    with pytest.raises(WorldError, match=message):
        get_world(2).run(
            run_steps,
            make_engine_config(ranks=2, engine=ENGINE_SECTIONS[engine], model="tied", optim=ADAMW, micro_batch=12),
            steps=range(2, 4),
            load=saved.local_path,
            save=tmp_path,
        )


@pytest.mark.parametrize("engine", ["zero1", "zero2", "zero3", "accelerate-zero3", "ddp"])
def test_bf16_is_near_fp32(engine: str) -> None:
    """The loss in bf16 is within 1% of fp32, and the norm within 5%, as with the native engine."""
    engine_config = make_engine_config(
        ranks=2,
        engine=ENGINE_SECTIONS[engine],
        model="tied",
        optim=CLIPPED_MOMENTUM_SGD,
        micro_batch=12,
        precision="bf16",
    )
    native_steps = trace_native_process(engine_config.model_copy(update={"precision": "fp32"}), steps=3)
    engine_steps = get_world(2).run(run_steps, engine_config, steps=range(3))[0]
    assert engine_steps.losses == pytest.approx(native_steps.losses, rel=0.01)
    assert engine_steps.grad_norms == pytest.approx(native_steps.grad_norms, rel=0.05)
    assert engine_steps.losses != native_steps.losses, "bf16 gives the losses of fp32"


def test_bf16_gradients_are_accumulated_in_fp32() -> None:
    """With ZeRO stage 2 the norm of twelve microbatches is near the norm of one microbatch."""
    few_microbatches, many_microbatches = (
        get_world(2).run(
            run_steps,
            make_engine_config(
                ranks=2,
                engine=make_deepspeed_sections(stage=2),
                model="tied",
                optim=CLIPPED_MOMENTUM_SGD,
                micro_batch=micro_batch,
                precision="bf16",
            ),
            steps=range(2),
        )[0]
        for micro_batch in (12, 1)
    )
    assert many_microbatches.grad_norms == pytest.approx(few_microbatches.grad_norms, rel=0.01)


@pytest.mark.parametrize("engine", ["zero0", "zero1", "zero2", "zero3", "ddp", "accelerate-zero2"])
def test_a_step_that_is_not_finite_is_skipped(engine: str) -> None:
    """The guard, or DeepSpeed with sharded gradients, skips the step; later steps are those of a run without it."""
    engine_config = make_engine_config(
        ranks=2, engine=ENGINE_SECTIONS[engine], model="tied", optim=ADAMW, micro_batch=4
    )
    by_rank = get_world(2).run(
        run_steps,
        engine_config,
        steps=(0, 1, 2, 3),
        bug="the_second_step_is_not_finite",
        skip_nonfinite=True,
    )
    expected = run_steps(
        make_engine_config(ranks=1, engine={}, model="tied", optim=ADAMW, micro_batch=24), steps=(0, 2, 3)
    )
    for steps in by_rank:
        assert not math.isfinite(steps.grad_norms.pop(1))
        del steps.losses[1], steps.loss_denominators[1]
    weights = [
        {
            name.removeprefix("model."): shards[0][1]
            for name, shards in shards_by_name.items()
            if name.startswith("model.")
        }
        for shards_by_name in expected.states
    ]
    # Engines do not expose gradients, so the weights fill that field in both traces.
    expected_trace = Trace(
        losses=expected.losses,
        loss_denominators=expected.loss_denominators,
        grad_norms=expected.grad_norms,
        gradients=weights,
        parameters=weights,
    )
    assert_traces_match(merge_engine_traces(by_rank, expected_trace), expected_trace)


@pytest.mark.slow
@pytest.mark.parametrize("optim", [SGD, CLIPPED_MOMENTUM_SGD, ADAMW], ids=["sgd", "clipped", "adamw"])
@pytest.mark.parametrize("engine", ENGINE_SECTIONS | OFFLOADED_ENGINE_SECTIONS)
@pytest.mark.parametrize("ranks", [2, 4])
def test_an_engine_computes_twenty_steps(ranks: int, engine: str, optim: dict[str, Any]) -> None:
    micro_batch = 24 // ranks // 3
    assert_engine_matches_one_process(
        ranks=ranks,
        config=make_engine_config(
            ranks=ranks,
            engine=(ENGINE_SECTIONS | OFFLOADED_ENGINE_SECTIONS)[engine],
            model="llama",
            optim=optim,
            micro_batch=micro_batch,
        ),
        steps=20,
    )


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["zero2", "ddp"])
def test_compiled_blocks_do_not_change_the_step_of_an_engine(engine: str) -> None:
    restart_world(2)
    assert_engine_matches_one_process(
        ranks=2,
        config=make_engine_config(
            ranks=2,
            engine=ENGINE_SECTIONS[engine],
            model="llama",
            optim=CLIPPED_MOMENTUM_SGD,
            micro_batch=12,
            compile=True,
        ),
        steps=3,
    )
