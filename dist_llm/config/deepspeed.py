"""Convert a run's config to DeepSpeed's JSON, and check a user's JSON against the config. Imports no torch."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_llm.config.load import Violation
from dist_llm.config.schema import UnresolvedConfig

AUTO = "auto"  # in JSON files written for other trainers: use the value of the config
DEFAULTS: dict[str, Any] = {  # a user's JSON may override these
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,  # DeepSpeed's own CPU AdamW needs a compiler
    "steps_per_print": None,
}
# Sections and keys that change how a step is executed, but not its result or the layout of its tensors.
FREE = (
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "steps_per_print",
    "communication_data_type",
    "disable_allgather",
    "wall_clock_breakdown",
    "memory_breakdown",
    "dump_state",
    "flops_profiler",
    "comms_logger",
    "tensorboard",
    "wandb",
    "csv_monitor",
    "aio",
    *(
        f"zero_optimization.{key}"
        for key in (
            "allgather_partitions",
            "allgather_bucket_size",
            "overlap_comm",
            "reduce_scatter",
            "reduce_bucket_size",
            "contiguous_gradients",
            "sub_group_size",
            "stage3_max_live_parameters",
            "stage3_max_reuse_distance",
            "stage3_prefetch_bucket_size",
            "stage3_param_persistence_threshold",
            "stage3_model_persistence_threshold",
            "stage3_gather_16bit_weights_on_model_save",
            "use_multi_rank_bucket_allreduce",
            "offload_optimizer.pin_memory",
            "offload_optimizer.buffer_count",
            "offload_param.pin_memory",
            "offload_param.buffer_count",
            "offload_param.buffer_size",
            "offload_param.max_in_cpu",
        )
    ),
)
TIMERS = ("wall_clock_breakdown", "flops_profiler.enabled")  # not supported by DeepSpeed's pipeline


@dataclass(frozen=True)
class ConfigValue:
    """A value for DeepSpeed, and the config key that it comes from."""

    value: Any
    key: str


def deepspeed_json(config: UnresolvedConfig, ranks: int) -> dict[str, Any]:
    """Return the JSON for `deepspeed.initialize`. `ranks`: data-parallel ranks. The config is checked and resolved."""
    user_values = {key: value for key, value in _flat(_read(config)) if not key.startswith("optimizer.")}
    config_values = {
        key: each.value for key, each in _config_values(config, ranks).items() if not key.startswith("optimizer.")
    }
    fixed: dict[str, Any] = {}
    if config.precision == "bf16":
        fixed["communication_data_type"] = "fp32"
        if config.deepspeed.stage > 1:
            fixed["data_types.grad_accum_dtype"] = "fp32"
    return _nested({**DEFAULTS, **fixed, **user_values, **config_values})


def check_deepspeed(config: UnresolvedConfig, ranks: int) -> Iterator[Violation]:
    """Yield violations for settings that DeepSpeed does not support or computes incorrectly."""
    zero = config.deepspeed
    if config.precision == "bf16" and zero.stage == 0:
        yield Violation(
            ("deepspeed.stage", "precision"),
            "at stage 0 with bf16 DeepSpeed takes an extra optimizer step before the first; set stage 1",
        )
    if config.compile and zero.stage == 3:
        yield Violation(("compile", "deepspeed.stage"), "compiled blocks are not supported at stage 3; set it to false")
    if config.parallel.recompute == "selective" and zero.stage == 3:
        yield Violation(
            ("parallel.recompute", "deepspeed.stage"),
            "at stage 3 DeepSpeed gathers weights inside a block, and torch's selective recompute does not save them "
            "for backward; set recompute to full or none, or stage to 2",
        )
    if zero.offload_optimizer != "none" and zero.stage == 0:
        yield Violation(("deepspeed.offload_optimizer", "deepspeed.stage"), "needs a stage of at least 1")
    if zero.offload_params != "none" and zero.stage < 3:
        yield Violation(("deepspeed.offload_params", "deepspeed.stage"), "needs stage 3")
    yield from _contradictions(config, ranks)


def _contradictions(config: UnresolvedConfig, ranks: int) -> Iterator[Violation]:
    """Yield violations where the user's JSON contradicts the config."""
    try:
        user_values = dict(_flat(_read(config)))
    except (OSError, ValueError) as error:
        yield Violation(("deepspeed.config",), f"{config.deepspeed.config} cannot be read as JSON: {error}")
        return
    config_values, name = _config_values(config, ranks), config.deepspeed.config
    for key, value in user_values.items():
        known = config_values.get(key)
        if key.startswith("optimizer.") and known is None:
            yield Violation(("deepspeed.config",), f"{name}: remove {key}: the optimizer is configured by optim.*")
        elif key == "scheduler" or key.startswith("scheduler."):
            yield Violation(("deepspeed.config",), f"{name}: remove {key}: the learning rate is set by schedule.*")
        elif known is not None and value != AUTO and not _equal(value, known.value):
            yield Violation(
                ("deepspeed.config", known.key),
                f"{name} sets {key}: {json.dumps(value)}, but {known.key} makes it {json.dumps(known.value)}; change "
                f'one of them, or set {key} to "auto"',
            )
        elif known is None and not any(key == free or key.startswith(free + ".") for free in FREE):
            yield Violation(
                ("deepspeed.config",),
                f"{name}: remove {key}: it is unknown, or changes the result of a step or the layout of its tensors",
            )
        elif key in TIMERS and value and config.parallel.pp > 1:
            yield Violation(("deepspeed.config", "parallel.pp"), f"{name}: remove {key}: pipelines do not support it")


