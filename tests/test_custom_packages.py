"""The packages in examples/ pass their laws without a change of dist_llm."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Folder -> number of tests in it.
EXAMPLES = {"custom_mixer": 14, "custom_feedforward": 11, "custom_objective": 11}


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_class_of_another_package_passes_its_laws(name: str, tmp_path: Path) -> None:
    """A folder with the metadata of an installed package stands for `pip install`."""
    example = ROOT / "examples" / name
    project = tomllib.loads((example / "pyproject.toml").read_text())["project"]
    metadata = tmp_path / f"{project['name'].replace('-', '_')}-0.1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: 0.1.0\n")
    ((group, entry_points),) = project["entry-points"].items()
    lines = [f"[{group}]", *(f"{key} = {target}" for key, target in entry_points.items())]
    (metadata / "entry_points.txt").write_text("\n".join(lines) + "\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (example, tmp_path, ROOT)))}
    command = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider", example]
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400, check=False
    )
    assert result.returncode == 0, result.stdout[-5000:]
    assert f"{EXAMPLES[name]} passed" in result.stdout, "a test is skipped"
