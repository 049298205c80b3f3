"""An installed wheel does what the source tree does: the commands run in a new environment and another directory."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from tests.e2e.commands import REPOSITORY, make_environment

SMALL = "run.steps=4 data.seq_len=64 data.global_batch=4 data.micro_batch=2 eval.every=0 checkpoint.every=4"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel, install it in a new environment with the libraries of this one; return the bin directory."""
    root = tmp_path_factory.mktemp("wheel")
    source = root / "source"
    source.mkdir()
    for name in ("dist_llm", "pyproject.toml", "README.md", "LICENSE"):
        copy = shutil.copytree if (REPOSITORY / name).is_dir() else shutil.copy
        copy(REPOSITORY / name, source / name)
    pip = [sys.executable, "-m", "pip", "--quiet", "--no-input", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", root, source], check=True)
    shutil.rmtree(source)
    venv.create(root / "environment", symlinks=True)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(root / "environment")}))
    # A .pth file adds the packages of this environment but does not read their .pth files, of which one is the editable
    # install of this repository.
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib"))
    python = root / "environment/bin/python"
    subprocess.run([*pip, "--python", python, "install", "--no-deps", *root.glob("dist_llm-*.whl")], check=True)
    return python.parent


def run(installed: Path, cwd: Path, *arguments: str) -> str:
    """Run a program of the new environment in `cwd`; return its standard output."""
    completed = subprocess.run(
        [installed / arguments[0], *arguments[1:]],
        cwd=cwd,
        env={**make_environment(), "PATH": f"{installed}{os.pathsep}{os.environ['PATH']}"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert completed.returncode == 0, f"{arguments}\n{completed.stdout}\n{completed.stderr}"
    return completed.stdout


@pytest.mark.timeout(600)
def test_the_commands_of_an_installed_wheel_run(installed: Path, tmp_path: Path) -> None:
    package_path = run(installed, tmp_path, "python", "-c", "import dist_llm; print(dist_llm.__file__)")
    assert Path(package_path.strip()).is_relative_to(installed.parent)
    assert "dist-llm prepare" in run(installed, tmp_path, "dist-llm", "--help")
    (tmp_path / "text.txt").write_text(
        "\n\n".join(f"The number {number} comes before {number + 1}." for number in range(2000))
    )
    run(
        installed, tmp_path, "dist-llm", "prepare", "--source", "text.txt", "--separator", "blank-lines",
        "--tokenizer", "bpe:300", "--heldout-fraction", "0.1", "--workers", "1", "--out", "corpus",
    )  # fmt: skip
    train = ("-m", "dist_llm", "train", "--config", "debug", "run.dir=run", "data.path=corpus", *SMALL.split())
    torchrun = ("python", "-m", "torch.distributed.run", "--nproc-per-node", "2")
    run(installed, tmp_path, *torchrun, *train, "parallel.dp_shard=2")
    assert "perplexity" in run(installed, tmp_path, "dist-llm", "evaluate", "--checkpoint", "run")
    assert run(installed, tmp_path, "dist-llm", "generate", "--checkpoint", "run", "--max-tokens", "4")
    run(installed, tmp_path, "dist-llm", "convert", "to-hf", "run", "hf")
    assert (tmp_path / "hf/config.json").exists()
    assert "#SBATCH" in run(installed, tmp_path, "dist-llm", "submit", "debug", "data.path=corpus", "--dry-run")
