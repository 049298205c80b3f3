"""Define the base class of all config sections, the types of their values, and unions of sections.

A union is a section whose keys depend on its key `name`: `optim.name: muon` selects the keys of MuonConfig. Each class
of a union is a member, and its `name` is its tag. A key of an unselected member is an error, because the key would have
no effect.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, TypeAdapter

# Limits of the sizes of a model. A larger value means that the config is damaged.
MAX_WIDTH, MAX_LAYERS, MAX_IDS = 1 << 24, 10_000, 1 << 31
MIXTURE = "mixture"  # tag of the member that is a mixture of objectives, and the key that selects this member
PositiveInt = Annotated[int, Field(ge=1, le=1 << 48)]
NonNegativeInt = Annotated[int, Field(ge=0, le=1 << 48)]
PositiveWidth = Annotated[int, Field(ge=1, le=MAX_WIDTH)]
Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]  # fits into an int64
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Rate = Annotated[float, Field(gt=0.0, lt=1.0)]
Share = Annotated[float, Field(gt=0.0, le=1.0)]
NonNegativeFloat = Annotated[float, Field(ge=0.0)]
PositiveFloat = Annotated[float, Field(gt=0.0)]


def _zero_to_none(value: Any) -> Any:
    return None if value == 0 and not isinstance(value, bool) else value


def _all_ranks_to_none(value: Any) -> Any:
    return None if value == -1 else value


def _off_to_none(value: Any) -> Any:
    return None if value in (0, "off") else value  # YAML reads `off` as false, which equals 0


# Version 0.1.0 used 0 and -1 instead of null and off. `load_config` still accepts them, with a message.
ZERO_TO_NULL = BeforeValidator(_zero_to_none)  # null: the value comes from other keys
ALL_RANKS = BeforeValidator(_all_ranks_to_none)  # null: all ranks that the other dimensions leave
OFF = BeforeValidator(_off_to_none)  # off or null: never, none or no limit

DerivedPositiveInt = Annotated[PositiveInt | None, ZERO_TO_NULL]
DerivedWidth = Annotated[PositiveWidth | None, ZERO_TO_NULL]
DerivedFloat = Annotated[PositiveFloat | None, ZERO_TO_NULL]
PositiveIntOrOff = Annotated[PositiveInt | None, OFF]
StepInterval = PositiveIntOrOff  # number of steps from one action to the next
Limit = Annotated[PositiveFloat | None, OFF]


def key(description: str, default: Any = ...) -> Any:
    """Declare a key of a section. Without `default` it is required."""
    return Field(default, description=description)


class RenamedKey(NamedTuple):
    """The new name of a key, the type of its values under the old name, and the function from old to new values."""

    name: str
    old_type: type
    convert: Callable[[Any], Any]


class Section(BaseModel):
    """Base of all sections: frozen and strict; refuses unknown keys, inf and nan."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)

    RENAMED_KEYS: ClassVar[Mapping[str, "RenamedKey"]] = {}  # by the name in earlier versions


class NoOptions(Section):
    """The options of a registered class that has none."""


def select_by_name(default: str, known_names: Sequence[str] = (), other_tag: str | None = None) -> Discriminator:
    """Return the discriminator of a union: the key `name`, else `default`; `mixture` if that key is set.

    With `other_tag`, that member has all names that are not in `known_names`.
    """

    def select(value: Any) -> str:
        if isinstance(value, Mapping):
            tag = _get_tag(value, default)
        else:
            tag = str(getattr(value, "name", MIXTURE if hasattr(value, MIXTURE) else default))
        return tag if other_tag is None or tag in known_names else other_tag

    return Discriminator(select)


def _get_tag(raw: Mapping[str, Any], default: str) -> str:
    """Return the tag of the member of a union that a raw section selects."""
    return MIXTURE if raw.get(MIXTURE) else str(raw.get("name", default))


def strip_metadata(annotation: Any) -> Any:
    """Return an annotation without its metadata."""
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def get_union_members(annotation: Any) -> dict[str, type[Section]]:
    """Return {tag: section} for a union of sections, which may also be null; {} for another annotation."""
    annotation = strip_metadata(annotation)
    if get_origin(annotation) not in (Union, UnionType):
        return {}
    members = [member for member in get_args(annotation) if member is not NoneType]
    if len(members) == 1:
        return get_union_members(members[0])
    return {
        metadata.tag: get_args(member)[0]
        for member in get_args(annotation)
        if get_origin(member) is Annotated
        for metadata in get_args(member)[1:]
        if isinstance(metadata, Tag)
    }


def find_tags_with_key(annotation: Any, name: str) -> list[str]:
    """Return the tags of the members of a union that have the key `name`."""
    return [tag for tag, member in get_union_members(annotation).items() if name in member.model_fields]


def update_outdated_keys(section: type[BaseModel], raw: Any) -> Any:
    """Return a raw section with its renamed keys, and without default values of unselected members of a union.

    Version 0.1.0 saved the keys of all members and accepted any value for them. If a union has several default values
    of unselected members, version 0.1.0 saved it. Then all keys of unselected members are removed.
    """
    if not isinstance(raw, Mapping):
        return raw
    raw = _rename_keys(section, raw)
    return {
        name: _update_outdated_value(section.model_fields[name].annotation, value)
        if name in section.model_fields
        else value
        for name, value in raw.items()
    }


