"""`dist-llm adopt`: make a corpus of token files of other programs, without copying."""

import argparse

from dist_llm.text.adopt_options import add_arguments, build_options

__all__ = ["add_arguments", "run"]


def run(options: argparse.Namespace) -> None:
    """Adopt token files."""
    from dist_llm.text.adopt import adopt

    adopt(build_options(options))
