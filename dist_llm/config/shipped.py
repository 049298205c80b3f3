"""Find the configs that come with the package: `--config demo` works without a clone of the repository."""

from pathlib import Path

from dist_llm.errors import ConfigError

SHIPPED_DIRECTORY = Path(__file__).parents[1] / "configs"


def list_shipped_configs() -> list[str]:
    """Return the names of the shipped configs, such as `demo` and `families/encoder`."""
    return sorted(
        path.relative_to(SHIPPED_DIRECTORY).with_suffix("").as_posix() for path in SHIPPED_DIRECTORY.rglob("*.yaml")
    )


def find_config(path: Path, name: str = "") -> Path:
    """Return `path` if it is a file, else the path of the shipped config `name` (default: `path`).

    The name of a shipped config has no suffix. Raises ConfigError if there is neither a file nor a shipped config.
    """
    name = name or path.as_posix()
    if path.is_file() or Path(name).suffix in (".yaml", ".yml"):
        return path  # a missing file is reported by the reader
    names = list_shipped_configs()
    if name in names:
        return SHIPPED_DIRECTORY / f"{name}.yaml"
    raise ConfigError(f"{path}: is neither a file nor a config of the package; the package has {', '.join(names)}")
