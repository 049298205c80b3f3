"""The output that benchmark programs share: JSON lines on stdout, a table on stderr, and a file with --write.

The file results/<program><variant>-<device>.json contains the rows, the machine, the versions, the commit and the
command.
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

from dist_llm.training.run_files import describe_environment
from measure import count_cores, read_cpu_name

DIRECTORY = Path(__file__).parent / "results"
Row = Mapping[str, Any]


class Results:
    """The rows that one run of a benchmark program has measured; a row is one line of JSON.

    `variant` is a part of the name of the file, for programs with options of which each has a file.
    """

    def __init__(self, program: str, device: torch.device, variant: str = "") -> None:
        self.program, self.device, self.variant = program, device, variant
        self.rows: list[Row] = []

    def add(self, row: Row) -> None:
        """Print a row, with floats rounded to six digits, and store it."""
        rounded = {name: float(f"{value:.6g}") if isinstance(value, float) else value for name, value in row.items()}
        self.rows.append(rounded)
        print(json.dumps(rounded), flush=True)

    def finish(self, table: str, directory: Path | None) -> None:
        """Print the machine and a table; write the rows if `directory` is not None."""
        print(f"{self.describe_machine()}\n\n{table}", file=sys.stderr)
        if directory is not None:
            path = directory / f"{self.program}{self.variant}-{self.make_device_slug()}.json"
            path.parent.mkdir(exist_ok=True)
            command = f"python benchmarks/{self.program}.py {shlex.join(sys.argv[1:])}".strip()
            content = {"command": command, "machine": self.collect_environment(), "rows": self.rows}
            path.write_text(json.dumps(content, indent=1) + "\n")
            print(f"\nwritten: {path.name}", file=sys.stderr)

    def describe_machine(self) -> str:
        """Describe the machine in one line."""
        hardware = f"{count_cores()} cores of {read_cpu_name()}, {torch.get_num_threads()} threads"
        if self.device.type == "cuda":
            hardware = f"{torch.cuda.get_device_name(self.device)}, {hardware}"
        return f"torch {torch.__version__}, {hardware}"

    def collect_environment(self) -> dict[str, Any]:
        """Return what a run writes to environment.json, plus the CPU; `machine` has no host name here."""
        return {
            **describe_environment(),
            "machine": f"{platform.system()} {platform.machine()}",
            "cpu": read_cpu_name(),
            "cores": count_cores(),
            "threads": torch.get_num_threads(),
        }

    def make_device_slug(self) -> str:
        """Return the name of the device in the form for a file name."""
        if self.device.type == "cpu":
            return "cpu"
        return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(self.device).lower()).strip("-")


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """Make a parser with the option --write; `description` is the docstring of the program."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=raw)
    parser.add_argument(
        "--write",
        nargs="?",
        type=Path,
        const=DIRECTORY,
        metavar="DIR",
        help="write the rows to a file in benchmarks/results/, or in DIR",
    )
    return parser


def parse_options(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the command line; arguments of the form key=value may stand anywhere and become `overrides`."""
    overrides = [argument for argument in sys.argv[1:] if "=" in argument and not argument.startswith("-")]
    options = parser.parse_args([argument for argument in sys.argv[1:] if argument not in overrides])
    options.overrides = overrides
    return options


def format_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Format a table as text: the first column is aligned to the left, the others to the right."""
    lines_of_cells = [[*map(str, header)], *([*map(str, row)] for row in rows)]
    widths = [max(len(cells[column]) for cells in lines_of_cells) for column in range(len(header))]
    lines = []
    for cells in lines_of_cells:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
        padded[0] = cells[0].ljust(widths[0])
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)
