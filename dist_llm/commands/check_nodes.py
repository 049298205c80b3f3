"""`dist-llm check`: find bad or slow nodes before a long run."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `dist-llm check`."""
    parser.add_argument(
        "--directory", type=Path, default=Path(), metavar="DIR", help="shared by all nodes; default: the current one"
    )
    parser.add_argument("--seconds", type=float, default=60.0, metavar="S", help="time limit; default: 60")


def run(options: argparse.Namespace) -> None:
    """Measure all nodes and print a report. Raises an error that names the bad nodes."""
    from dist_llm.launch.world import read_world

    world = read_world()
    from dist_llm.launch.preflight import run_preflight

    run_preflight(options.directory, options.seconds, world)
