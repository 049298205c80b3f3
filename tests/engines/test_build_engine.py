"""Entry points register engines. A native run imports no other engine. A broken engine is reported early."""

import sys
from importlib.metadata import EntryPoints
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_llm.config import engine_names
from dist_llm.config.check import check
from dist_llm.config.engine_names import ENTRY_POINT_GROUP, find_engine_plugin
from dist_llm.config.load import describe_keys
from dist_llm.config.schema import Config
from dist_llm.engines.build_engine import build_engine, check_engine_config
from dist_llm.engines.native import NativeEngine
from dist_llm.errors import ConfigError
from tests.e2e import commands
from tests.engines.fake_engine import FAKE_ENGINE_SOURCE, install_engine
from tests.laws.law import make_config

CPU = torch.device("cpu")


def make_engine_config(engine: str, **sections: Any) -> Config:
    """Make a resolved config of an engine. It is not checked, so `list_problems` can report what is wrong with it."""
    config = make_config(ranks=1)
    parallel = config.parallel.model_copy(update=sections.pop("parallel", {}))
    return config.model_copy(update={"engine": engine, "parallel": parallel, **sections})


def list_problems(config: Config) -> list[str]:
    """Return the violations of the config rules as strings."""
    return [str(violation) for violation in check(config, world_size=1, tokenizer_size=130)]


@pytest.fixture
def package_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory on sys.path, in which `install_engine` installs a package."""
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_an_engine_of_another_package_is_built(package_directory: Path) -> None:
    install_engine(package_directory)
    config = make_engine_config(engine="fake")
    assert list_problems(config) == []
    check_engine_config(config, CPU)
    engine = build_engine(config, CPU)
    assert (type(engine).__name__, type(engine).__module__) == ("FakeEngine", "other_fake")
    assert isinstance(engine, NativeEngine)
    with pytest.raises(ConfigError, match=r"parallel\.tp: fake cannot do that on cpu; set 1"):
        check_engine_config(make_engine_config(engine="fake", parallel={"tp": 2}), CPU)


def test_an_engine_without_check_config_is_accepted(package_directory: Path) -> None:
    install_engine(package_directory, name="unchecked", source=FAKE_ENGINE_SOURCE.partition("def check_config")[0])
    config = make_engine_config(engine="unchecked", parallel={"tp": 2})
    check_engine_config(config, CPU)


def test_an_unknown_engine_error_lists_the_known_engines(package_directory: Path) -> None:
    install_engine(package_directory)
    message = "engine: no installed package has naitve; set one of accelerate, deepspeed, fake, native, or install"
    assert [line for line in list_problems(make_engine_config(engine="naitve")) if line.startswith(message)]
    with pytest.raises(ConfigError, match=message):
        check_engine_config(make_engine_config(engine="naitve"), CPU)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import nowhere", "engine: broken: other_broken cannot be imported: ModuleNotFoundError: No module named"),
        ("1 / 0", "engine: broken: other_broken cannot be imported: ZeroDivisionError"),
        ("build = 1", r"engine: broken: other_broken has no function build_engine\(config, device\)"),
    ],
)
def test_a_broken_engine_is_refused(
    source: str, message: str, package_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "other_broken", raising=False)
    install_engine(package_directory, name="broken", source=source)
    with pytest.raises(ConfigError, match=message):
        check_engine_config(make_engine_config(engine="broken"), CPU)


def test_two_packages_with_the_same_engine_name_are_refused(package_directory: Path) -> None:
    install_engine(package_directory, package="one")
    install_engine(package_directory, package="two")
    message = "engine: fake is registered more than once: one_fake, two_fake; uninstall all but one package"
    assert message in list_problems(make_engine_config(engine="fake"))
    with pytest.raises(ConfigError, match=message):
        build_engine(make_engine_config(engine="fake"), CPU)


def test_outdated_metadata_of_our_package_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """The source tree was installed with `pip install -e .` before engines had entry points."""
    monkeypatch.setattr(engine_names, "entry_points", lambda **_: EntryPoints())
    message = "engine: no installed package has deepspeed; set one of native, or install dist_llm again, whose metadata"
    assert [line for line in list_problems(make_engine_config(engine="deepspeed")) if line.startswith(message)]


@pytest.mark.parametrize("name", ["deepspeed", "accelerate"])
def test_our_engines_are_registered(name: str) -> None:
    entry_point = find_engine_plugin(name)
    assert entry_point is not None, (
        f"the metadata of dist_llm is older than pyproject.toml: install it again ({ENTRY_POINT_GROUP})"
    )
    assert callable(entry_point.load().build_engine)


def test_the_help_lists_the_known_engines() -> None:
    assert {row[0]: row[1] for row in describe_keys()}["engine"] == "native | deepspeed | accelerate | ..."


def test_a_native_run_imports_no_other_engine(tmp_path: Path) -> None:
    """The process has imported only the command line and the modules of a run."""
    script = tmp_path / "native.py"
    script.write_text(
        """
import sys, torch
import dist_llm.cli, dist_llm.generation
import dist_llm.training.run, dist_llm.training.debug, dist_llm.training.evaluate_checkpoint
from dist_llm.engines.build_engine import build_engine, check_engine_config
from tests.laws.law import make_config
config = make_config(ranks=1)
check_engine_config(config, torch.device("cpu"))
build_engine(config, torch.device("cpu"))
others = ("deepspeed", "accelerate", "dist_llm.engines.deepspeed", "dist_llm.engines.accelerate")
print(sorted(name for name in sys.modules if name.startswith(others)))
""",
        encoding="utf-8",
    )
    assert commands.run(cwd=tmp_path, module=str(script)).stdout == "[]\n"
