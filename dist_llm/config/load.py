"""Load a config from YAML files and `section.key=value` overrides, and report all violations in one error.

`load_config` returns an UnresolvedConfig, as a user writes it. `load_saved_config` and `parse_saved_config` read the
resolved Config of a run or checkpoint.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from dist_llm.config.describe import MODEL_FROM, describe_keys, type_name
from dist_llm.config.key_suggestions import suggest_keys
from dist_llm.config.schema import Config, UnresolvedConfig
from dist_llm.config.section import MIXTURE, find_tags_with_key, list_outdated_keys, strip_tags, update_outdated_keys
from dist_llm.config.shipped import find_config
from dist_llm.config.yaml_parser import parse_yaml
from dist_llm.errors import CheckpointError, ConfigError

log = logging.getLogger("dist_llm")


@dataclass(frozen=True)
class Violation:
    """A broken rule. `keys` are the dotted keys that the rule involves; the message starts with the first one."""

    keys: tuple[str, ...]
    message: str

    def __str__(self) -> str:
        return f"{self.keys[0]}: {self.message}"


class MergedModelSection(NamedTuple):
    """A `model` section, merged onto that of the checkpoint that its key `from` names."""

    section: dict[str, Any]
    violations: list[Violation]


class LoadedConfig(NamedTuple):
    """A config without its invalid keys, which `violations` name. None: the config is not valid without them."""

    config: UnresolvedConfig | None
    violations: list[Violation]


ModelReader = Callable[[dict[str, Any], object], MergedModelSection]  # (model section, init_allow) -> merged section


def raise_violations(violations: Sequence[Violation]) -> None:
    """Raise one ConfigError that lists all violations, if there are any."""
    if violations:
        lines = "\n".join(f"  {violation}" for violation in violations)
        noun = "1 problem" if len(violations) == 1 else f"{len(violations)} problems"
        raise ConfigError(f"{noun} in the config:\n{lines}\nAll keys: dist-llm train --help-config")


def load_config(
    source: Path | Mapping[str, Any] | None,
    overrides: Sequence[str] = (),
    read_model: ModelReader | None = None,
    log_outdated: bool = False,
) -> LoadedConfig:
    """Read `source` (a file or a mapping) and its bases, apply the `section.key=value` overrides, and validate.

    Invalid keys are removed from the config, so `check` can still check the other keys. A required number with an
    invalid value becomes 1. The caller must ignore violations of `check` that involve an invalid key.

    `read_model` is called for a model section with `from: CHECKPOINT`.

    With `log_outdated`, renamed keys are logged, and each 0 or -1 of version 0.1.0 that is null or off now.
    """
    raw = {}
    if isinstance(source, Path):
        raw = _read(find_config(source), ())
    elif source is not None:
        raw = _add_base(deepcopy(dict(source)), Path(), "the config", ())
    for override in overrides:
        _apply_override(raw, override)
    for message in list_outdated_keys(UnresolvedConfig, raw) if log_outdated else ():
        log.warning(message)
    violations: list[Violation] = []
    if isinstance(model := raw.get("model"), dict) and MODEL_FROM in model:
        if read_model is None:
            violations.append(
                Violation((f"model.{MODEL_FROM}",), "can only be used in the config of a run; remove the key")
            )
            read_model = _drop_model_from
        raw["model"], model_violations = read_model(model, raw.get("init_allow", ()))
        violations += model_violations
    return _validate(raw, violations)


def _drop_model_from(model: dict[str, Any], allowed_keys: object) -> MergedModelSection:
    return MergedModelSection({name: value for name, value in model.items() if name != MODEL_FROM}, [])


def _validate(raw: dict[str, Any], violations: list[Violation]) -> LoadedConfig:
    """Return the config with the valid keys of `raw`, and `violations` followed by the violations of invalid keys."""
    raw = update_outdated_keys(UnresolvedConfig, raw)
    while True:
        try:
            return LoadedConfig(UnresolvedConfig.model_validate(raw), violations)
        except ValidationError as error:
            details = error.errors()
        reported = {violation.keys for violation in violations}
        violations += [violation for violation in map(_to_violation, details) if violation.keys not in reported]
        is_changed = [
            _set_placeholder(raw, _get_location(detail))
            if detail["type"] == "missing"
            else _remove(raw, _get_location(detail))
            for detail in details
        ]
        if not any(is_changed):
            return LoadedConfig(None, violations)


def load_saved_config(directory: Path) -> Config:
    """Return the resolved config in a run or checkpoint directory. Raises ConfigError if it is not valid."""
    path = directory / "config.yaml"
    raw = _read(path, ())
    raise_violations(_validate(raw, []).violations)
    try:
        return Config.model_validate(update_outdated_keys(Config, raw))
    except ValidationError as error:
        key = ".".join(map(str, error.errors()[0]["loc"]))
        raise ConfigError(f"{path}: {key} is not resolved; use the config.yaml of a run or checkpoint") from None


def parse_saved_config(text: str, file_name: str) -> Config:
    """Parse a config that `dump_config` wrote. Raises CheckpointError, which names the file, if it is not valid."""
    raw = update_outdated_keys(UnresolvedConfig, parse_yaml(text, file_name))
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        violation = _to_violation(error.errors()[0])
        raise CheckpointError(
            f"{file_name}: {violation}; the file was edited, or written by another version of dist_llm: use that "
            "version"
        ) from None


def dump_config(config: Config) -> str:
    """Format a resolved config as YAML that `load_config` can read."""
    content = config.model_dump()
    content["model"]["n_encoder_layers"] = config.model.n_encoder_layers or None
    return yaml.safe_dump(content, sort_keys=False)


def _read(path: Path, derived_files: tuple[Path, ...]) -> dict[str, Any]:
    """Read a file into nested dicts and merge it onto its `base`. `derived_files` build on this file as their base."""
    path = path.resolve()
    if path in derived_files:
        chain = " -> ".join(map(str, (*derived_files, path)))
        raise ConfigError(f"{path}: `base` leads back to itself: {chain}")
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: byte {error.start} is not UTF-8 text; save the file as UTF-8") from None
    raw = parse_yaml(text, str(path)) or {}
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: a config is a mapping of sections, found {type(raw).__name__}")
    return _add_base(raw, path.parent, str(path), (*derived_files, path))


def _add_base(raw: dict[str, Any], directory: Path, file_name: str, derived_files: tuple[Path, ...]) -> dict[str, Any]:
    """Merge a config onto its `base`, a path relative to `directory` or a config of the package."""
    base = raw.pop("base", None)
    if base is None:
        return raw
    if not isinstance(base, str):
        raise ConfigError(f"{file_name}: base: must be the path of one YAML file")
    return _merge(_read(find_config(directory / base, base), derived_files), raw)


def _merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Merge nested dicts. Values of `changes` replace those of `base`."""
    merged = dict(base)
    for name, value in changes.items():
        base_value = merged.get(name)
        are_sections = isinstance(base_value, dict) and isinstance(value, dict)
        merged[name] = _merge(base_value or {}, value) if are_sections else value
    return merged


