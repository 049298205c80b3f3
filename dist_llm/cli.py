"""The `dist-llm` command: parse the arguments, run a subcommand and report user errors.

The subcommands import torch and other large modules when they run, so --help is fast.
"""

import argparse
import atexit
import gc
import signal
import sys
import time
from collections.abc import Sequence
from types import ModuleType

from dist_llm.commands import (
    adopt_corpus,
    check_nodes,
    convert_checkpoint,
    evaluate_model,
    generate_text,
    inspect_data,
    prepare_corpus,
    submit_job,
    train_model,
)
from dist_llm.errors import ConfigError, UserError, to_user_error

OVERVIEW = """\
Pretrain language models. From raw text to a trained model:

  dist-llm prepare --source python-stdlib --tokenizer bpe:4096 --out data/stdlib
  dist-llm train --config configs/demo.yaml
  dist-llm evaluate --checkpoint runs/demo
  dist-llm generate --checkpoint runs/demo --prompt "def "
  dist-llm convert to-hf runs/demo hf/demo

The same config runs on several processes, also on several nodes:

  torchrun --nproc-per-node 8 -m dist_llm train --config configs/demo.yaml

Preflight: find bad or slow nodes before a long run. Launch it the same way as train:

  torchrun --nproc-per-node 8 -m dist_llm check --directory runs
"""

OTHER_RANK_DELAY_SECONDS = 3.0  # before a rank other than 0 prints an error
# Command -> its module, which has add_arguments(parser) and run(options), and its help text.
COMMANDS: dict[str, tuple[ModuleType, str]] = {
    "prepare": (prepare_corpus, "tokenize raw text into token shards"),
    "adopt": (adopt_corpus, "make a corpus of token files of other programs, without copying"),
    "data": (inspect_data, "inspect a corpus, and what a run reads from it"),
    "check": (check_nodes, "preflight: find bad or slow nodes; launch it the same way as train"),
    "train": (train_model, "train a model on token shards"),
    "submit": (submit_job, "submit a training run to Slurm"),
    "evaluate": (evaluate_model, "compute loss, perplexity and bits per byte on held-out text"),
    "generate": (generate_text, "generate text with a trained model"),
    "convert": (convert_checkpoint, "convert, compare, inspect and verify checkpoints"),
}


def build_parser() -> argparse.ArgumentParser:
    """Build the argument parser of all commands."""
    parser = argparse.ArgumentParser(
        "dist-llm", description=OVERVIEW, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")
    for name, (module, help_text) in COMMANDS.items():
        module.add_arguments(subparsers.add_parser(name, help=help_text))
    return parser


def run() -> None:
    """Run the command as a process: the entry point of `dist-llm` and `python -m dist_llm`."""
    # Importing torch creates about 300,000 objects and no garbage. Scanning them took a second of a short command.
    gc.set_threshold(100_000, 50, 50)  # objects of generation 0, and collections between those of older generations
    atexit.register(gc.freeze)
    # SIGUSR1, Slurm's warning of the time limit, stays pending until the training loop has installed its handler. Its
    # default action is set to ignore, so that it kills no command through a thread that does not block it.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    sys.exit(main())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Exit code 0: success. 1: a bug, or a difference. 2: a user error. 128 + N: signal N."""
    options = build_parser().parse_args(arguments)
    try:
        return COMMANDS[options.command][0].run(options) or 0
    except UserError as error:
        return _report_error(error)
    except OSError as error:
        if (user_error := to_user_error(error)) is None:
            raise
        return _report_error(user_error)
    except UnicodeEncodeError as error:
        if error.encoding.replace("-", "").lower().startswith("utf"):
            raise  # a bug in our text, not a limit of the terminal
        return _report_error(
            UserError(
                f"standard output uses {error.encoding} and cannot show {error.object[error.start : error.end]!a}; "
                "set PYTHONUTF8=1, or a UTF-8 locale such as LC_ALL=C.UTF-8"
            )
        )
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _report_error(error: UserError) -> int:
    from dist_llm.launch.world import World, read_world

    try:
        world = read_world()
    except ConfigError:
        world = World()  # the rank itself is unknown, so print without a delay
    if not world.is_main:
        # Usually all ranks fail with the same error and rank 0 reports it: torchrun then ends the other ranks during
        # this pause. A rank that fails alone reports its own error after the pause.
        time.sleep(OTHER_RANK_DELAY_SECONDS)
        print(f"rank {world.rank} on {world.host}:", file=sys.stderr)
    print(f"error: {error}", file=sys.stderr)
    return 2
