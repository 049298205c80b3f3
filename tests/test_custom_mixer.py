"""The mixer of examples/custom_mixer passes its laws without a change of dist_llm."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "custom_mixer"
ENTRY_POINTS = '[project.entry-points."dist_llm.mixers"]\ngated_convolution = "gated_convolution:GatedConvolution"\n'


def test_the_mixer_of_another_package_passes_its_laws(tmp_path: Path) -> None:
    """A folder with the metadata of an installed package stands for `pip install`."""
    assert ENTRY_POINTS in (EXAMPLE / "pyproject.toml").read_text()
    metadata = tmp_path / "gated_convolution-0.1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: gated-convolution\nVersion: 0.1.0\n")
    (metadata / "entry_points.txt").write_text(
        "[dist_llm.mixers]\ngated_convolution = gated_convolution:GatedConvolution\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (EXAMPLE, tmp_path, ROOT)))}
    command = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider", EXAMPLE]
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400, check=False
    )
    assert result.returncode == 0, result.stdout[-5000:]
    assert "14 passed" in result.stdout, "a test is skipped"
