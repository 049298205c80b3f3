"""Config of third-party engines. Unsupported and contradictory settings are refused.

The config gives the JSON config of DeepSpeed.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_llm.config import check_engine
from dist_llm.config.check import check
from dist_llm.config.deepspeed import build_deepspeed_json
from dist_llm.config.derive import resolve_config
from dist_llm.config.schema import UnresolvedConfig
from dist_llm.launch.environment import check_accelerate

CPU = torch.device("cpu")


DATA = {"path": "corpus", "seq_len": 8, "global_batch": 12, "micro_batch": 2}


def make_config(**sections: Any) -> UnresolvedConfig:
    """Return an unresolved config with these sections; the others are small defaults."""
    model = {"d_model": 32, "n_layers": 2, "n_heads": 4}
    defaults = {"run": {"dir": "runs/x", "steps": 20}, "model": model, "data": DATA}
    return UnresolvedConfig.model_validate({**defaults, **sections})


def find_problems(world_size: int = 2, **sections: Any) -> str:
    """Return the violations of the config, one a line."""
    return "\n".join(map(str, check(make_config(**sections), world_size, tokenizer_size=300)))


REFUSED = [
    (
        {"engine": "deepspeed", "guard": {"spike": "skip"}},
        "guard.spike: skip: DeepSpeed's partitioned optimizers step before the loss is checked; set rewind",
    ),
    ({"engine": "deepspeed", "guard": {"replay_every": 9}}, "engine: must be native for guard.replay_every"),
    (
        {"engine": "deepspeed", "precision": "fp16"},
        "precision: fp16 is not supported under engine: deepspeed; set bf16",
    ),
    (
        {"engine": "deepspeed", "precision": "bf16", "fp8": True},
        "fp8: true under engine: deepspeed; set it to false, or engine to native",
    ),
    ({"engine": "accelerate", "precision": "bf16", "fp8": True}, "fp8: true under engine: accelerate; set it to false"),
    (
        {"engine": "deepspeed", "precision": "bf16", "deepspeed": {"stage": 0}},
        "deepspeed.stage: at stage 0 with bf16 DeepSpeed takes an extra optimizer step before the first",
    ),
    (
        {"engine": "deepspeed", "parallel": {"tp": 2}},
        "parallel.tp: engine=deepspeed supports data or pipeline parallelism only",
    ),
    ({"engine": "accelerate", "parallel": {"pp": 2}}, "parallel.pp: engine=accelerate supports data parallelism only"),
    (
        {"engine": "deepspeed", "parallel": {"reshard": "never"}},
        "parallel.reshard: only used with engine=native (now deepspeed); remove it",
    ),
    ({"engine": "deepspeed", "deepspeed": {"stage": 3}, "compile": True}, "compile: compiled blocks are not supported"),
    (
        {"engine": "deepspeed", "deepspeed": {"stage": 3}, "parallel": {"recompute": "selective"}},
        "parallel.recompute: at stage 3 DeepSpeed gathers weights inside a block",
    ),
    (
        {
            "engine": "accelerate",
            "accelerate": {"plugin": "deepspeed"},
            "deepspeed": {"stage": 3},
            "parallel": {"recompute": "selective"},
        },
        "parallel.recompute: at stage 3 DeepSpeed gathers weights inside a block",
    ),
    ({"engine": "deepspeed", "deepspeed": {"stage": 0, "offload_optimizer": "cpu"}}, "needs a stage of at least 1"),
    ({"engine": "deepspeed", "deepspeed": {"offload_params": "cpu"}}, "deepspeed.offload_params: needs stage 3"),
    (
        {"engine": "deepspeed", "data": {**DATA, "global_batch": 1, "micro_batch": 0}},
        "1 sequences do not divide into 2",
    ),
    (
        {"engine": "deepspeed", "deepspeed": {"stage": 2}, "parallel": {"pp": 2}},
        "deepspeed.stage: stage 2 is not supported with a pipeline",
    ),
    (
        {
            "engine": "deepspeed",
            "deepspeed": {"stage": 1},
            "parallel": {"pp": 2},
            "data": {**DATA, "document_mask": True},
        },
        "data.document_mask: DeepSpeed's pipeline supports only false",
    ),
    (
        {"engine": "deepspeed", "optim": {"name": "muon"}},
        "optim.name: muon needs engine=native (now deepspeed); set another, or",
    ),
    (
        {"engine": "accelerate", "optim": {"moments": "bf16"}},
        "optim.moments: bf16 needs engine=native (now accelerate)",
    ),
    ({"deepspeed": {"stage": 3}}, "deepspeed: only used with engine=deepspeed (now native)"),
    (
        {"engine": "accelerate", "deepspeed": {"stage": 3}},
        "deepspeed: only used with engine=deepspeed (now accelerate)",
    ),
    ({"accelerate": {"plugin": "fsdp2"}}, "accelerate: only used with engine=accelerate (now native)"),
    ({"engine": "deepspeed", "deepspeed": {"config": "nowhere.json"}}, "nowhere.json cannot be read as JSON: "),
]


@pytest.mark.parametrize(("sections", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_unsupported_settings_are_refused(sections: dict[str, Any], message: str) -> None:
    assert message in find_problems(**sections)


@pytest.mark.parametrize(
    "sections",
    [
        {"engine": "deepspeed"},
        {"engine": "deepspeed", "deepspeed": {"stage": 3, "offload_optimizer": "cpu", "offload_params": "cpu"}},
        {"engine": "accelerate"},
        {"engine": "accelerate", "accelerate": {"plugin": "deepspeed"}, "deepspeed": {"stage": 1}},
        {"engine": "deepspeed", "precision": "bf16", "parallel": {"recompute": "full"}},
    ],
    ids=str,
)
def test_supported_settings_are_accepted(sections: dict[str, Any]) -> None:
    assert not find_problems(**sections)


def test_a_missing_package_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_engine, "find_spec", lambda name: None)
    assert "engine: deepspeed is not installed; pip install 'dist-llm[deepspeed]'" in find_problems(engine="deepspeed")


def find_problems_of_json(content: Any, directory: Path, **sections: Any) -> str:
    """Return the violations of a config that names a DeepSpeed JSON file of this content."""
    (directory / "ds.json").write_text(content if isinstance(content, str) else json.dumps(content))
    deepspeed_section = {"config": str(directory / "ds.json"), **sections.pop("deepspeed", {})}
    return find_problems(engine="deepspeed", deepspeed=deepspeed_section, **sections)


CONTRADICTIONS = [
    ({"gradient_clipping": 0.5}, "sets gradient_clipping: 0.5, but optim.clip makes it 1.0; change one of them"),
    ({"zero_optimization": {"stage": 3}}, "sets zero_optimization.stage: 3, but deepspeed.stage makes it 2"),
    ({"train_micro_batch_size_per_gpu": 6}, "sets train_micro_batch_size_per_gpu: 6, but data.micro_batch makes it 2"),
    ({"gradient_accumulation_steps": 1}, "but data.micro_batch makes it 3"),
    ({"train_batch_size": 24}, "but data.global_batch makes it 12"),
    ({"bf16": {"enabled": True}}, "sets bf16.enabled: true, but precision makes it false"),
    ({"optimizer": {"type": "Lion"}}, 'sets optimizer.type: "Lion", but optim.name makes it "AdamW"'),
    ({"optimizer": {"params": {"lr": 1e-3}}}, "sets optimizer.params.lr: 0.001, but optim.lr makes it 0.0003"),
    (
        {"optimizer": {"params": {"amsgrad": True}}},
        "remove optimizer.params.amsgrad: the optimizer is configured by optim.*",
    ),
    ({"scheduler": {"type": "WarmupLR"}}, "remove scheduler.type: the learning rate is set by schedule.*"),
    *(
        (
            {"zero_optimization": {key: value}},
            f"remove zero_optimization.{key}: it is unknown, or changes the result of a step",
        )
        for key, value in (("mics_shard_size", 4), ("round_robin_gradients", True), ("zero_quantized_weights", True))
    ),
    ({"zero_optimizaton": {"stage": 2}}, "remove zero_optimizaton.stage: it is unknown"),
    ({"zero_optimization": None}, "remove zero_optimization: it is unknown"),
    ({"bf16": True}, "remove bf16: it is unknown"),
    (
        {"torch_autocast": {"enabled": True}},
        "remove torch_autocast.enabled: it is unknown, or changes",
    ),
    ({"amp": {"enabled": True}}, "remove amp.enabled"),
    ({"sparse_gradients": True}, "remove sparse_gradients"),
    ({"gradient_clipping": True}, "sets gradient_clipping: true, but optim.clip makes it 1.0"),
    (
        {"scheduler": {"params": {"warmup_num_steps": 1}}},
        "remove scheduler.params.warmup_num_steps: the learning rate is",
    ),
    ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "but deepspeed.offload_optimizer makes it"),
    ("{", "cannot be read as JSON"),
    ("[]", "cannot be read as JSON: it is not a JSON object"),
]


@pytest.mark.parametrize(("content", "message"), CONTRADICTIONS, ids=[message for _, message in CONTRADICTIONS])
def test_a_contradicting_json_is_refused_with_both_values(content: Any, message: str, tmp_path: Path) -> None:
    assert message in find_problems_of_json(content, tmp_path)


@pytest.mark.parametrize("content", [{"wall_clock_breakdown": True}, {"flops_profiler": {"enabled": True}}], ids=str)
def test_timers_are_refused_only_in_pipelines(content: Any, tmp_path: Path) -> None:
    assert not find_problems_of_json(content, tmp_path)
    pipeline = {"deepspeed": {"stage": 1}, "parallel": {"pp": 2}}
    assert "pipelines do not support it" in find_problems_of_json(content, tmp_path, **pipeline)


def test_a_json_that_does_not_contradict_the_config_is_accepted(tmp_path: Path) -> None:
    content = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 3e-4, "betas": [0.9, 0.95], "weight_decay": "auto"}},
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 1000},
        "fp16": {"enabled": "auto"},
        "wall_clock_breakdown": True,
    }
    assert not find_problems_of_json(content, tmp_path)
    config = make_config(engine="deepspeed", deepspeed={"config": str(tmp_path / "ds.json")})
    deepspeed_config = build_deepspeed_json(resolve_config(config, world_size=2, tokenizer_size=300), num_data_ranks=2)
    assert deepspeed_config["train_batch_size"] == 12
    assert deepspeed_config["gradient_accumulation_steps"] == 3
    assert deepspeed_config["zero_optimization"]["stage"] == 2
    assert deepspeed_config["zero_optimization"]["reduce_bucket_size"] == 1000
    assert deepspeed_config["wall_clock_breakdown"] is True
    assert "optimizer" not in deepspeed_config, "the optimizer is configured twice: we pass it as an object"
    assert deepspeed_config["fp16"] == {"enabled": False}


def test_bf16_gradients_are_reduced_in_fp32() -> None:
    config = resolve_config(make_config(engine="deepspeed", precision="bf16"), world_size=2, tokenizer_size=300)
    assert build_deepspeed_json(config, num_data_ranks=2)["communication_data_type"] == "fp32"
    assert build_deepspeed_json(config, num_data_ranks=2)["bf16"] == {"enabled": True}
    assert build_deepspeed_json(config, num_data_ranks=2)["data_types"] == {"grad_accum_dtype": "fp32"}, (
        "stage 2 accumulates in bf16, its default"
    )


CONTRADICTING_VARIABLES = [  # of accelerate launch
    ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "precision: needs ACCELERATE_MIXED_PRECISION=no, but accelerate was"),
    ({"ACCELERATE_USE_DEEPSPEED": "true"}, "accelerate.plugin: needs ACCELERATE_USE_DEEPSPEED=false"),
    ({"ACCELERATE_USE_FSDP": "true"}, "accelerate.plugin: needs ACCELERATE_USE_FSDP=false"),
    ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "data.micro_batch: needs ACCELERATE_GRADIENT_ACCUMULATION"),
]


@pytest.mark.parametrize(
    ("environ", "message"), CONTRADICTING_VARIABLES, ids=[message for _, message in CONTRADICTING_VARIABLES]
)
def test_contradicting_variables_of_accelerate_launch_are_refused(environ: dict[str, str], message: str) -> None:
    config = resolve_config(make_config(engine="accelerate"), world_size=2, tokenizer_size=300)
    assert message in str(next(check_accelerate(config, CPU, environ)))


def test_matching_variables_of_accelerate_launch_are_accepted() -> None:
    config = resolve_config(
        make_config(engine="accelerate", accelerate={"plugin": "deepspeed"}, deepspeed={"stage": 3}),
        world_size=2,
        tokenizer_size=300,
    )
    environ = {
        "ACCELERATE_MIXED_PRECISION": "no",
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",
    }
    assert not list(check_accelerate(config, CPU, environ))


def test_fsdp2_through_accelerate_is_refused_on_cpus() -> None:
    config = resolve_config(
        make_config(engine="accelerate", accelerate={"plugin": "fsdp2"}), world_size=2, tokenizer_size=300
    )
    assert "fsdp2 needs GPUs" in str(next(check_accelerate(config, CPU, {})))
    assert not list(check_accelerate(config, torch.device("cuda"), {}))
