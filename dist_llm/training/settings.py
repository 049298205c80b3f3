"""Read a YAML file into the resolved config of a run.

This module does not import torch, so config errors appear at once.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dist_llm.config.check import check
from dist_llm.config.check_data import list_sources
from dist_llm.config.compare import get_function_keys, merge_model_keys
from dist_llm.config.derive import resolve_config
from dist_llm.config.describe import MODEL_FROM
from dist_llm.config.load import MergedModelSection, Violation, load_config, raise_violations
from dist_llm.config.objective_sections import MaskedSpec
from dist_llm.config.schema import Config
from dist_llm.data.mirror import localize_corpus
from dist_llm.data.shard import CorpusManifest
from dist_llm.errors import DataError, UserError
from dist_llm.launch.world import read_world
from dist_llm.objectives.objective_vocabulary import ObjectiveVocabulary
from dist_llm.text.tokenizer import Tokenizer


def read_vocabulary(config: Config, directory: Path) -> ObjectiveVocabulary:
    """Return the vocabulary of the objective of the config. `directory` contains the tokenizer."""
    components = config.objective.components
    needs_words = any(isinstance(spec, MaskedSpec) and spec.whole_words for spec in components)
    return Tokenizer.load(directory).build_objective_vocabulary(needs_words)


def read_model_section(section: dict[str, Any], allowed: object) -> MergedModelSection:
    """Merge a raw `model` section onto the model section of the checkpoint that its key `from` names."""
    from dist_llm.checkpoint.compatibility import read_config  # imports torch, so only if needed
    from dist_llm.checkpoint.find_checkpoint import resolve_checkpoint

    checkpoint, own_keys = section[MODEL_FROM], {name: value for name, value in section.items() if name != MODEL_FROM}
    # After an error, a placeholder model lets `read_config` check the other sections.
    placeholder = {"d_model": 2, "n_layers": 1, "n_heads": 1, **own_keys}
    if not isinstance(checkpoint, str) or not checkpoint:
        violation = Violation((f"model.{MODEL_FROM}",), f"must be a checkpoint or a run, found {checkpoint!r}")
        return MergedModelSection(placeholder, [violation])
    try:
        model = read_config(resolve_checkpoint(checkpoint)).model
    except (UserError, OSError) as error:
        return MergedModelSection(placeholder, [Violation((f"model.{MODEL_FROM}",), str(error))])
    saved = model.model_dump()
    if get_function_keys(model)["d_ff"] is None:
        saved["d_ff"] = None  # all layers have experts, and a config may not set a key without effect
    return merge_model_keys(own_keys, saved, checkpoint, allowed)


def read_config(source: Path | Mapping[str, Any] | None, overrides: Sequence[str], world_size: int) -> Config:
    """Load the config, check it against the corpus and the world size, and resolve it.

    Raises one ConfigError with all violations.

    A schedule.decay_steps of null stays null. `learning_rate_plan.py:plan_learning_rate` derives the value from the
    checkpoint.
    """
    config, violations = load_config(source, overrides, read_model_section, log_outdated=read_world().is_main)
    if config is None:
        raise_violations(violations)
        raise AssertionError("no config and no violation")
    manifest: CorpusManifest | None = None
    for source_index, data_source in enumerate(list_sources(config.data)):
        if not data_source.path:
            continue  # `check` reports the missing path
        try:
            manifest = CorpusManifest.load(localize_corpus(data_source.path, config.data.cache))
        except DataError as error:
            key = f"data.sources.{source_index}.path" if data_source.name else "data.path"
            violations.append(Violation((key,), str(error)))
    # A violation of a rule across keys is left out if one of its keys is invalid anyway.
    invalid_keys = {key for violation in violations for key in violation.keys}
    corpus_vocab_size = manifest.vocab_size if manifest else 0
    violations += [
        violation
        for violation in check(config, world_size, corpus_vocab_size)
        if invalid_keys.isdisjoint(violation.keys)
    ]
    raise_violations(violations)
    resolved = resolve_config(config, world_size, corpus_vocab_size)
    if config.optim.groups:
        from dist_llm.models.build_model import build_param_specs  # imports torch, so only if needed
        from dist_llm.optim.param_groups import find_group_violations

        raise_violations(list(find_group_violations(resolved.optim, build_param_specs(resolved.model))))
    return resolved.model_copy(update={"schedule": config.schedule})
