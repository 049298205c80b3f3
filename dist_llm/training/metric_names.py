"""Names of metrics: each name in metrics.jsonl has one writer.

Callbacks and evaluators declare the names of their metrics (`metric_names`). So a conflict is an error before training,
and not after the first evaluation.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dist_llm.errors import ConfigError, UserError
from dist_llm.observe.tensorboard import NON_SCALARS

# Names that the trainer uses in some runs. A name that ends with * stands for all names that begin so.
TRAINER_METRICS = (
    *("step", "loss", "cross_entropy", "z_loss", "label_smoothing", "grad_norm", "lr", "tokens", "data_wait_seconds"),
    *("tokens_per_second", "step_seconds", "mfu", "peak_memory_bytes", "loss_*", "tokens_*", "event", "busy_seconds"),
    *("balance_loss", "router_z_loss", "router_entropy", "expert_load_max_over_mean", "idle_experts", "expert_load"),
    *("heldout_loss", "heldout_perplexity", "heldout_bits_per_byte", "heldout_loss_*", "sample"),
)


def check_metric_names(owners: Iterable[tuple[str, Sequence[str]]]) -> None:
    """Raise ConfigError if two owners, or an owner and the trainer, have a name in common. Owner: (label, names)."""
    owner_of_name = dict.fromkeys(TRAINER_METRICS, "the trainer")
    for label, names in owners:
        for name in names:
            if name == "*":
                raise ConfigError(f"{label}: the metric name * stands for all names; give a longer prefix")
            for other_name, other_label in owner_of_name.items():
                if _overlap(name, other_name):
                    raise ConfigError(
                        f"{label}: the metric {name} has the same name as {other_name} of {other_label}; rename it in "
                        "metric_names and in the rows"
                    )
        owner_of_name |= dict.fromkeys(names, label)


def check_row(owner: object, names: Sequence[str], row: Mapping[str, Any], other_keys: Sequence[str] = ()) -> None:
    """Check a row of a callback or an evaluator whose `metric_names` are `names`. `other_keys` may also occur.

    Raises UserError if the row has another name, or a value that is no number.
    """
    label = type(owner).__name__
    for name, value in row.items():
        if name in other_keys:
            continue
        if not any(_overlap(name, pattern) for pattern in names):
            raise UserError(f"{label}: returned the metric {name!r}, which is not in its metric_names; add it there")
        if name not in NON_SCALARS and not isinstance(value, int | float):
            raise UserError(f"{label}: the metric {name} is of type {type(value).__name__}; return an int or a float")


def _overlap(name: str, other_name: str) -> bool:
    """Return whether two names are equal, where a final * matches any ending."""
    return (
        name == other_name
        or (name.endswith("*") and other_name.startswith(name[:-1]))
        or (other_name.endswith("*") and name.startswith(other_name[:-1]))
    )
