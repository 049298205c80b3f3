"""Parse YAML with the numbers of YAML 1.2 and limits on keys, depth and size."""

import re
from collections.abc import Iterator
from itertools import count
from typing import Any

import yaml

from dist_llm.errors import ConfigError

MAX_VALUES = 100_000  # in one YAML file


class _Loader(yaml.SafeLoader):
    """A YAML loader with the numbers of YAML 1.2. PyYAML follows 1.1, where `3e-4` is a string and `010` is 8."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def _parse_int(loader: _Loader, node: yaml.ScalarNode) -> int | str:
    """Parse decimal digits, with `_` between them. Other integers of YAML 1.1 (0x10, 1:30) stay strings."""
    try:
        return int(node.value)
    except ValueError:
        return str(node.value)


_Loader.add_constructor("tag:yaml.org,2002:int", _parse_int)


def parse_yaml(text: str, file_name: str) -> Any:
    """Parse YAML with numbers of YAML 1.2. Raises ConfigError for invalid YAML and keys; it starts with `file_name`."""
    try:
        _check_keys(yaml.compose(text, Loader=_Loader), file_name, count())
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, LookupError) as error:  # PyYAML does not wrap errors of 2020-13-45, !!bool x
        raise ConfigError(f"{file_name}: not valid YAML: {error}") from None
    except RecursionError:
        raise ConfigError(f"{file_name}: nested too deeply, or an alias (*) inside its own anchor (&)") from None


def _check_keys(node: Any, file_name: str, value_counter: Iterator[int]) -> None:
    """Raise ConfigError for a key that is not a plain word or occurs twice, and for more than MAX_VALUES values.

    Each use of an alias counts, because a few aliases of aliases can expand to more values than fit into memory.
    """
    if next(value_counter) > MAX_VALUES:
        raise ConfigError(
            f"{file_name}: more than {MAX_VALUES:,} values; aliases (*) of aliases multiply, write them out"
        )
    if isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _check_keys(value, file_name, value_counter)
    if isinstance(node, yaml.MappingNode):
        names: set[str] = set()
        for name, value in node.value:
            line = name.start_mark.line + 1
            if not isinstance(name, yaml.ScalarNode):
                raise ConfigError(f"{file_name}:{line}: a key must be a plain word, not a list or a mapping")
            if name.value in names:
                raise ConfigError(f"{file_name}:{line}: key '{name.value}' is given twice; keep one")
            names.add(name.value)
            _check_keys(value, file_name, value_counter)
