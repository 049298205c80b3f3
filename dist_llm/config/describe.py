"""Describe all keys of a config with type, default and description, for `--help-config`, docs/config.md and errors."""

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

import yaml
from pydantic import BaseModel

from dist_llm.config.schema import KnownNames, UnresolvedConfig
from dist_llm.config.section import OFF, Section, get_union_members, strip_metadata
from dist_llm.errors import ConfigError

MODEL_FROM = "from"  # a key of the model section that names a checkpoint
TOP_LEVEL = "top level"
LINE_WIDTH = 100  # characters per line on a terminal


class KeyHelp(NamedTuple):
    """The help on one key. `name` has `*` for the index of a list entry. `default` is YAML or `required`."""

    name: str
    type: str
    default: str
    description: str


def describe_keys() -> Iterator[KeyHelp]:
    """Yield the help on every key, section by section."""
    yield KeyHelp(
        "base", "path", "none", "another config to build on, relative to this file; keys of this file override its keys"
    )
    for name, field in UnresolvedConfig.model_fields.items():
        if not _get_sections(field.annotation):
            yield _describe_field(name, field)
    for name, field in UnresolvedConfig.model_fields.items():
        yield from _describe_section(name, _get_sections(field.annotation))
        if name == "model":
            yield KeyHelp(
                f"model.{MODEL_FROM}",
                "str",
                "none",
                "checkpoint or run whose model section is used; other model keys that change what the model computes "
                "must agree with the checkpoint, unless init_allow names them",
            )


def search_keys(text: str) -> list[KeyHelp]:
    """Return the keys whose name or description contains `text`. Raises ConfigError if there are none."""
    matches = [key for key in describe_keys() if text.lower() in f"{key.name} {key.description}".lower()]
    if matches:
        return matches
    raise ConfigError(f"no key contains '{text}'; list all keys with dist-llm train --help-config")


def format_help(keys: Sequence[KeyHelp]) -> Iterator[str]:
    """Yield lines for a terminal: the keys of each section under its name and description."""
    for section, section_keys in groupby(keys, lambda key: _get_section_name(key.name)):
        yield f"{section}: {_get_section_description(section)}"
        for key in section_keys:
            yield f"  {key.name}"
            yield f"      {key.type}; default: {key.default}"
            yield textwrap.fill(key.description, LINE_WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
        yield ""


def format_markdown() -> Iterator[str]:
    """Yield the lines of docs/config.md."""
    for section, section_keys in groupby(describe_keys(), lambda key: _get_section_name(key.name)):
        yield f"## {section}\n\n{_get_section_description(section).capitalize()}.\n"
        yield "| key | type | default | description |\n| --- | --- | --- | --- |"
        for key in section_keys:
            cells = (f"`{key.name}`", key.type, f"`{key.default}`", key.description)
            escaped_cells = [cell.replace("|", r"\|") for cell in cells]
            yield f"| {' | '.join(escaped_cells)} |"
        yield ""


def _get_section_name(name: str) -> str:
    return name.split(".")[0] if "." in name else TOP_LEVEL


def _get_section_description(section: str) -> str:
    if section == TOP_LEVEL:
        return "keys outside the sections"
    return UnresolvedConfig.model_fields[section].description or ""


def _get_sections(annotation: Any) -> dict[str, type[Section]]:
    """Return {tag: section} for a union of sections, {"": section} for one section, and {} for a value."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return {"": annotation}
    return get_union_members(annotation)


def _describe_section(prefix: str, members: Mapping[str, type[Section]]) -> Iterator[KeyHelp]:
    """Yield the help on each key of the members once. The description of a key starts with its members, if not all."""
    named_members = {tag: member for tag, member in members.items() if "name" in member.model_fields}
    fields: dict[str, Any] = {}
    for member in members.values():
        fields |= {name: field for name, field in member.model_fields.items() if name not in fields}
    for name, field in fields.items():
        full_name, kind, default, description = _describe_field(f"{prefix}.{name}", field)
        tags_with_key = [tag for tag, member in named_members.items() if name in member.model_fields]
        if len(members) > 1 and name == "name":
            kind = " | ".join(named_members)
        elif len(members) > 1 and not tags_with_key:
            default = "none"
        elif len(members) > 1 and len(tags_with_key) < len(named_members):
            description = f"{', '.join(tags_with_key)}: {description}"
        yield KeyHelp(full_name, kind, default, description)
        yield from _describe_section(f"{prefix}.{name}", _get_sections(field.annotation))
        entry = strip_metadata(field.annotation)
        if get_origin(entry) is tuple and not get_union_members(get_args(entry)[0]):
            yield from _describe_section(f"{prefix}.{name}.*", _get_sections(get_args(entry)[0]))


def _describe_field(name: str, field: Any) -> KeyHelp:
    default = "required"
    if not field.is_required():
        value = field.default.model_dump() if isinstance(field.default, Section) else field.default
        default = str(yaml.safe_dump(value, default_flow_style=True)).split("\n")[0]
    known_names = [" | ".join((*mark.names, "...")) for mark in field.metadata if isinstance(mark, KnownNames)]
    kind = known_names[0] if known_names else type_name(field.annotation)
    if OFF in field.metadata:
        kind, default = kind.replace("null", "off"), default.replace("null", "off")
    return KeyHelp(name, kind, default, field.description or "")


def type_name(annotation: Any) -> str:
    """Return the type of a key as shown to a user."""
    if get_union_members(annotation):
        return "section | null" if NoneType in get_args(annotation) else "section"
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
