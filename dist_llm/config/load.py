"""Load a config from YAML files and dotted overrides, and report every violation in one error."""

import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from dist_llm.config.describe import FROM, describe, type_name
from dist_llm.config.nearest import nearest
from dist_llm.config.schema import Config, UnresolvedConfig
from dist_llm.config.section import MIXTURE, drop_unused_defaults, list_outdated_values, owners_of, strip_tags
from dist_llm.config.shipped import find_config
from dist_llm.errors import CheckpointError, ConfigError

log = logging.getLogger("dist_llm")


class _Loader(yaml.SafeLoader):
    """A YAML loader with the numbers of YAML 1.2. PyYAML follows 1.1, where `3e-4` is a string and `010` is 8."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def _decimal(loader: _Loader, node: yaml.ScalarNode) -> int | str:
    """Parse decimal digits, with `_` between them. Other integers of YAML 1.1 (0x10, 1:30) stay strings."""
    try:
        return int(node.value)
    except ValueError:
        return str(node.value)


_Loader.add_constructor("tag:yaml.org,2002:int", _decimal)


@dataclass(frozen=True)
class Violation:
    """A broken rule. `keys` are the dotted keys that the rule involves; the message starts with the first one."""

    keys: tuple[str, ...]
    message: str

    def __str__(self) -> str:
        return f"{self.keys[0]}: {self.message}"


MAX_VALUES = 100_000  # in one YAML file
ModelReader = Callable[[dict[str, Any], object], tuple[dict[str, Any], list[Violation]]]


def raise_violations(violations: Sequence[Violation]) -> None:
    """Raise one ConfigError that lists all violations; return if there are none."""
    if violations:
        lines = "\n".join(f"  {violation}" for violation in violations)
        noun = "1 problem" if len(violations) == 1 else f"{len(violations)} problems"
        raise ConfigError(f"{noun} in the config:\n{lines}\nAll keys: dist-llm train --help-config")


def load_config(
    source: Path | Mapping[str, Any] | None, overrides: Sequence[str] = (), read_model: ModelReader | None = None
) -> tuple[UnresolvedConfig | None, list[Violation]]:
    """Read `source` (a file or a mapping) and its bases, apply the `key.key=value` overrides, and validate.

    Returns (config, violations). Invalid keys are removed from the config, so that `check` can still check the others.
    A required number with an invalid value becomes 1; the caller must ignore violations of `check` that involve an
    invalid key. The config is None if it is not valid even without these keys.

    `read_model` returns (the model section of the checkpoint that `model.from` names, violations).
    """
    raw = {}
    if isinstance(source, Path):
        raw = _read(find_config(source), ())
    elif source is not None:
        raw = _add_base(deepcopy(dict(source)), Path(), "the config", ())
    for override in overrides:
        _apply(raw, override)
    if os.environ.get("RANK", "0") == "0":
        for message in list_outdated_values(UnresolvedConfig, raw):
            log.warning(message)
    violations: list[Violation] = []
    if isinstance(model := raw.get("model"), dict) and FROM in model:
        if read_model is None:
            violations.append(Violation((f"model.{FROM}",), "can only be used in the config of a run; remove the key"))
            read_model = _without_from
        raw["model"], model_violations = read_model(model, raw.get("init_allow", ()))
        violations += model_violations
    return _validate(raw, violations)


def _without_from(model: dict[str, Any], allowed: object) -> tuple[dict[str, Any], list[Violation]]:
    return {name: value for name, value in model.items() if name != FROM}, []


def _validate(raw: dict[str, Any], violations: list[Violation]) -> tuple[UnresolvedConfig | None, list[Violation]]:
    """Return the config with the valid keys of `raw`, and `violations` with those of the invalid keys appended."""
    raw = drop_unused_defaults(UnresolvedConfig, raw)
    while True:
        try:
            return UnresolvedConfig.model_validate(raw), violations
        except ValidationError as error:
            details = error.errors()
        reported = {violation.keys for violation in violations}
        violations += [new for new in map(_violation, details) if new.keys not in reported]
        mended = [_stand_in(raw, _key_of(d)) if d["type"] == "missing" else _remove(raw, _key_of(d)) for d in details]
        if not any(mended):
            return None, violations


def parse_yaml(text: str, where: str) -> Any:
    """Parse YAML with numbers of YAML 1.2. Raises ConfigError, which starts with `where`, for invalid YAML and keys."""
    try:
        _check_keys(yaml.compose(text, Loader=_Loader), where, count())
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, LookupError) as error:  # PyYAML lets 2020-13-45 and !!bool x fall through
        raise ConfigError(f"{where}: not valid YAML: {error}") from None
    except RecursionError:
        raise ConfigError(f"{where}: nested too deeply, or an alias (*) inside its own anchor (&)") from None


def load_saved(directory: Path) -> Config:
    """Return the config stored in a run or checkpoint directory. Raises ConfigError if it is not valid."""
    path = directory / "config.yaml"
    raw = _read(path, ())
    raise_violations(_validate(raw, [])[1])
    try:
        return Config.model_validate(drop_unused_defaults(Config, raw))
    except ValidationError as error:
        key = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise ConfigError(f"{path}: {key} is not resolved; use the config.yaml of a run or checkpoint") from None


def parse_saved(text: str, where: str) -> Config:
    """Parse a config that `dump` wrote. Raises CheckpointError, which names the file `where`, if it is not valid."""
    raw = drop_unused_defaults(UnresolvedConfig, parse_yaml(text, where))
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        first = _violation(error.errors()[0])
        raise CheckpointError(
            f"{where}: {first}; the file was edited, or written by another version of dist_llm: use that version"
        ) from None


def dump(config: Config) -> str:
    """Format a resolved config as YAML that `load_config` can read."""
    content = config.model_dump()
    content["model"]["n_encoder_layers"] = config.model.n_encoder_layers or None
    return yaml.safe_dump(content, sort_keys=False)


def _read(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    """Read a file into nested dicts and merge it onto its `base`."""
    path = path.resolve()
    if path in seen:
        raise ConfigError(f"{path}: `base` leads back to itself: {' -> '.join(str(p) for p in (*seen, path))}")
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: byte {error.start} is not UTF-8 text; save the file as UTF-8") from None
    raw = parse_yaml(text, str(path)) or {}
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: a config is a mapping of sections, found {type(raw).__name__}")
    return _add_base(raw, path.parent, str(path), (*seen, path))


def _add_base(raw: dict[str, Any], directory: Path, name: str, seen: tuple[Path, ...]) -> dict[str, Any]:
    """Merge a config onto its `base`, a path relative to `directory` or a config of the package."""
    base = raw.pop("base", None)
    if base is None:
        return raw
    if not isinstance(base, str):
        raise ConfigError(f"{name}: base: must be the path of one YAML file")
    return _merge(_read(find_config(directory / base, base), seen), raw)


def _merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for name, value in top.items():
        old = merged.get(name)
        merged[name] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _apply(raw: dict[str, Any], override: str) -> None:
    path, equals, value = override.partition("=")
    if not equals or not path:
        raise ConfigError(f"override '{override}': write it as section.key=value")
    *parents, leaf = path.split(".")
    if [*parents, leaf][0] == "base":
        raise ConfigError(f"override '{override}': base is only for files; write `base: {value}` into the config file")
    node = raw
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise ConfigError(f"override '{override}': '{parent}' is a value, not a section")
    node[leaf] = parse_yaml(value, f"override '{override}'")


def _check_keys(node: Any, where: str, visited: Iterator[int]) -> None:
    """Raise ConfigError for a key that is not a plain word or occurs twice, and for more than MAX_VALUES values.

    Each use of an alias counts, because a few aliases of aliases can expand to more values than fit into memory.
    """
    if next(visited) > MAX_VALUES:
        raise ConfigError(f"{where}: more than {MAX_VALUES:,} values; aliases (*) of aliases multiply, write them out")
    if isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _check_keys(value, where, visited)
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for name, value in node.value:
            line = name.start_mark.line + 1
            if not isinstance(name, yaml.ScalarNode):
                raise ConfigError(f"{where}:{line}: a key must be a plain word, not a list or a mapping")
            if name.value in seen:
                raise ConfigError(f"{where}:{line}: key '{name.value}' is given twice; keep one")
            seen.add(name.value)
            _check_keys(value, where, visited)


def _key_of(detail: ErrorDetails) -> tuple[int | str, ...]:
    """Return the location of a validation error, without tags of unions and without the `name` of an unknown tag."""
    location = strip_tags(UnresolvedConfig, detail["loc"])
    return (*location, "name") if detail["type"] == "union_tag_invalid" else location


def _violation(detail: ErrorDetails) -> Violation:
    name = ".".join(str(part) for part in _key_of(detail) if part != "[key]")
    if detail["type"] == "union_tag_invalid":
        return Violation((name,), f"input should be {detail['ctx']['expected_tags']}, found {detail['ctx']['tag']!r}")
    if detail["type"] == "extra_forbidden" and (message := _misplaced_key(name, detail["loc"])):
        return Violation((name,), message)
    if detail["type"] == "extra_forbidden":
        known = dict.fromkeys([*UnresolvedConfig.model_fields, *(row[0] for row in describe())])
        return Violation((name,), f"unknown key{nearest(name, list(known))}")
    if detail["type"] == "missing":
        return Violation((name,), "must be set")
    message = detail["msg"][0].lower() + detail["msg"][1:]
    return Violation((name,), f"{message}, found {detail['input']!r}")


def _misplaced_key(key: str, location: tuple[int | str, ...]) -> str | None:
    """Return the message for a key of another member of the section's union; None for an unknown key."""
    section = key.rpartition(".")[0]
    field = UnresolvedConfig.model_fields.get(str(location[0]))
    owners = owners_of(field.annotation, str(location[-1])) if field else []
    if not owners:
        return None
    if location[1:-1] == (MIXTURE,):
        return f"has no effect beside {section}.{MIXTURE}; set it in its entries"
    needed = f"{section}.{MIXTURE}" if owners == [MIXTURE] else f"{section}.name={' or '.join(owners)}"
    return f"has no effect without {needed}; remove the key, or set {needed}"


def _remove(raw: dict[str, Any], where: tuple[int | str, ...]) -> bool:
    """Remove an invalid key. If the error is inside a value, remove the entire value. Returns whether it existed."""
    node: Any = raw
    for part in where[:-1]:
        if not isinstance(node, dict) or part not in node:
            return False
        if not isinstance(node[part], dict):
            del node[part]
            return True
        node = node[part]
    if not isinstance(node, dict) or where[-1] not in node:
        return False
    del node[where[-1]]
    return True


def _stand_in(raw: dict[str, Any], where: tuple[int | str, ...]) -> bool:
    """Set a required number to 1, so that the other keys can be checked against each other. Returns whether it did."""
    if len(where) != 2:
        return False
    section, name = map(str, where)
    fields: Any = UnresolvedConfig.model_fields[section].annotation
    if type_name(fields.model_fields[name].annotation) != "int":
        return False
    raw[section][name] = 1
    return True
