"""The configs of the package are found by their names, from any directory."""

from pathlib import Path

import pytest

from dist_llm.config.load import load_config
from dist_llm.config.shipped import SHIPPED_DIRECTORY, find_config, list_shipped_configs
from dist_llm.errors import ConfigError


def test_every_config_of_the_package_has_a_name() -> None:
    names = list_shipped_configs()
    assert {"demo", "debug", "llama3-8b", "families/encoder", "layouts/one"} <= set(names)
    assert len(names) == len(list(SHIPPED_DIRECTORY.rglob("*.yaml")))


@pytest.mark.parametrize("name", list_shipped_configs())
def test_a_name_loads_the_file_of_the_package(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_config(Path(name)) == load_config(SHIPPED_DIRECTORY / f"{name}.yaml")


def test_a_file_takes_precedence_over_a_config_of_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("demo").write_text("run: {steps: 7}")
    assert find_config(Path("demo")) == Path("demo")


def test_a_base_may_be_a_config_of_the_package(tmp_path: Path) -> None:
    path = tmp_path / "longer.yaml"
    path.write_text("base: demo\nrun: {steps: 12345}\n")
    config, violations = load_config(path)
    demo, _ = load_config(Path("demo"))
    assert violations == []
    assert config is not None
    assert demo is not None
    assert config == demo.model_copy(update={"run": demo.run.model_copy(update={"steps": 12345})})


def test_the_error_for_an_unknown_name_lists_the_names() -> None:
    with pytest.raises(ConfigError, match=r"dmeo: is neither a file nor a config of the package; .* demo, "):
        load_config(Path("dmeo"))
    with pytest.raises(ConfigError, match=r"dmeo.yaml: cannot be read"):
        load_config(Path("dmeo.yaml"))
