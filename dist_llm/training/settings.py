"""Read a YAML file into the resolved config of a run. Imports no torch, so that config errors appear at once."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dist_llm.config.check import check
from dist_llm.config.check_data import sources_of
from dist_llm.config.compare import merge_model
from dist_llm.config.derive import resolve
from dist_llm.config.describe import FROM
from dist_llm.config.load import Violation, load_config, refuse
from dist_llm.config.objective_sections import MaskedSpec
from dist_llm.config.schema import Config
from dist_llm.data.mirror import localize_corpus
from dist_llm.data.shard import Manifest
from dist_llm.errors import DataError, UserError
from dist_llm.objectives.objective_vocabulary import ObjectiveVocabulary
from dist_llm.text.tokenizer import Tokenizer


def read_vocabulary(config: Config, directory: Path) -> ObjectiveVocabulary:
    """Return the token ids of the config's objective. `directory` has the tokenizer."""
    with_words = any(isinstance(each, MaskedSpec) and each.whole_words for each in config.objective.components)
    return Tokenizer.load(directory).build_objective_vocabulary(with_words)


def read_model(own: dict[str, Any], allowed: object) -> tuple[dict[str, Any], list[Violation]]:
    """Return (the raw model section, violations) of a config whose `model` has the key `from`."""
    from dist_llm.checkpoint.compatibility import read_config  # imports torch, so only if needed
    from dist_llm.checkpoint.store import resolve_checkpoint

    checkpoint, own = own[FROM], {name: value for name, value in own.items() if name != FROM}
    nothing = {"d_model": 2, "n_layers": 1, "n_heads": 1, **own}  # so that the other sections can be checked
    if not isinstance(checkpoint, str) or not checkpoint:
        return nothing, [Violation((f"model.{FROM}",), f"must be a checkpoint or a run, found {checkpoint!r}")]
    try:
        saved = read_config(resolve_checkpoint(checkpoint)).model.model_dump()
    except (UserError, OSError) as error:
        return nothing, [Violation((f"model.{FROM}",), str(error))]
    return merge_model(own, saved, checkpoint, allowed)


def read_config(source: Path | Mapping[str, Any] | None, overrides: Sequence[str], world_size: int) -> Config:
    """Load the config, check it against the corpus and the world, and resolve. Raises one ConfigError with all errors.

    A schedule.decay_steps of 0 stays 0; `dist_llm/training/rate.py:plan_rate` derives it from the checkpoint.
    """
    config, violations = load_config(source, overrides, read_model)
    if config is None:
        refuse(violations)
        raise AssertionError("no config and no violation")
    manifest: Manifest | None = None
    for number, data_source in enumerate(sources_of(config.data)):
        if not data_source.path:
            continue  # `check` reports the missing path
        try:
            manifest = Manifest.load(localize_corpus(data_source.path, config.data.cache))
        except DataError as error:
            key = f"data.sources.{number}.path" if data_source.name else "data.path"
            violations.append(Violation((key,), str(error)))
        # A violation that involves a key already known to be invalid would only repeat it.
    wrong = {key for violation in violations for key in violation.keys}
    size = manifest.vocab_size if manifest else 0
    violations += [v for v in check(config, world_size, size) if wrong.isdisjoint(v.keys)]
    refuse(violations)
    return resolve(config, world_size, size).model_copy(update={"schedule": config.schedule})
