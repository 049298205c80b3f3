"""Describe all keys of a config: type, default and description, for `--help-config`, docs/config.md and messages."""

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from types import UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

import yaml
from pydantic import BaseModel

from dist_llm.config.schema import KnownNames, UnresolvedConfig
from dist_llm.config.section import OFF, Section, union_members, unwrap
from dist_llm.errors import ConfigError

FROM = "from"  # a key of the model section that names a checkpoint
TOP = "top level"
WIDTH = 100  # characters per line on a terminal


class KeyHelp(NamedTuple):
    """One key. `name` is dotted, with `*` for the index of a list entry. `default` is YAML, or `required`."""

    name: str
    type: str
    default: str
    description: str


def describe() -> Iterator[KeyHelp]:
    """Yield every key, section by section."""
    yield KeyHelp("base", "path", "none", "another config to build on, relative to this file; keys here win")
    for name, field in UnresolvedConfig.model_fields.items():
        if not _sections_of(field.annotation):
            yield _describe_field(name, field)
    for name, field in UnresolvedConfig.model_fields.items():
        yield from _describe_section(name, _sections_of(field.annotation))
        if name == "model":
            yield KeyHelp(
                f"model.{FROM}",
                "str",
                "none",
                "checkpoint or run whose model section is used; keys beside it that decide the model's function must "
                "agree with it, unless init_allow names them",
            )


def search(text: str) -> list[KeyHelp]:
    """Return the keys whose name or description contains `text`. Raises ConfigError if there are none."""
    if matches := [row for row in describe() if text.lower() in f"{row.name} {row.description}".lower()]:
        return matches
    raise ConfigError(f"no key contains '{text}'; list all keys with dist-llm train --help-config")


def format_help(rows: Sequence[KeyHelp]) -> Iterator[str]:
    """Yield lines for a terminal: the keys of each section under its name and description."""
    for section, keys in groupby(rows, lambda row: _section_of(row.name)):
        yield f"{section}: {_description_of(section)}"
        for row in keys:
            yield f"  {row.name}"
            yield f"      {row.type}; default: {row.default}"
            yield textwrap.fill(row.description, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
        yield ""


def format_markdown() -> Iterator[str]:
    """Yield the lines of docs/config.md."""
    for section, keys in groupby(describe(), lambda row: _section_of(row.name)):
        yield f"## {section}\n\n{_description_of(section).capitalize()}.\n"
        yield "| key | type | default | description |\n| --- | --- | --- | --- |"
        for row in keys:
            cells = (f"`{row.name}`", row.type, f"`{row.default}`", row.description)
            yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
        yield ""


def _section_of(name: str) -> str:
    return name.split(".")[0] if "." in name else TOP


def _description_of(section: str) -> str:
    if section == TOP:
        return "keys outside the sections"
    return UnresolvedConfig.model_fields[section].description or ""


def _sections_of(annotation: Any) -> dict[str, type[Section]]:
    """Return {tag: section} for a union of sections, {"": section} for one section, and {} for a value."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return {"": annotation}
    return union_members(annotation)


def _describe_section(prefix: str, members: Mapping[str, type[Section]]) -> Iterator[KeyHelp]:
    """Yield each key of the members once. A key that only some members have lists these members."""
    named = {tag: member for tag, member in members.items() if "name" in member.model_fields}
    fields: dict[str, Any] = {}
    for member in members.values():
        fields |= {name: field for name, field in member.model_fields.items() if name not in fields}
    for name, field in fields.items():
        full_name, kind, default, description = _describe_field(f"{prefix}.{name}", field)
        owners = [tag for tag, member in named.items() if name in member.model_fields]
        if len(members) > 1 and name == "name":
            kind = " | ".join(named)
        elif len(members) > 1 and not owners:
            default = "none"
        elif len(members) > 1 and len(owners) < len(named):
            description = f"{', '.join(owners)}: {description}"
        yield KeyHelp(full_name, kind, default, description)
        entry = unwrap(field.annotation)
        if get_origin(entry) is tuple and not union_members(get_args(entry)[0]):
            yield from _describe_section(f"{prefix}.{name}.*", _sections_of(get_args(entry)[0]))


def _describe_field(name: str, field: Any) -> KeyHelp:
    default = "required" if field.is_required() else str(yaml.safe_dump(field.default)).split("\n")[0]
    known_names = [" | ".join((*mark.names, "...")) for mark in field.metadata if isinstance(mark, KnownNames)]
    kind = known_names[0] if known_names else type_name(field.annotation)
    if OFF in field.metadata:
        kind, default = kind.replace("null", "off"), default.replace("null", "off")
    return KeyHelp(name, kind, default, field.description or "")


def type_name(annotation: Any) -> str:
    """Return the type of a key as shown to a user."""
    origin = get_origin(annotation)
    if origin is Literal:
        return " | ".join(str(value) or "empty" for value in get_args(annotation))
    if origin in (Union, UnionType):
        return " | ".join(type_name(member) for member in get_args(annotation))
    if origin in (list, tuple):
        return "list"
    if origin is dict:
        return "mapping"
    if annotation is type(None):
        return "null"
    if origin is Annotated:
        return type_name(get_args(annotation)[0])
    assert isinstance(annotation, type) and not issubclass(annotation, BaseModel)  # noqa: PT018
    return annotation.__name__
