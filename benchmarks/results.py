"""Results of a program: JSON lines on stdout, a table on stderr, and a file with --write.

The file is results/<program>-<device>.json, with the rows, the machine, the versions, the commit and the command.
"""

import argparse
import json
import platform
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dist_llm.training.run import describe_environment
from measure import cores, cpu_name

DIRECTORY = Path(__file__).parent / "results"
Row = Mapping[str, Any]


class Results:
    """The rows of one run of one program."""

    def __init__(self, program: str, device: torch.device) -> None:
        self.program, self.device = program, device
        self.rows: list[Row] = []

    def add(self, row: Row) -> None:
        """Print a row, with floats of six digits, and store it."""
        self.rows.append({name: float(f"{v:.6g}") if isinstance(v, float) else v for name, v in row.items()})
        print(json.dumps(self.rows[-1]), flush=True)

    def finish(self, text: str, directory: Path | None) -> None:
        """Print a table with the machine; write the rows if there is a directory."""
        print(f"{self.machine()}\n\n{text}", file=sys.stderr)
        if directory is not None:
            path = directory / f"{self.program}-{self.slug()}.json"
            path.parent.mkdir(exist_ok=True)
            command = f"python benchmarks/{self.program}.py {shlex.join(sys.argv[1:])}".strip()
            content = {"command": command, "machine": self.facts(), "rows": self.rows}
            path.write_text(json.dumps(content, indent=1) + "\n")
            print(f"\nwritten: {path.name}", file=sys.stderr)

    def machine(self) -> str:
        """Describe the machine in one line."""
        where = f"{cores()} cores of {cpu_name()}, {torch.get_num_threads()} threads"
        if self.device.type == "cuda":
            where = f"{torch.cuda.get_device_name(self.device)}, {where}"
        return f"torch {torch.__version__}, {where}"

    def facts(self) -> dict[str, Any]:
        """Return the facts of a run's environment.json, with the processor and only the kind of system."""
        return {
            **describe_environment(),
            "machine": f"{platform.system()} {platform.machine()}",
            "cpu": cpu_name(),
            "cores": cores(),
            "threads": torch.get_num_threads(),
        }

    def slug(self) -> str:
        """Return the device in the form for a file name."""
        if self.device.type == "cpu":
            return "cpu"
        return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(self.device).lower()).strip("-")


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """Make a parser that shows the program's docstring, with --write."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=raw)
    parser.add_argument(
        "--write",
        nargs="?",
        type=Path,
        const=DIRECTORY,
        metavar="DIR",
        help="keep the rows in benchmarks/results/, or DIR",
    )
    return parser


def parse_options(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the command line, with its key=value arguments, at any position, in `overrides`."""
    overrides = [argument for argument in sys.argv[1:] if "=" in argument and not argument.startswith("-")]
    options = parser.parse_args([argument for argument in sys.argv[1:] if argument not in overrides])
    options.overrides = overrides
    return options


def format_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Format columns as wide as needed: the first to the left, the others to the right."""
    cells = [[*map(str, header)], *([*map(str, row)] for row in rows)]
    widths = [max(len(line[number]) for line in cells) for number in range(len(header))]
    lines = []
    for line in cells:
        first, *rest = (
            f"{c:<{w}}" if n == 0 else f"{c:>{w}}" for n, (c, w) in enumerate(zip(line, widths, strict=True))
        )
        lines.append("  ".join((first, *rest)).rstrip())
    return "\n".join(lines)
