"""Check the config against the third-party engines."""

from collections.abc import Iterator
from importlib.util import find_spec

from dist_llm.config.deepspeed import check_deepspeed
from dist_llm.config.engine_names import check_engine_name
from dist_llm.config.load import Violation
from dist_llm.config.schema import AccelerateConfig, DeepSpeedConfig, UnresolvedConfig

# Third-party engine -> the axes that the engine does not support.
UNSUPPORTED_AXES = {
    "deepspeed": ("dp_replicate", "cp", "tp", "ep"),
    "accelerate": ("dp_replicate", "cp", "tp", "ep", "pp"),
}
NATIVE_DEFAULTS = {"reshard": "default", "reduce_each_microbatch": False, "cpu_offload": False, "activations_gib": None}


def check_engine(config: UnresolvedConfig, world_size: int) -> Iterator[Violation]:
    """Yield violations of `engine` and of the engine's section."""
    engine = config.engine
    if not config.uses_deepspeed and config.deepspeed != DeepSpeedConfig():
        yield Violation(
            ("deepspeed", "engine"),
            f"only used with engine=deepspeed (now {engine}); remove the section, or set engine=deepspeed",
        )
    if engine != "accelerate" and config.accelerate != AccelerateConfig():
        yield Violation(
            ("accelerate", "engine"),
            f"only used with engine=accelerate (now {engine}); remove the section, or set engine=accelerate",
        )
    yield from check_engine_name(engine)
    if engine in UNSUPPORTED_AXES:
        yield from _check_third_party(config, world_size)


def _check_third_party(config: UnresolvedConfig, world_size: int) -> Iterator[Violation]:
    """Yield violations for DeepSpeed and accelerate. An engine of another package has its own `check_config`."""
    engine = config.engine
    for package in {engine, "deepspeed" if config.uses_deepspeed else engine}:
        if find_spec(package) is None:
            yield Violation(("engine",), f"{package} is not installed; pip install 'dist-llm[{package}]'")
    yield from check_axes(config)
    for key, default in NATIVE_DEFAULTS.items():
        if getattr(config.parallel, key) != default:
            yield Violation(
                (f"parallel.{key}", "engine"),
                f"only used with engine=native (now {engine}); remove it; settings of this engine: {engine}.*",
            )
    for key, native_value in (("name", "muon"), ("moments", "bf16")):
        if getattr(config.optim, key, None) == native_value:
            yield Violation(
                (f"optim.{key}", "engine"),
                f"{native_value} needs engine=native (now {engine}); set another, or engine=native",
            )
    if config.precision == "fp16":
        yield Violation(
            ("precision", "engine"), f"fp16 is not supported under engine: {engine}; set bf16, or engine to native"
        )
    if config.uses_deepspeed:
        yield from check_deepspeed(config, max(1, world_size // config.parallel.pp))
        yield from _check_pipeline(config)


def check_axes(config: UnresolvedConfig) -> Iterator[Violation]:
    """Yield violations for axes that the engine does not support."""
    engine = config.engine
    for axis in UNSUPPORTED_AXES.get(engine, ()):
        if (size := getattr(config.parallel, axis)) > 1:
            supported = "data or pipeline" if engine == "deepspeed" else "data"
            yield Violation(
                (f"parallel.{axis}", "engine"),
                f"engine={engine} supports {supported} parallelism only; set it to 1, or engine=native (now {size})",
            )


def _check_pipeline(config: UnresolvedConfig) -> Iterator[Violation]:
    """Yield violations of DeepSpeed's pipeline: it passes one tensor between stages, and needs ZeRO stage 1."""
    parallel, model, data = config.parallel, config.model, config.data
    if parallel.pp == 1:
        return
    if config.deepspeed.stage != 1:
        yield Violation(
            ("deepspeed.stage", "parallel.pp"),
            f"stage {config.deepspeed.stage} is not supported with a pipeline (at 0 DeepSpeed clips by the gradient "
            "norm of one stage); set 1",
        )
    requirements: tuple[tuple[str, bool, str], ...] = (  # (key, whether its value is supported, the supported value)
        ("parallel.pp_schedule", parallel.pp_schedule == "1f1b", "1f1b"),
        ("model.architecture", model.architecture == "decoder", "decoder"),
        ("model.tie_embeddings", not model.tie_embeddings, "false"),
        ("model.stochastic_depth", not model.stochastic_depth, "0"),
        ("objective.name", all(spec.name == "causal" for spec in config.objective.components), "causal"),
        ("data.windows", data.windows == "stream", "stream"),
        ("data.document_mask", not data.document_mask, "false"),
        ("compile", not config.compile, "false"),
    )
    for key, is_supported, supported_value in requirements:
        if not is_supported:
            yield Violation(
                (key, "parallel.pp", "engine"),
                f"DeepSpeed's pipeline supports only {supported_value}; set this value, or engine to native",
            )
