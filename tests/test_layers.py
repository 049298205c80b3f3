"""The tree's rules, read from the source: who may import whom, and what belongs where."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import dist_llm

PACKAGE = Path(dist_llm.__file__).parent

# An arrow may only point left; those on one level do not know each other.
LEVELS = (
    {"errors"},
    {"io"},
    {"config"},
    {"compat", "counter_rng"},
    {"sharded"},
    {"losses", "optim"},
    {"models"},
    {"objectives"},
    {"data"},
    {"text"},
    {"launch", "observe"},
    {"parallel"},
    {"checkpoint"},
    {"convert"},
    {"engines"},
    {"train", "generate"},
    {"commands", "api"},
    {"cli"},
    {"__main__"},
)
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
SIDEWAYS = {("train", "generate"), ("observe", "launch")}
KNOW_OF_RANKS = {"compat", "sharded", "launch", "parallel", "checkpoint", "engines"}
# The wrapper that hands an exception to torchrun; it starts nothing.
ALLOWED = {("commands", "torch.distributed.elastic.multiprocessing.errors")}


def imports(tree: ast.Module, package: tuple[str, ...]) -> Iterator[str]:
    """Every dotted name that a module imports, late imports too; relative ones made absolute."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            stem = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*stem, *([node.module] if node.module else [])))
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def chains(tree: ast.Module) -> Iterator[str]:
    """Every dotted expression, as `torch.distributed.all_reduce`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield ast.unparse(node)


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def broken_rules(root: Path) -> list[str]:
    """What is wrong in the package at `root`, one line each."""
    found = []
    for path in sorted(root.rglob("*.py")):
        place = path.relative_to(root)
        me = place.parts[0].removesuffix(".py")
        if me == "__init__":
            continue
        source = path.read_text(encoding="utf-8")
        tree = ast.parse(source)
        names = set(imports(tree, ("dist_llm", *place.parts[:-1])))
        dotted = names | set(chains(tree))
        if path.stem == "utils":
            found.append(f"{place}: a module needs a name of its own")
        if len(source.splitlines()) > 5 and not ast.get_docstring(tree):
            found.append(f"{place}: no docstring")
        if me not in LEVEL:
            found.append(f"{place}: {me} has no place in the order of layers")
            continue
        others = {name.split(".")[1] for name in names if name.startswith("dist_llm.")} - {me, "__version__"}
        for other in sorted(others):
            if other not in LEVEL:
                found.append(f"{place}: imports {other}, which has no place in the order of layers")
            elif LEVEL[other] >= LEVEL[me] and (me, other) not in SIDEWAYS:
                found.append(f"{place}: {me} may not import {other}")
        ranks = {n for n in dotted if within(n, "torch.distributed")}
        ranks -= {n for n in ranks for who, what in ALLOWED if who == me and within(n, what)}
        if ranks and me not in KNOW_OF_RANKS:
            found.append(f"{place}: {me} knows of ranks through {min(ranks)}")
        environment = {n for n in dotted for what in ("os.environ", "os.getenv", "os.putenv") if within(n, what)}
        if environment and me != "launch":
            found.append(f"{place}: only launch reads the environment, not {me}")
        disk = {n for n in dotted for what in ("os.fsync", "os.replace", "os.rename", "fcntl") if within(n, what)}
        if disk and me != "io":
            found.append(f"{place}: only io syncs files and locks them, not {me} through {min(disk)}")
        if me in {"errors", "io", "config"} and any(within(n, "torch") for n in dotted):
            found.append(f"{place}: {me} imports torch")
    return found


def test_every_rule_holds():
    assert broken_rules(PACKAGE) == []


@pytest.mark.parametrize(
    ("file", "line", "complaint"),
    [
        ("models/block.py", "from dist_llm.parallel.mesh import build_mesh", "models may not import parallel"),
        ("models/block.py", "from ..data import corpus", "models may not import data"),
        ("models/norm.py", "from torch import distributed", "models knows of ranks"),
        ("models/norm.py", "import torch\nRANK = torch.distributed.get_rank", "models knows of ranks"),
        ("losses/cross_entropy.py", "from dist_llm.optim import clip", "losses may not import optim"),
        ("launch/world.py", "def late():\n    import dist_llm.observe.flops", "launch may not import observe"),
        ("generate.py", "from dist_llm import train", "generate may not import train"),
        ("data/order.py", "import os\nSEED = os.environ['SEED']", "only launch reads the environment"),
        ("data/order.py", "from os import getenv", "only launch reads the environment"),
        ("cli.py", "from torch.distributed import barrier", "cli knows of ranks"),
        ("config/check.py", "import torch", "config imports torch"),
        ("io/hashing.py", "import torch", "io imports torch"),
        ("io/hashing.py", "from dist_llm.data import shard", "io may not import data"),
        ("text/export.py", "import os\nSYNC = os.fsync", "only io syncs files"),
        ("text/export.py", "from fcntl import flock", "only io syncs files"),
        ("errors.py", "from dist_llm.config import load", "errors may not import config"),
        ("data/utils.py", "", "a name of its own"),
        ("fresh/thing.py", "A = 1\n" * 6, "no docstring"),
        ("fresh/thing.py", "", "no place in the order"),
    ],
)
def test_a_planted_violation_is_caught(file, line, complaint, tmp_path):
    copy = tmp_path / "dist_llm"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    planted = copy / file
    planted.parent.mkdir(exist_ok=True)
    old = planted.read_text(encoding="utf-8") if planted.exists() else ""
    planted.write_text(f"{old}\n{line}\n" if old else line + "\n", encoding="utf-8")
    assert any(complaint in rule for rule in broken_rules(copy)), broken_rules(copy)


@pytest.mark.parametrize(
    "module", ["errors", "config.load", "config.check", "train.settings", "launch.world", "data.shard", "cli"]
)
def test_what_a_config_error_needs_does_not_load_torch(module):
    """Late imports keep --help and a config error instant."""
    code = f"import sys, dist_llm.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_what_the_package_declares_is_what_it_imports():
    """A library that only the tests need belongs to the extra `dev`."""
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared, optional = (
        {re.split("[^A-Za-z0-9_-]", line)[0].replace("pyyaml", "yaml") for line in lines}
        for lines in (
            project["dependencies"],
            [line for lines in project["optional-dependencies"].values() for line in lines],
        )
    )
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py")}
    names = {
        name for path, tree in trees.items() for name in imports(tree, path.parent.relative_to(PACKAGE.parent).parts)
    }
    imported = {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) - {"dist_llm"}
    assert imported - {"pydantic_core"} <= declared | optional
    # torch imports the one for us; the other is what converted checkpoints are written with.
    assert declared - imported <= {"tensorboard", "safetensors"}
