"""YAML files and dotted overrides -> one `Config`, or every violation in one error."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from dist_llm.config.nearest import nearest
from dist_llm.config.schema import Config, KnownNames
from dist_llm.errors import CheckpointError, ConfigError


class _Loader(yaml.SafeLoader):
    """PyYAML follows YAML 1.1, where `3e-4` is a string and `010` is 8; here they are numbers as in YAML 1.2."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def _decimal(loader: _Loader, node: yaml.ScalarNode) -> int | str:
    """Decimal digits, `_` allowed between them; YAML 1.1's other integers (0x10, 1:30) stay text."""
    try:
        return int(node.value)
    except ValueError:
        return str(node.value)


_Loader.add_constructor("tag:yaml.org,2002:int", _decimal)


@dataclass(frozen=True)
class Violation:
    """A broken rule; `keys` are the dotted keys it speaks of, the first names the place."""

    keys: tuple[str, ...]
    message: str

    def __str__(self) -> str:
        return f"{self.keys[0]}: {self.message}"


MAX_VALUES = 100_000  # of a YAML file
FROM = "from"  # of the model section: a checkpoint that the section is taken from
ModelReader = Callable[[dict[str, Any], object], tuple[dict[str, Any], list[Violation]]]


def refuse(violations: Sequence[Violation]) -> None:
    """Raise one ConfigError that lists them all; do nothing where there are none."""
    if violations:
        lines = "\n".join(f"  {violation}" for violation in violations)
        noun = "1 problem" if len(violations) == 1 else f"{len(violations)} problems"
        raise ConfigError(f"{noun} in the config:\n{lines}\nAll keys: dist-llm train --help-config")


def load_config(
    path: Path | None, overrides: Sequence[str] = (), read_model: ModelReader | None = None
) -> tuple[Config | None, list[Violation]]:
    """Read `path` and its bases, apply `key.key=value` overrides, validate.

    Returns the config and what is wrong with it. Where keys are wrong the config is the one
    that remains without them, so that `check` can find more; a required number is then 1, and
    the caller leaves out what `check` says of a wrong key. None where no config remains.

    `read_model` gives (the model section of the checkpoint that `model.from` names, violations).
    """
    raw = _read(path, ()) if path else {}
    for override in overrides:
        _apply(raw, override)
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


def _validate(raw: dict[str, Any], violations: list[Violation]) -> tuple[Config | None, list[Violation]]:
    """The config of what is valid in `raw`, and `violations` with those found here."""
    while True:
        try:
            return Config.model_validate(raw), violations
        except ValidationError as error:
            details = error.errors()
        reported = {violation.keys for violation in violations}
        violations += [new for new in map(_violation, details) if new.keys not in reported]
        mended = [_stand_in(raw, d["loc"]) if d["type"] == "missing" else _remove(raw, d["loc"]) for d in details]
        if not any(mended):
            return None, violations


def parse_yaml(text: str, where: str) -> Any:
    """`yaml.safe_load` with 1.2 numbers, plain keys, each once, and the place in the error."""
    try:
        _check_keys(yaml.compose(text, Loader=_Loader), where, count())
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, LookupError) as error:  # PyYAML lets 2020-13-45 and !!bool x fall through
        raise ConfigError(f"{where}: not valid YAML: {error}") from None
    except RecursionError:
        raise ConfigError(f"{where}: nested too deeply, or an alias (*) inside its own anchor (&)") from None


def load_saved(directory: Path) -> Config:
    """The config that a run or a checkpoint has beside it. Raises ConfigError where it is not valid."""
    config, violations = load_config(directory / "config.yaml")
    refuse(violations)
    assert config is not None
    return config


def parse_saved(text: str, where: str) -> Config:
    """The config that `dump` gave. Raises CheckpointError, naming the file `where`, for anything else."""
    raw = parse_yaml(text, where)
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        first = _violation(error.errors()[0])
        raise CheckpointError(
            f"{where}: {first}; the file was edited, or written by another version of dist_llm: use that version"
        ) from None


def dump(config: Config) -> str:
    """The resolved config as YAML that `load_config` reads back."""
    return yaml.safe_dump(config.model_dump(), sort_keys=False)


def describe() -> Iterator[tuple[str, str, str, str]]:
    """(key, type, default, description) of every key, for `--help-config`."""
    for name, field in Config.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            for inner, inner_field in field.annotation.model_fields.items():
                yield _row(f"{name}.{inner}", inner_field)
        else:
            yield _row(name, field)
    yield "base", "path", "none", "another config to build on, relative to this file; keys here win"
    yield (
        f"model.{FROM}",
        "str",
        "none",
        "checkpoint or run whose model section is used; keys beside it that decide the model's function must agree "
        "with it, unless init_allow names them",
    )


def _row(name: str, field: Any) -> tuple[str, str, str, str]:
    default = "required" if field.is_required() else str(yaml.safe_dump(field.default)).split("\n")[0]
    known = [" | ".join((*mark.names, "...")) for mark in field.metadata if isinstance(mark, KnownNames)]
    return name, known[0] if known else _type_name(field.annotation), default, field.description or ""


def _type_name(annotation: Any) -> str:
    origin = get_origin(annotation)
    if origin is Literal:
        return " | ".join(str(value) for value in get_args(annotation))
    if origin in (Union, UnionType):
        return " | ".join(_type_name(part) for part in get_args(annotation))
    if origin is list:
        return "list"
    if annotation is type(None):
        return "null"
    if origin is Annotated:
        return _type_name(get_args(annotation)[0])
    return str(getattr(annotation, "__name__", annotation))


def _read(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    """The file as nested dicts, merged onto its `base`."""
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
    base = raw.pop("base", None)
    if base is None:
        return raw
    if not isinstance(base, str):
        raise ConfigError(f"{path}: base: must be the path of one YAML file")
    return _merge(_read(path.parent / base, (*seen, path)), raw)


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
    """Raises ConfigError for a key that is no word or comes twice, and for more values than a config has.

    A few aliases of aliases stand for more values than fit into memory, so every use of an alias counts.
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


def _violation(detail: ErrorDetails) -> Violation:
    name = ".".join(str(part) for part in detail["loc"] if part != "[key]")
    if detail["type"] == "extra_forbidden":
        known = dict.fromkeys([*Config.model_fields, *(row[0] for row in describe())])
        return Violation((name,), f"unknown key{nearest(name, list(known))}")
    if detail["type"] == "missing":
        return Violation((name,), "must be set")
    message = detail["msg"][0].lower() + detail["msg"][1:]
    return Violation((name,), f"{message}, found {detail['input']!r}")


def _remove(raw: dict[str, Any], where: tuple[int | str, ...]) -> bool:
    """Take out the offending key; where the place is inside a value, the whole value."""
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
    """Put a 1 in the place of a required number, so that the other keys can be checked against each other."""
    if len(where) != 2:
        return False
    section, name = map(str, where)
    fields: Any = Config.model_fields[section].annotation
    if _type_name(fields.model_fields[name].annotation) != "int":
        return False
    raw[section][name] = 1
    return True
