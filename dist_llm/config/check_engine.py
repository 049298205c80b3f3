"""What cannot be under an engine of others."""

from collections.abc import Iterator
from importlib.util import find_spec

from dist_llm.config.deepspeed import check_deepspeed
from dist_llm.config.load import Violation
from dist_llm.config.schema import AccelerateConfig, Config, DeepSpeedConfig

FSDP_KEYS = {"reshard": "default", "reduce_each_microbatch": False, "cpu_offload": False, "activations_gib": 0.0}


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
    yield from check_axes(config)
    for key, plain in FSDP_KEYS.items():
        if getattr(config.parallel, key) != plain:
            yield Violation(
                (f"parallel.{key}", "engine"),
                f"is of engine: native; remove it (see {engine}.* for what there is)",
            )
    for key, own in (("name", "muon"), ("moments", "bf16")):
        if getattr(config.optim, key) == own:
            yield Violation((f"optim.{key}", "engine"), f"{own} is of engine: native; set another, or engine so")
    if config.precision == "fp16":
        yield Violation(
            ("precision", "engine"), f"fp16 is not supported under engine: {engine}; set bf16, or engine to native"
        )
    if config.uses_deepspeed:
        yield from check_deepspeed(config, max(1, ranks // config.parallel.pp))
        yield from _check_pipeline(config)


def check_axes(config: Config) -> Iterator[Violation]:
    """The layouts that an engine of others has."""
    engine = config.engine
    known = {"native": (), "deepspeed": ("dp_replicate", "cp", "tp"), "accelerate": ("dp_replicate", "cp", "tp", "pp")}
    for axis in known[engine]:
        if (size := getattr(config.parallel, axis)) > 1:
            others = "data or pipeline" if engine == "deepspeed" else "data"
            yield Violation(
                (f"parallel.{axis}", "engine"),
                f"{size} under engine: {engine}, whose ranks are {others} parallel; set it to 1, or engine to native",
            )


def _check_pipeline(config: Config) -> Iterator[Violation]:
    """DeepSpeed's pipeline hands on one tensor from stage to stage, and works with ZeRO 1 alone."""
    parallel, model, data = config.parallel, config.model, config.data
    if parallel.pp == 1:
        return
    if config.deepspeed.stage != 1:
        yield Violation(
            ("deepspeed.stage", "parallel.pp"),
            f"stage {config.deepspeed.stage} with a pipeline: it works with stage 1 alone (at 0 DeepSpeed clips by the "
            "norm of one stage); set 1",
        )
    plain: tuple[tuple[str, bool, str], ...] = (
        ("parallel.pp_schedule", parallel.pp_schedule == "1f1b", "1f1b"),
        ("model.architecture", model.architecture == "decoder", "decoder"),
        ("model.tie_embeddings", not model.tie_embeddings, "false"),
        ("model.stochastic_depth", not model.stochastic_depth, "0"),
        ("objective.name", all(each.name == "causal" for each in config.objective.components), "causal"),
        ("data.windows", data.windows == "stream", "stream"),
        ("data.document_mask", not data.document_mask, "false"),
        ("compile", not config.compile, "false"),
    )
    for key, holds, only in plain:
        if not holds:
            yield Violation(
                (key, "parallel.pp", "engine"),
                f"DeepSpeed's pipeline takes {only} alone; set it so, or engine to native",
            )
