"""The callbacks and evaluators that a user passes to `dist_llm.train`."""

from collections.abc import Sequence
from dataclasses import dataclass

from dist_llm.errors import ConfigError
from dist_llm.training.callback import Callback
from dist_llm.training.evaluator import Evaluator
from dist_llm.training.metric_names import check_metric_names


@dataclass(frozen=True)
class Extensions:
    """Callbacks and evaluators, which the trainer calls after its own, in this order."""

    callbacks: Sequence[Callback] = ()
    evaluators: Sequence[Evaluator] = ()

    def check(self) -> None:
        """Raise ConfigError for an object that is no callback or evaluator, or for a metric name with two owners."""
        for callback in self.callbacks:
            _check_is_instance("callbacks", callback)
            if not isinstance(callback, Callback):
                raise ConfigError(
                    f"callbacks: {type(callback).__name__} is no subclass of dist_llm.training.callback.Callback"
                )
        for evaluator in self.evaluators:
            _check_is_instance("evaluators", evaluator)
            if not callable(getattr(evaluator, "evaluate", None)):
                raise ConfigError(f"evaluators: {type(evaluator).__name__} has no method evaluate(state)")
        owners: list[tuple[str, Sequence[str]]] = []
        extensions = {id(extension): extension for extension in (*self.callbacks, *self.evaluators)}  # may be both
        for extension in extensions.values():
            label, names = type(extension).__name__, getattr(extension, "metric_names", None)
            if names is None or isinstance(names, str):
                raise ConfigError(f"{label}: metric_names must be a tuple of metric names, found {names!r}")
            owners.append((label, names))
        check_metric_names(owners)


NO_EXTENSIONS = Extensions()


def _check_is_instance(argument: str, extension: object) -> None:
    if isinstance(extension, type):
        raise ConfigError(
            f"{argument}: {extension.__name__} is a class; pass an instance, such as {extension.__name__}()"
        )