def _config_values(config: UnresolvedConfig, ranks: int) -> dict[str, ConfigValue]:
    """Return all DeepSpeed values that our config decides, by dotted key of DeepSpeed's JSON."""
    data, optim, zero = config.data, config.optim, config.deepspeed
    micro = data.micro_batch or max(1, data.global_batch // ranks)
    values = {
        "train_batch_size": ConfigValue(data.global_batch, "data.global_batch"),
        "train_micro_batch_size_per_gpu": ConfigValue(micro, "data.micro_batch"),
        "gradient_accumulation_steps": ConfigValue(max(1, data.global_batch // (ranks * micro)), "data.micro_batch"),
        "gradient_clipping": ConfigValue(optim.clip or 0.0, "optim.clip"),
        "zero_optimization.stage": ConfigValue(zero.stage, "deepspeed.stage"),
        "bf16.enabled": ConfigValue(config.precision == "bf16", "precision"),
        "fp16.enabled": ConfigValue(False, "precision"),
        "tensor_parallel.autotp_size": ConfigValue(1, "parallel.tp"),
        "optimizer.type": ConfigValue("SGD" if optim.name == "sgd" else "AdamW", "optim.name"),
        "optimizer.params.lr": ConfigValue(optim.lr, "optim.lr"),
        "optimizer.params.weight_decay": ConfigValue(optim.weight_decay, "optim.weight_decay"),
        "optimizer.params.torch_adam": ConfigValue(True, "optim.name"),
    }
    if optim.name == "sgd":
        values["optimizer.params.momentum"] = ConfigValue(optim.momentum, "optim.momentum")
    else:
        values["optimizer.params.eps"] = ConfigValue(optim.eps, "optim.eps")
        values["optimizer.params.betas"] = ConfigValue([optim.beta1, optim.beta2], "optim.beta1")
    for name, where in (("offload_optimizer", zero.offload_optimizer), ("offload_param", zero.offload_params)):
        key = "deepspeed.offload_params" if name == "offload_param" else f"deepspeed.{name}"
        values[f"zero_optimization.{name}.device"] = ConfigValue(where, key)
    return values


def _read(config: UnresolvedConfig) -> dict[str, Any]:
    """Read the user's JSON. Raises OSError if the file cannot be read, ValueError if it is not a JSON object."""
    if not config.deepspeed.config:
        return {}
    content = json.loads(Path(config.deepspeed.config).read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError("it is not a JSON object")
    return content


def _flat(nested: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in nested.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        *sections, last = key.split(".")
        section_node = nested
        for section in sections:
            section_node = section_node.setdefault(section, {})
        section_node[last] = value
    return nested


def _equal(user_value: Any, config_value: Any) -> bool:
    """Return whether two values are equal. 1 equals 1.0, but not true."""
    if isinstance(user_value, bool) or isinstance(config_value, bool):
        return user_value is config_value
    if isinstance(user_value, int | float) and isinstance(config_value, int | float):
        return float(user_value) == float(config_value)
    return bool(user_value == config_value)