def _apply_override(raw: dict[str, Any], override: str) -> None:
    """Set the key of a `section.key=value` override in `raw`."""
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override '{override}': write it as section.key=value")
    *sections, name = key.split(".")
    if [*sections, name][0] == "base":
        raise ConfigError(f"override '{override}': base is only for files; write `base: {value}` into the config file")
    node = raw
    for section in sections:
        node = node.setdefault(section, {})
        if not isinstance(node, dict):
            raise ConfigError(f"override '{override}': '{section}' is a value, not a section")
    node[name] = parse_yaml(value, f"override '{override}'")


def _get_location(detail: ErrorDetails) -> tuple[int | str, ...]:
    """Return the location of a validation error, without tags of unions and without the `name` of an unknown tag."""
    location = strip_tags(UnresolvedConfig, detail["loc"])
    return (*location, "name") if detail["type"] == "union_tag_invalid" else location


def _to_violation(detail: ErrorDetails) -> Violation:
    """Convert an error of pydantic to a violation, with a suggestion for an unknown key."""
    key = ".".join(str(name) for name in _get_location(detail) if name != "[key]")
    if detail["type"] == "union_tag_invalid":
        return Violation((key,), f"input should be {detail['ctx']['expected_tags']}, found {detail['ctx']['tag']!r}")
    if detail["type"] == "extra_forbidden" and (message := _describe_misplaced_key(key, detail["loc"])):
        return Violation((key,), message)
    if detail["type"] == "extra_forbidden":
        known_keys = dict.fromkeys([*UnresolvedConfig.model_fields, *(key_help.name for key_help in describe_keys())])
        return Violation((key,), f"unknown key{suggest_keys(key, list(known_keys))}")
    if detail["type"] == "missing":
        return Violation((key,), "must be set")
    message = detail["msg"][0].lower() + detail["msg"][1:]
    return Violation((key,), f"{message}, found {detail['input']!r}")


def _describe_misplaced_key(key: str, location: tuple[int | str, ...]) -> str | None:
    """Return the message for a key that only other members of the union have; None for an unknown key."""
    section = key.rpartition(".")[0]
    field = UnresolvedConfig.model_fields.get(str(location[0]))
    tags = find_tags_with_key(field.annotation, str(location[-1])) if field else []
    if not tags:
        return None
    if location[1:-1] == (MIXTURE,):
        return f"has no effect beside {section}.{MIXTURE}; set it in its entries"
    condition = f"{section}.{MIXTURE}" if tags == [MIXTURE] else f"{section}.name={' or '.join(tags)}"
    return f"has no effect without {condition}; remove the key, or set {condition}"


def _remove(raw: dict[str, Any], location: tuple[int | str, ...]) -> bool:
    """Remove an invalid key. If the error is inside a value, remove the entire value. Returns whether it existed."""
    node: Any = raw
    for name in location[:-1]:
        if not isinstance(node, dict) or name not in node:
            return False
        if not isinstance(node[name], dict):
            del node[name]
            return True
        node = node[name]
    if not isinstance(node, dict) or location[-1] not in node:
        return False
    del node[location[-1]]
    return True


def _set_placeholder(raw: dict[str, Any], location: tuple[int | str, ...]) -> bool:
    """Set a missing required number to 1, because the checks of other keys need a value. Returns whether it was set."""
    if len(location) != 2:
        return False
    section, name = map(str, location)
    fields: Any = UnresolvedConfig.model_fields[section].annotation
    if type_name(fields.model_fields[name].annotation) != "int":
        return False
    raw[section][name] = 1
    return True
