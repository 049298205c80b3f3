"""Convert a config to the JSON of DeepSpeed, and check the JSON of a user (`deepspeed.config`) against the config.

This module does not import torch, because the config is checked before torch is imported.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_llm.config.load import Violation
from dist_llm.config.schema import UnresolvedConfig

AUTO_VALUE = "auto"  # in JSON files written for other trainers: use the value of the config
DEFAULTS: dict[str, Any] = {  # the JSON of a user may override these values
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,  # DeepSpeed's own CPU AdamW needs a compiler
    "steps_per_print": None,
}
# Sections and keys that a user may set: they change how a step is executed, but not its result or its tensor layout.
ALLOWED_KEYS = (
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
TIMER_KEYS = ("wall_clock_breakdown", "flops_profiler.enabled")  # the pipeline of DeepSpeed does not support them


@dataclass(frozen=True)
class ConfigValue:
    """A value for DeepSpeed, and the config key that it comes from."""

    value: Any
    key: str


def build_deepspeed_json(config: UnresolvedConfig, num_data_ranks: int) -> dict[str, Any]:
    """Return the JSON for `deepspeed.initialize`, from a checked and resolved config."""
    user_values = {key: value for key, value in _flatten(_read_json(config)) if not key.startswith("optimizer.")}
    config_values = {
        key: config_value.value
        for key, config_value in _get_config_values(config, num_data_ranks).items()
        if not key.startswith("optimizer.")
    }
    fixed: dict[str, Any] = {}
    if config.precision == "bf16":
        fixed["communication_data_type"] = "fp32"
        if config.deepspeed.stage > 1:
            fixed["data_types.grad_accum_dtype"] = "fp32"
    return _unflatten({**DEFAULTS, **fixed, **user_values, **config_values})


def check_deepspeed(config: UnresolvedConfig, num_data_ranks: int) -> Iterator[Violation]:
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
    yield from _check_user_json(config, num_data_ranks)


def _check_user_json(config: UnresolvedConfig, num_data_ranks: int) -> Iterator[Violation]:
    """Yield violations where the JSON of the user contradicts the config."""
    try:
        user_values = dict(_flatten(_read_json(config)))
    except (OSError, ValueError) as error:
        yield Violation(("deepspeed.config",), f"{config.deepspeed.config} cannot be read as JSON: {error}")
        return
    config_values, file_name = _get_config_values(config, num_data_ranks), config.deepspeed.config
    for key, value in user_values.items():
        config_value = config_values.get(key)
        is_allowed = any(key == allowed or key.startswith(allowed + ".") for allowed in ALLOWED_KEYS)
        if key.startswith("optimizer.") and config_value is None:
            yield Violation(("deepspeed.config",), f"{file_name}: remove {key}: the optimizer is configured by optim.*")
        elif key == "scheduler" or key.startswith("scheduler."):
            yield Violation(("deepspeed.config",), f"{file_name}: remove {key}: the learning rate is set by schedule.*")
        elif config_value is not None and value != AUTO_VALUE and not _is_equal(value, config_value.value):
            yield Violation(
                ("deepspeed.config", config_value.key),
                f"{file_name} sets {key}: {json.dumps(value)}, but {config_value.key} makes it "
                f'{json.dumps(config_value.value)}; change one of them, or set {key} to "auto"',
            )
        elif config_value is None and not is_allowed:
            yield Violation(
                ("deepspeed.config",),
                f"{file_name}: remove {key}: it is unknown, or changes the result of a step or the layout of its "
                "tensors",
            )
        elif key in TIMER_KEYS and value and config.parallel.pp > 1:
            yield Violation(
                ("deepspeed.config", "parallel.pp"), f"{file_name}: remove {key}: pipelines do not support it"
            )


def _get_config_values(config: UnresolvedConfig, num_data_ranks: int) -> dict[str, ConfigValue]:
    """Return all values of DeepSpeed that our config decides, by dotted key of the JSON of DeepSpeed."""
    data, optim, zero = config.data, config.optim, config.deepspeed
    micro_batch = data.micro_batch or max(1, data.global_batch // num_data_ranks)
    num_microbatches = max(1, data.global_batch // (num_data_ranks * micro_batch))
    values = {
        "train_batch_size": ConfigValue(data.global_batch, "data.global_batch"),
        "train_micro_batch_size_per_gpu": ConfigValue(micro_batch, "data.micro_batch"),
        "gradient_accumulation_steps": ConfigValue(num_microbatches, "data.micro_batch"),
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
    values["zero_optimization.offload_optimizer.device"] = ConfigValue(
        zero.offload_optimizer, "deepspeed.offload_optimizer"
    )
    values["zero_optimization.offload_param.device"] = ConfigValue(zero.offload_params, "deepspeed.offload_params")
    return values


def _read_json(config: UnresolvedConfig) -> dict[str, Any]:
    """Read the JSON of the user. Raises OSError if the file cannot be read, ValueError if it is not a JSON object."""
    if not config.deepspeed.config:
        return {}
    content = json.loads(Path(config.deepspeed.config).read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError("it is not a JSON object")
    return content


def _flatten(nested: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) for each value of a nested mapping."""
    for key, value in nested.items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return the nested dict of a mapping with dotted keys."""
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        *sections, name = key.split(".")
        node = nested
        for section in sections:
            node = node.setdefault(section, {})
        node[name] = value
    return nested


def _is_equal(user_value: Any, config_value: Any) -> bool:
    """Return whether two values are equal. 1 equals 1.0, but not true."""
    if isinstance(user_value, bool) or isinstance(config_value, bool):
        return user_value is config_value
    if isinstance(user_value, int | float) and isinstance(config_value, int | float):
        return float(user_value) == float(config_value)
    return bool(user_value == config_value)
