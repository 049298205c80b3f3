"""Install a fake package that registers an engine."""

from pathlib import Path

STAND_IN_SOURCE = """
from dist_llm.config.load import Violation
from dist_llm.engines.native import NativeEngine


class StandIn(NativeEngine):
    pass


def build_engine(config, device):
    return StandIn(config, device)


def check_config(config, device):
    if config.parallel.tp > 1:
        yield Violation(("parallel.tp", "engine"), f"standin cannot do that on {device}; set 1")
"""


def install_engine(
    directory: Path, name: str = "standin", source: str = STAND_IN_SOURCE, package: str = "other"
) -> None:
    """Write a package to `directory` that registers the engine `name`, if `directory` is on sys.path.

    `source` is the source code of the engine.
    """
    (directory / f"{package}_{name}.py").write_text(source, encoding="utf-8")
    metadata = directory / f"{package}-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n", encoding="utf-8")
    entry = f"[dist_llm.engines]\n{name} = {package}_{name}\n"
    (metadata / "entry_points.txt").write_text(entry, encoding="utf-8")
