"""What cannot be under an engine of others."""

from collections.abc import Iterator
from importlib.util import find_spec

from dist_llm.config.deepspeed import check_deepspeed
from dist_llm.config.load import Violation
from dist_llm.config.schema import AccelerateConfig, Config, DeepSpeedConfig

FSDP_KEYS = {"reshard": "default", "reduce_each_microbatch": False, "cpu_offload": False}


def check_engine(config: Config, ranks: int) -> Iterator[Violation]:
    """Broken rules of `engine` and of its section."""
    engine = config.engine
    if not config.uses_deepspeed and config.deepspeed != DeepSpeedConfig():
        yield Violation(("deepspeed", "engine"), "is of engine: deepspeed alone; remove it, or set engine so")
    if engine != "accelerate" and config.accelerate != AccelerateConfig():
        yield Violation(("accelerate", "engine"), "is of engine: accelerate alone; remove it, or set engine so")
    if engine == "native":
        return
    for needed in {engine, "deepspeed" if config.uses_deepspeed else engine}:
        if find_spec(needed) is None:
            yield Violation(("engine",), f"{needed} is not installed; pip install 'dist-llm[{needed}]'")
    for axis in ("dp_replicate", "cp", "tp", "pp"):
        if (size := getattr(config.parallel, axis)) > 1:
            yield Violation(
                (f"parallel.{axis}", "engine"),
                f"{size} under engine: {engine}, where all ranks are data parallel; set it to 1, or engine to native",
            )
    for key, plain in FSDP_KEYS.items():
        if getattr(config.parallel, key) != plain:
            yield Violation(
                (f"parallel.{key}", "engine"),
                f"is of engine: native; remove it (see {engine}.* for what there is)",
            )
    if config.precision == "fp16":
        yield Violation(
            ("precision", "engine"), f"fp16 is not supported under engine: {engine}; set bf16, or engine to native"
        )
    if config.uses_deepspeed:
        yield from check_deepspeed(config, ranks)
