"""The project files (CI, containers, hooks, citation) name versions, paths and commands that exist."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

import dist_llm

REPOSITORY = Path(__file__).parents[1]
PROJECT: dict[str, Any] = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]


def read_yaml(name: str) -> dict[Any, Any]:
    """Return the content of a YAML file in the root of the repository, which must be a mapping."""
    content = yaml.safe_load((REPOSITORY / name).read_text())
    assert isinstance(content, dict)
    return content


def test_the_version_is_the_same_everywhere() -> None:
    changelog = (REPOSITORY / "CHANGELOG.md").read_text()
    newest_heading = re.search(r"^## (\d+\.\d+\.\d+)", changelog, re.MULTILINE)
    assert newest_heading is not None
    versions = {PROJECT["version"], dist_llm.__version__, read_yaml("CITATION.cff")["version"], newest_heading[1]}
    assert len(versions) == 1, versions


def test_the_workflow_runs_the_script_of_ci() -> None:
    (job,) = read_yaml(".github/workflows/ci.yml")["jobs"].values()
    assert any(".ci/run" in step.get("run", "") for step in job["steps"])


def test_the_commit_hooks_run_the_checks_of_make_check() -> None:
    hooks = [hook for repo in read_yaml(".pre-commit-config.yaml")["repos"] for hook in repo["hooks"]]
    recipe = (REPOSITORY / "Makefile").read_text().split("\ncheck:")[1].split("\n\n")[0]
    for program in ("ruff format", "ruff check", "mypy", "tools/lint_names.py"):
        assert program in recipe
        assert any(program in hook["entry"] for hook in hooks)


def test_the_containers_copy_existing_files_and_run_the_command() -> None:
    dockerfile = (REPOSITORY / "Dockerfile").read_text()
    copied_names = {name for line in re.findall(r"^COPY (.*)$", dockerfile, re.MULTILINE) for name in line.split()[:-1]}
    apptainer_file = (REPOSITORY / "apptainer.def").read_text()
    file_lines = apptainer_file.split("%files\n")[1].split("\n\n")[0].splitlines()
    assert {line.split()[0] for line in file_lines} == copied_names
    assert all((REPOSITORY / name).exists() for name in copied_names)
    assert {"pyproject.toml", "dist_llm", PROJECT["readme"]} <= copied_names
    (program,) = PROJECT["scripts"]
    assert f'ENTRYPOINT ["{program}"]' in dockerfile
    assert f"exec {program} " in apptainer_file


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not shutil.which("docker"), reason="there is no docker")
def test_the_docker_image_builds() -> None:
    if subprocess.run(["docker", "info"], capture_output=True).returncode:
        pytest.skip("docker does not run here")
    subprocess.run(["docker", "build", "--tag", "dist-llm-test", "."], cwd=REPOSITORY, check=True)
    subprocess.run(["docker", "run", "--rm", "dist-llm-test", "--help"], check=True)


def test_the_config_reference_is_up_to_date() -> None:
    completed = subprocess.run(
        [sys.executable, "tools/config_reference.py"], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert completed.stdout == (REPOSITORY / "docs/config.md").read_text(), (
        "docs/config.md is outdated; run: python tools/config_reference.py --write"
    )