def _rename_keys(section: type[BaseModel], raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """Rename the keys of earlier versions and convert their values."""
    new_raw = dict(raw)
    for old_name, renamed_key in _find_renamed_keys(section, raw):
        new_raw[renamed_key.name] = renamed_key.convert(new_raw.pop(old_name))
    return new_raw


def _find_renamed_keys(section: type[BaseModel], raw: Any) -> Iterator[tuple[str, RenamedKey]]:
    """Yield (old name, renamed key) for the keys of earlier versions in a raw section.

    An old key next to the new one, or with a value of another type, is left out: it is refused as an unknown key.
    """
    if isinstance(raw, Mapping) and issubclass(section, Section):
        for old_name, renamed_key in section.RENAMED_KEYS.items():
            if isinstance(raw.get(old_name), renamed_key.old_type) and renamed_key.name not in raw:
                yield old_name, renamed_key


def _update_outdated_value(annotation: Any, raw: Any) -> Any:
    """Apply `update_outdated_keys` to a value: a section, a list of sections, or the selected member of a union."""
    annotation = strip_metadata(annotation)
    if get_origin(annotation) is tuple and isinstance(raw, list | tuple):
        return [_update_outdated_value(get_args(annotation)[0], entry) for entry in raw]
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return update_outdated_keys(annotation, raw)
    members = get_union_members(annotation)
    if not members or not isinstance(raw, Mapping):
        return raw
    member = members.get(_get_tag(raw, next(iter(members))))  # the first member is the default
    if member is None:
        return raw
    tags_of_key = {name: find_tags_with_key(annotation, name) for name in raw.keys() - member.model_fields.keys()}
    tags_of_unused_key = {name: tags for name, tags in tags_of_key.items() if tags}
    defaults = {name for name, tags in tags_of_unused_key.items() if _is_default(members[tags[0]], name, raw[name])}
    dropped = tags_of_unused_key.keys() if len(defaults) > 1 else defaults
    return update_outdated_keys(member, {name: value for name, value in raw.items() if name not in dropped})


def _is_default(section: type[Section], name: str, value: Any) -> bool:
    if name == MIXTURE:
        return not value
    default = section.model_fields[name].default
    return default == value and isinstance(default, bool) == isinstance(value, bool)


def list_outdated_keys(section: type[BaseModel], raw: Any, prefix: str = "") -> Iterator[str]:
    """Yield a message for each renamed key, and each 0 or -1 that version 0.1.0 used instead of null or off."""
    for old_name, renamed_key in _find_renamed_keys(section, raw):
        yield (
            f"{prefix}{old_name}: the key is still accepted, but a later version will refuse it; write "
            f"{renamed_key.name}: {renamed_key.convert(raw[old_name])}"
        )
    for name, value in raw.items() if isinstance(raw, Mapping) else ():
        field, key_name = section.model_fields.get(name), f"{prefix}{name}"
        if field is None:
            continue
        for marker, parse in ((ZERO_TO_NULL, _zero_to_none), (ALL_RANKS, _all_ranks_to_none), (OFF, _off_to_none)):
            if marker in field.metadata and type(value) in (int, float) and parse(value) is None:
                new_value = "off" if marker is OFF else "null"
                yield (
                    f"{key_name}: {value} still means {new_value}, but a later version will refuse it; "
                    f"write {new_value}"
                )
        for entry_name, entry, annotation in _iter_entries(field.annotation, value):
            yield from list_outdated_keys(annotation, entry, f"{key_name}.{entry_name}")


def _iter_entries(annotation: Any, raw: Any) -> Iterator[tuple[str, Any, type[BaseModel]]]:
    """Yield (key prefix, raw section, class) for a section, the selected member of a union, or each entry of a list."""
    annotation = strip_metadata(annotation)
    if get_origin(annotation) is tuple and isinstance(raw, list | tuple):
        for index, entry in enumerate(raw):
            for prefix, raw_section, section in _iter_entries(get_args(annotation)[0], entry):
                yield f"{index}.{prefix}", raw_section, section
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield "", raw, annotation
    elif (members := get_union_members(annotation)) and isinstance(raw, Mapping):
        yield "", raw, members.get(_get_tag(raw, next(iter(members))), Section)


def parse_union(annotation: Any, raw: Mapping[str, Any]) -> Any:
    """Parse the section of a union from saved keys.

    Unknown keys, which another version saved, are ignored, unless the section is of a class of another package.
    """
    members = get_union_members(annotation)
    known_keys = dict(raw)
    if _get_tag(raw, next(iter(members))) in members:
        known_keys = {
            name: value for name, value in raw.items() if name == "name" or find_tags_with_key(annotation, name)
        }
    return TypeAdapter(annotation).validate_python(_update_outdated_value(annotation, known_keys))


def strip_tags(section: type[BaseModel], location: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """Return the location of a validation error as keys of the YAML file, without the tags of unions."""
    return tuple(_iter_keys(section, location))


def _iter_keys(annotation: Any, location: tuple[int | str, ...]) -> Iterator[int | str]:
    if not location:
        return
    annotation, (key_or_tag, *inner_location) = strip_metadata(annotation), location
    if key_or_tag in (members := get_union_members(annotation)):
        yield from _iter_keys(members[str(key_or_tag)], tuple(inner_location))
        return
    yield key_or_tag
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        field = annotation.model_fields.get(str(key_or_tag))
        yield from _iter_keys(field.annotation if field else None, tuple(inner_location))
    elif get_origin(annotation) is tuple:
        yield from _iter_keys(get_args(annotation)[0], tuple(inner_location))
    else:
        yield from inner_location
