"""Install a fake package that registers an engine.

monkeypatch.syspath_prepend(tmp_path)
install_engine(tmp_path)
build_engine(config, device)  # with engine=fake in the config, this returns a FakeEngine
"""

from pathlib import Path

FAKE_ENGINE_SOURCE = """
from dist_llm.config.load import Violation
from dist_llm.engines.native import NativeEngine


class FakeEngine(NativeEngine):
    pass


def build_engine(config, device):
    return FakeEngine(config, device)


def check_config(config, device):
    if config.parallel.tp > 1:
        yield Violation(("parallel.tp", "engine"), f"fake cannot do that on {device}; set 1")
"""


def install_engine(
    directory: Path, *, name: str = "fake", source: str = FAKE_ENGINE_SOURCE, package: str = "other"
) -> None:
    """Write a package to `directory` that registers the engine `name`. `directory` must be on sys.path.

    `source` is the source code of the module of the engine, and `package` is the name of the package.
    """
    (directory / f"{package}_{name}.py").write_text(source, encoding="utf-8")
    metadata = directory / f"{package}-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n", encoding="utf-8")
    entry = f"[dist_llm.engines]\n{name} = {package}_{name}\n"
    (metadata / "entry_points.txt").write_text(entry, encoding="utf-8")
