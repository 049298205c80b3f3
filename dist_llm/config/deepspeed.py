"""A run's config -> DeepSpeed's JSON, and what contradicts it in a JSON of the user's. Imports no torch."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_llm.config.load import Violation
from dist_llm.config.schema import Config

AUTO = "auto"  # in others' JSON: whatever fits
DEFAULTS: dict[str, Any] = {  # what a user's JSON may set otherwise
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,  # its own AdamW on CPUs wants a compiler
    "steps_per_print": None,
}
UNKNOWN = {  # what we could not keep the promises of a checkpoint or a precision with
    "zero_optimization.mics_shard_size": "weights are sharded over all ranks here",
    "zero_optimization.zero_hpz_partition_size": "weights are sharded over all ranks here",
    "torch_autocast.enabled": "precision says what is computed in",
    "amp.enabled": "precision says what is computed in",
    "scheduler": "the rate of each step comes from schedule.*",
}


@dataclass(frozen=True)
class Ours:
    """A value, and the key of our config that it comes from."""

    value: Any
    key: str


def deepspeed_json(config: Config, ranks: int) -> dict[str, Any]:
    """What `deepspeed.initialize` is given for a resolved and checked config on so many data-parallel ranks."""
    theirs = {key: value for key, value in _flat(_read(config)) if not key.startswith("optimizer.")}
    ours = {key: each.value for key, each in _ours(config, ranks).items() if not key.startswith("optimizer.")}
    fixed = {"communication_data_type": "fp32"} if config.precision == "bf16" else {}
    return _nested({**DEFAULTS, **fixed, **theirs, **ours})


def check_deepspeed(config: Config, ranks: int) -> Iterator[Violation]:
    """What DeepSpeed cannot do, or does wrong."""
    zero = config.deepspeed
    if config.precision == "bf16" and zero.stage == 0:
        yield Violation(
            ("deepspeed.stage", "precision"),
            "at stage 0 with bf16 DeepSpeed takes an optimizer step of its own before the first; set stage 1",
        )
    if config.compile and zero.stage == 3:
        yield Violation(("compile", "deepspeed.stage"), "compiled blocks are not supported at stage 3; set it to false")
    if zero.offload_optimizer != "none" and zero.stage == 0:
        yield Violation(("deepspeed.offload_optimizer", "deepspeed.stage"), "needs a stage of at least 1")
    if zero.offload_params != "none" and zero.stage < 3:
        yield Violation(("deepspeed.offload_params", "deepspeed.stage"), "needs stage 3")
    if "nvme" in (zero.offload_optimizer, zero.offload_params):
        yield Violation(
            ("deepspeed.offload_optimizer", "deepspeed.offload_params"),
            "checkpoints of what lies on nvme are not supported yet; set cpu",
        )
    yield from _contradictions(config, ranks)


def _contradictions(config: Config, ranks: int) -> Iterator[Violation]:
    """Between the user's JSON and the config."""
    try:
        theirs = dict(_flat(_read(config)))
    except (OSError, ValueError) as error:
        yield Violation(("deepspeed.config",), f"{config.deepspeed.config} cannot be read as JSON: {error}")
        return
    ours = _ours(config, ranks)
    for key, value in theirs.items():
        for unknown, why in UNKNOWN.items():
            if (key == unknown or key.startswith(unknown + ".")) and value not in (False, 0, 1, -1, AUTO):
                yield Violation(("deepspeed.config",), f"{config.deepspeed.config}: remove {key}: {why}")
        known = ours.get(key)
        if known is None and key.startswith("optimizer."):
            yield Violation(("deepspeed.config",), f"{config.deepspeed.config}: remove {key}: optim.* says it all")
        elif known is not None and value != AUTO and _plain(value) != _plain(known.value):
            yield Violation(
                ("deepspeed.config", known.key),
                f"{config.deepspeed.config} says {key}: {json.dumps(value)}, but {known.key} makes it "
                f'{json.dumps(known.value)}; set one to the other, or {key} to "auto"',
            )


def _ours(config: Config, ranks: int) -> dict[str, Ours]:
    """All that our config decides, by dotted key of DeepSpeed's."""
    data, optim, zero = config.data, config.optim, config.deepspeed
    micro = data.micro_batch or data.global_batch // ranks
    found = {
        "train_batch_size": Ours(data.global_batch, "data.global_batch"),
        "train_micro_batch_size_per_gpu": Ours(micro, "data.micro_batch"),
        "gradient_accumulation_steps": Ours(max(1, data.global_batch // (ranks * micro)), "data.micro_batch"),
        "gradient_clipping": Ours(optim.clip, "optim.clip"),
        "zero_optimization.stage": Ours(zero.stage, "deepspeed.stage"),
        "bf16.enabled": Ours(config.precision == "bf16", "precision"),
        "fp16.enabled": Ours(False, "precision"),
        "tensor_parallel.autotp_size": Ours(1, "parallel.tp"),
        "optimizer.type": Ours({"adamw": "AdamW", "sgd": "SGD"}[optim.name], "optim.name"),
        "optimizer.params.lr": Ours(optim.lr, "optim.lr"),
        "optimizer.params.weight_decay": Ours(optim.weight_decay, "optim.weight_decay"),
        "optimizer.params.eps": Ours(optim.eps, "optim.eps"),
        "optimizer.params.betas": Ours([optim.beta1, optim.beta2], "optim.beta1"),
        "optimizer.params.momentum": Ours(optim.momentum, "optim.momentum"),
        "optimizer.params.torch_adam": Ours(True, "optim.name"),
    }
    for name, where in (("offload_optimizer", zero.offload_optimizer), ("offload_param", zero.offload_params)):
        key = "deepspeed.offload_params" if name == "offload_param" else f"deepspeed.{name}"
        found[f"zero_optimization.{name}.device"] = Ours(where, key)
        if where == "nvme":
            found[f"zero_optimization.{name}.nvme_path"] = Ours(zero.nvme_path, "deepspeed.nvme_path")
    return found


def _read(config: Config) -> dict[str, Any]:
    """The user's JSON. Raises OSError or ValueError where it is none."""
    if not config.deepspeed.config:
        return {}
    found = json.loads(Path(config.deepspeed.config).read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ValueError("it is no object")
    return found


def _flat(nested: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in nested.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in flat.items():
        *sections, last = key.split(".")
        place = found
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    return found


def _plain(value: Any) -> Any:
    """Comparable: a number is a number however it is written."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else value
