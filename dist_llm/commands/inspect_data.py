"""`dist-llm data`: its actions and their arguments."""

import argparse
from pathlib import Path

from dist_llm.commands.call_function import call_function

DESCRIPTION = "Inspect a corpus, and what a run reads from it. No GPU and no process group are needed."

EPILOG = """\
examples:
  dist-llm data show --run runs/demo --step 7
  dist-llm data show --run runs/demo --step 7 --rank 1 --ranks 2
  dist-llm data find "def quicksort" --run runs/demo
  dist-llm data verify data/stdlib
  dist-llm data stats data/stdlib --picture stats.png
  dist-llm data to-bin data/stdlib nanogpt/data/stdlib

Exit code 0: success. 1: verify found a problem, or find found no document. 2: a user error.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the actions of `dist-llm data`. Each names the function to call, as `module:function`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION", title="actions")

    def add_action(name: str, function: str, help_text: str) -> argparse.ArgumentParser:
        action = actions.add_parser(name, help=help_text, description=f"{help_text[0].upper()}{help_text[1:]}.")
        action.set_defaults(function=f"dist_llm.commands.{function}")
        return action

    action = add_action("show", "show_samples:show_samples", "decode the documents that one step of a run reads")
    action.add_argument("--run", type=Path, required=True, metavar="DIR", help="run.dir of a training run")
    action.add_argument("--step", type=int, required=True, metavar="N", help="the first step is 1")
    action.add_argument("--rank", type=int, metavar="N", help="one data-parallel rank; default: all")
    help_text = "number of data-parallel ranks; default: the run's"
    action.add_argument("--ranks", type=int, dest="num_ranks", metavar="N", help=help_text)
    action.add_argument("--full-text", "--whole", action="store_true", help="print documents in full")

    action = add_action("find", "find_text:find_text", "list the steps that read the documents with a given text")
    action.add_argument("text", metavar="TEXT", help="text that the documents contain")
    action.add_argument("--run", type=Path, required=True, metavar="DIR", help="run.dir of a training run")

    verify = add_action("verify", "verify_corpus:verify", "check the hashes, ids and document boundaries of a corpus")
    stats = add_action("stats", "corpus_stats:print_stats", "print document lengths and token frequencies")
    for action in (verify, stats):
        action.add_argument("corpora", type=Path, nargs="*", metavar="CORPUS", help="directory of prepare or adopt")
        action.add_argument("--run", type=Path, metavar="DIR", help="use the corpora of this run")
    stats.add_argument("--picture", type=Path, metavar="FILE", help="draw the distributions to a PNG file")

    action = add_action("to-bin", "corpus_stats:to_bin", "export a corpus as train.bin and val.bin of nanoGPT")
    action.add_argument("corpus", metavar="CORPUS", help="directory of prepare or adopt, or URL")
    action.add_argument("out", type=Path, metavar="OUT", help="directory to create")


def run(options: argparse.Namespace) -> int:
    """Call the function of the action. Returns its exit code."""
    return call_function(options)
