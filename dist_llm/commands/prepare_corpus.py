"""`dist-llm prepare`: tokenize raw text into token shards."""

import argparse

from dist_llm.text.options import add_arguments, build_options

__all__ = ["add_arguments", "run"]


def run(options: argparse.Namespace) -> None:
    """Prepare a corpus, or merge its parts."""
    if options.merge:
        from dist_llm.text.merge import merge_parts

        merge_parts(options.merge)
        return
    prepare_options = build_options(options)
    from dist_llm.text.prepare import prepare

    prepare(prepare_options)
