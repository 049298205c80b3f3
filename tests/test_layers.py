"""Import rules: which packages a package may import, and which packages may use ranks, the environment and disks."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import dist_llm

PACKAGE = Path(dist_llm.__file__).parent

# A package imports only packages of earlier levels; packages of one level are independent.
LEVELS = (
    {"errors"},
    {"io"},
    {"config"},
    {"compat", "counter_rng"},
    {"param_spec", "sharded"},
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
    {"training", "generation"},
    {"commands", "api"},
    {"cli"},
    {"__main__"},
)
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
SAME_LEVEL_IMPORTS = {("training", "generation"), ("observe", "launch")}
RANK_AWARE = {"compat", "sharded", "launch", "parallel", "checkpoint", "engines"}
# The wrapper that reports an exception to torchrun; it starts no processes.
ALLOWED_RANK_MODULES = {("commands", "torch.distributed.elastic.multiprocessing.errors")}


def iter_imports(tree: ast.Module, package: tuple[str, ...]) -> Iterator[str]:
    """Yield the absolute name of each import of a module, including imports inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parent = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*parent, *([node.module] if node.module else [])))
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def iter_attributes(tree: ast.Module) -> Iterator[str]:
    """Yield each dotted expression, such as `torch.distributed.all_reduce`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield ast.unparse(node)


def is_within(name: str, package: str) -> bool:
    """Return whether a module is this package or a module of it."""
    return name == package or name.startswith(package + ".")


class Module(NamedTuple):
    """A module of the package, and the names that its code imports or uses."""

    path: Path  # relative to the package
    package: str  # such as `models`; for a module of dist_llm itself its name, such as `cli`
    imported_names: set[str]
    used_names: set[str]  # dotted names of imports and expressions

    def get_names_within(self, *packages: str) -> set[str]:
        """Return the used names that belong to one of the packages or modules."""
        return {name for name in self.used_names for package in packages if is_within(name, package)}


def find_violations(root: Path) -> list[str]:
    """List the violations of the rules in the package at `root`."""
    violations = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        package = relative.parts[0].removesuffix(".py")
        if package == "__init__":
            continue
        source = path.read_text(encoding="utf-8")
        tree = ast.parse(source)
        imported_names = set(iter_imports(tree, ("dist_llm", *relative.parts[:-1])))
        module = Module(relative, package, imported_names, imported_names | set(iter_attributes(tree)))
        messages = []
        if path.stem == "utils":
            messages.append("a module needs a name of its own")
        if len(source.splitlines()) > 5 and not ast.get_docstring(tree):
            messages.append("no docstring")
        if package in LEVEL:
            messages += [*iter_layer_violations(module), *iter_use_violations(module)]
        else:
            messages.append(f"{package} is in no layer")
        violations += [f"{relative}: {message}" for message in messages]
    return violations


def iter_layer_violations(module: Module) -> Iterator[str]:
    """Yield a message for each imported package that the package of the module may not import."""
    package = module.package
    imported_packages = {name.split(".")[1] for name in module.imported_names if name.startswith("dist_llm.")}
    for imported_package in sorted(imported_packages - {package, "__version__"}):
        if imported_package not in LEVEL:
            yield f"imports {imported_package}, which is in no layer"
        elif LEVEL[imported_package] >= LEVEL[package] and (package, imported_package) not in SAME_LEVEL_IMPORTS:
            yield f"{package} may not import {imported_package}"


def iter_use_violations(module: Module) -> Iterator[str]:
    """Yield a message for a use of ranks, the environment, the disk or torch that the package of the module may not."""
    package = module.package
    allowed_modules = [allowed for allowed_package, allowed in ALLOWED_RANK_MODULES if allowed_package == package]
    rank_names = module.get_names_within("torch.distributed") - module.get_names_within(*allowed_modules)
    if rank_names and package not in RANK_AWARE:
        yield f"{package} may not use torch.distributed, but uses {min(rank_names)}"
    if module.get_names_within("os.environ", "os.getenv", "os.putenv") and package != "launch":
        yield f"only launch reads the environment, not {package}"
    disk_names = module.get_names_within("os.fsync", "os.replace", "os.rename", "fcntl")
    if disk_names and package != "io":
        yield f"only io syncs files and locks them, not {package} through {min(disk_names)}"
    if package in {"errors", "io", "config"} and module.get_names_within("torch"):
        yield f"{package} imports torch"


def test_no_module_violates_the_import_rules():
    assert find_violations(PACKAGE) == []


@pytest.mark.parametrize(
    ("file", "statement", "message"),
    [
        ("models/block.py", "from dist_llm.parallel.mesh import build_mesh", "models may not import parallel"),
        ("models/block.py", "from ..data import corpus", "models may not import data"),
        ("models/norm.py", "from torch import distributed", "models may not use torch.distributed"),
        ("models/norm.py", "import torch\nRANK = torch.distributed.get_rank", "models may not use torch.distributed"),
        ("losses/cross_entropy.py", "from dist_llm.optim import clip", "losses may not import optim"),
        ("launch/world.py", "def late():\n    import dist_llm.observe.flops", "launch may not import observe"),
        ("generation.py", "from dist_llm import training", "generation may not import training"),
        ("data/order.py", "import os\nSEED = os.environ['SEED']", "only launch reads the environment"),
        ("data/order.py", "from os import getenv", "only launch reads the environment"),
        ("cli.py", "from torch.distributed import barrier", "cli may not use torch.distributed"),
        ("config/check.py", "import torch", "config imports torch"),
        ("io/hashing.py", "import torch", "io imports torch"),
        ("io/hashing.py", "from dist_llm.data import shard", "io may not import data"),
        ("text/export.py", "import os\nSYNC = os.fsync", "only io syncs files"),
        ("text/export.py", "from fcntl import flock", "only io syncs files"),
        ("errors.py", "from dist_llm.config import load", "errors may not import config"),
        ("data/utils.py", "", "a name of its own"),
        ("fresh/thing.py", "A = 1\n" * 6, "no docstring"),
        ("fresh/thing.py", "", "fresh is in no layer"),
    ],
)
def test_a_planted_violation_is_detected(file, statement, message, tmp_path):
    copy = tmp_path / "dist_llm"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    module_path = copy / file
    module_path.parent.mkdir(exist_ok=True)
    original = module_path.read_text(encoding="utf-8") if module_path.exists() else ""
    module_path.write_text(f"{original}\n{statement}\n" if original else statement + "\n", encoding="utf-8")
    assert any(message in violation for violation in find_violations(copy)), find_violations(copy)


@pytest.mark.parametrize(
    "module", ["errors", "config.load", "config.check", "training.settings", "launch.world", "data.shard", "cli"]
)
def test_config_errors_do_not_load_torch(module):
    """The command line imports torch only when it is needed, so --help and config errors are fast."""
    code = f"import sys, dist_llm.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_pyproject_declares_the_imported_libraries():
    """Libraries that only tests need are in the extra `dev`."""
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared, optional = (
        {re.split("[^A-Za-z0-9_-]", requirement)[0].replace("pyyaml", "yaml") for requirement in lines}
        for lines in (
            project["dependencies"],
            [requirement for lines in project["optional-dependencies"].values() for requirement in lines],
        )
    )
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py")}
    names = {
        name
        for path, tree in trees.items()
        for name in iter_imports(tree, path.parent.relative_to(PACKAGE.parent).parts)
    }
    imported = {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) - {"dist_llm"}
    assert imported - {"pydantic_core"} <= declared | optional
    # torch imports tensorboard; safetensors writes converted checkpoints.
    assert declared - imported <= {"tensorboard", "safetensors"}
