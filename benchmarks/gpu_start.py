"""The program of `make gpu`: make missing packages importable from the wheels in `wheels/`, then run gpu.py.

A machine with a GPU may lack a network and packages that training needs. `make gpu-wheels` downloads wheels for its
Python into `wheels/`, which is copied with this tree. If a package is missing, the wheels are unpacked into a folder
there, one for each Python. The machine's Python is not changed. Exit code 2 if a package is still missing. This program
itself imports only the standard library.
"""

import importlib
import importlib.util
import os
import re
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
WHEELS = REPOSITORY / "wheels"
# Packages that every row needs, and those that only the row `pytest -m gpu` needs.
REQUIRED_PACKAGES = ("torch", "numpy", "yaml", "pydantic", "rich", "tokenizers", "fsspec", "safetensors", "blake3")
OPTIONAL_PACKAGES = ("pytest", "pytest_timeout")
LEAST_PYTHON = (3, 11)


def find_missing(names: Sequence[str]) -> list[str]:
    """List the names that cannot be imported, without importing them."""
    importlib.invalidate_caches()
    return [name for name in names if importlib.util.find_spec(name) is None]


def is_compatible_wheel(wheel: Path, python: str = f"{sys.version_info[0]}{sys.version_info[1]}") -> bool:
    """Return whether this Python can use a wheel: pure Python, its own ABI, or the stable ABI of an older Python."""
    tags = wheel.stem.split("-")[-3:-1]
    if any(tag.startswith("py3") for tag in tags[0].split(".")):
        return True
    stable = re.fullmatch(r"cp3(\d+)", tags[0])
    return tags[0] == f"cp{python}" or (tags[1] == "abi3" and stable is not None and int(stable[1]) <= int(python[1:]))


def unpack_wheels(wheels: Path) -> Path:
    """Unpack all compatible wheels into a folder and return it."""
    target = wheels / f"unpacked-{sys.implementation.cache_tag}"
    for wheel in sorted(wheels.glob("*.whl")):
        marker = target / f".{wheel.name}"
        if is_compatible_wheel(wheel) and not marker.exists():
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(target)
            marker.touch()
    return target


def main(arguments: Sequence[str]) -> int:
    """Start gpu.py; return only if it cannot be started."""
    if sys.version_info < LEAST_PYTHON:
        print(f"error: Python 3.11 or newer is needed, this is {sys.version.split()[0]}", file=sys.stderr)
        return 2
    path = [str(REPOSITORY)]
    if find_missing((*REQUIRED_PACKAGES, *OPTIONAL_PACKAGES)) and any(WHEELS.glob("*.whl")):
        path.insert(0, str(unpack_wheels(WHEELS)))
    path += os.environ.get("PYTHONPATH", "").split(os.pathsep) if os.environ.get("PYTHONPATH") else []
    sys.path[:0] = path
    if missing := find_missing(REQUIRED_PACKAGES):
        print(
            f"error: not installed for {sys.executable}: {', '.join(missing)}. With a network, run `make install` "
            "here. Without one, run `make gpu-wheels` where there is one, for this Python (WHEELS_PYTHON=3.12), and "
            "copy wheels/ here",
            file=sys.stderr,
        )
        return 2
    for name in find_missing(OPTIONAL_PACKAGES):
        print(f"{name} is missing: `pytest -m gpu` will be left out", file=sys.stderr)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path)}
    os.execve(sys.executable, [sys.executable, str(REPOSITORY / "benchmarks" / "gpu.py"), *arguments], environment)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
