"""Check rules of the guard that depend on the engine or the model."""

from collections.abc import Iterator

from dist_llm.config.load import Violation
from dist_llm.config.schema import UnresolvedConfig


def check_guard(config: UnresolvedConfig) -> Iterator[Violation]:
    """Yield violations of the section `guard`."""
    guard = config.guard
    if guard.spike == "skip" and config.uses_deepspeed and config.deepspeed.stage:
        yield Violation(
            ("guard.spike", "deepspeed.stage"),
            "skip: DeepSpeed's partitioned optimizers step before the loss is checked; set rewind, stop or warn",
        )
    if not guard.replay_every:
        return
    requirements = (("engine", config.engine == "native", "native"), ("model.dropout", not config.model.dropout, "0"))
    for key, is_supported, supported_value in requirements:
        if not is_supported:
            yield Violation(
                (key, "guard.replay_every"),
                f"must be {supported_value} for guard.replay_every; set it to {supported_value}, or "
                "guard.replay_every to off",
            )
