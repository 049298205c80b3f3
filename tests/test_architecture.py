"""docs/architecture.svg is up to date: tools/draw_architecture.py draws it from the layers in test_layers.py."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest

from .test_layers import LEVEL, LEVELS

REPOSITORY = Path(__file__).parents[1]
TOOL = REPOSITORY / "tools" / "draw_architecture.py"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    """The program tools/draw_architecture.py as a module."""
    spec = importlib.util.spec_from_file_location("draw_architecture", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # the dataclass decorator reads sys.modules
    spec.loader.exec_module(module)
    return module


def test_the_picture_is_up_to_date(tool: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["draw_architecture.py", "--write", str(tmp_path / "new.svg")])
    assert tool.main() == 0
    new, old = (file.read_text() for file in (tmp_path / "new.svg", REPOSITORY / "docs" / "architecture.svg"))
    assert new == old, "the drawing is outdated; run: python tools/draw_architecture.py --write docs/architecture.svg"


def test_every_package_of_the_layers_is_a_box_with_a_description(tool: ModuleType) -> None:
    descriptions = tool.read_tree(tool.TREE.read_text())
    levels = tool.read_levels(tool.RULES.read_text())
    assert [set(names) for names in levels] == [names - {"__main__"} for names in LEVELS if names != {"__main__"}]
    boxes = {box.title: box for box in tool.iter_layer_boxes(levels, descriptions, 0)}
    assert boxes.keys() == LEVEL.keys() - {"__main__"}
    assert [title for title, box in boxes.items() if not box.lines] == []


def test_the_path_names_packages_of_the_layers(tool: ModuleType) -> None:
    assert {package for _, packages, _ in tool.PATH for package in packages} <= LEVEL.keys()


def test_a_moved_package_changes_a_valid_picture(tool: ModuleType) -> None:
    levels = tool.read_levels("LEVELS = ({'low & slow'}, {'high'}, {'__main__'})")
    picture = tool.draw(levels, {"high": "a < b"})
    texts = [node.text for node in ElementTree.fromstring(picture).iter() if node.tag.endswith("text")]
    assert texts.index("high") < texts.index("a < b") < texts.index("low & slow")
    with pytest.raises(ValueError, match="assigns no LEVELS"):
        tool.read_levels("OTHER = 1")
