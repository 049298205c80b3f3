"""Make missing packages importable from the wheels in `wheels/`, then run gpu.py: the program of `make gpu`.

A machine with a GPU may lack a network and packages that training needs. `make gpu-wheels` downloads wheels for the
Python of that machine into `wheels/`, and the user copies `wheels/` to the machine with this tree. If a package is
missing, this program unpacks the wheels into a folder in `wheels/`, one for each version of Python. It does not change
the installed Python and imports only the standard library. Exit code 2: a package is still missing.
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
# Modules that all cases need, and modules that only the case `pytest -m gpu` needs.
REQUIRED_PACKAGES = ("torch", "numpy", "yaml", "pydantic", "rich", "tokenizers", "fsspec", "safetensors", "blake3")
OPTIONAL_PACKAGES = ("pytest", "pytest_timeout")
MIN_PYTHON = (3, 11)


def find_missing(names: Sequence[str]) -> list[str]:
    """List the modules that cannot be imported, without importing them."""
    importlib.invalidate_caches()
    return [name for name in names if importlib.util.find_spec(name) is None]


def is_compatible_wheel(wheel: Path, python: str = f"{sys.version_info[0]}{sys.version_info[1]}") -> bool:
    """Return whether this Python can use a wheel: pure Python, its own ABI, or the stable ABI of an older Python."""
    python_tag, abi_tag = wheel.stem.split("-")[-3:-1]
    if any(tag.startswith("py3") for tag in python_tag.split(".")):
        return True
    cpython = re.fullmatch(r"cp3(\d+)", python_tag)
    has_stable_abi = abi_tag == "abi3" and cpython is not None and int(cpython[1]) <= int(python[1:])
    return python_tag == f"cp{python}" or has_stable_abi


def unpack_wheels(wheels: Path) -> Path:
    """Unpack all compatible wheels into a folder, each wheel once, and return the folder."""
    target = wheels / f"unpacked-{sys.implementation.cache_tag}"
    for wheel in sorted(wheels.glob("*.whl")):
        marker = target / f".{wheel.name}"
        if is_compatible_wheel(wheel) and not marker.exists():
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(target)
            marker.touch()
    return target


def main(arguments: Sequence[str]) -> int:
    """Replace this process by gpu.py; return an exit code only if gpu.py cannot be started."""
    if sys.version_info < MIN_PYTHON:
        print(f"error: Python 3.11 or newer is needed, this is {sys.version.split()[0]}", file=sys.stderr)
        return 2
    import_path = [str(REPOSITORY)]
    if find_missing((*REQUIRED_PACKAGES, *OPTIONAL_PACKAGES)) and any(WHEELS.glob("*.whl")):
        import_path.insert(0, str(unpack_wheels(WHEELS)))
    import_path += os.environ.get("PYTHONPATH", "").split(os.pathsep) if os.environ.get("PYTHONPATH") else []
    sys.path[:0] = import_path
    if missing := find_missing(REQUIRED_PACKAGES):
        print(
            f"error: not installed for {sys.executable}: {', '.join(missing)}. If this machine has a network, run "
            "`make install`. If not, run `make gpu-wheels` for this Python (WHEELS_PYTHON=3.12) on a machine with a "
            "network and copy wheels/ here",
            file=sys.stderr,
        )
        return 2
    for name in find_missing(OPTIONAL_PACKAGES):
        print(f"{name} is missing: the case `pytest -m gpu` will be skipped", file=sys.stderr)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(import_path)}
    os.execve(sys.executable, [sys.executable, str(REPOSITORY / "benchmarks" / "gpu.py"), *arguments], environment)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
