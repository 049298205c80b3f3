"""The `dist-llm` command. Imports are late, so that --help comes at once."""

import argparse
import atexit
import gc
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from dist_llm.errors import ConfigError, UserError, user_error_of

OVERVIEW = """\
Pre-train language models. From raw text to a trained model:

  dist-llm prepare --source python-stdlib --tokenizer bpe:4096 --out data/stdlib
  dist-llm train --config configs/demo.yaml
  dist-llm evaluate --checkpoint runs/demo
  dist-llm generate --checkpoint runs/demo --prompt "def "

The same config on several processes, and on several nodes:

  torchrun --nproc-per-node 8 -m dist_llm train --config configs/demo.yaml

Before a long one, started in the same way, what is wrong with which node:

  torchrun --nproc-per-node 8 -m dist_llm check --directory runs
"""

TRAIN = """\
Any key of the config can be set on the command line: run.steps=100 optim.lr=3e-4.
All keys, their types, defaults and meaning: dist-llm train --help-config
A run that finds a checkpoint in run.dir goes on from it.

  dist-llm train --config configs/demo.yaml run.dir=runs/a run.steps=20
  dist-llm train --debug configs/demo.yaml        one process, a few steps, everything checked
  torchrun --nproc-per-node 2 -m dist_llm train --config configs/demo.yaml parallel.dp_shard=2
"""

SUBMIT = """\
Renders a batch script, shows it, and hands it to sbatch. The config is checked for its number of ranks before.

  dist-llm submit configs/gpt2-xl.yaml run.dir=runs/xl --nodes 16 --tasks-per-node 8 --gpus-per-node 8 --time 24:00:00
  dist-llm submit configs/debug.yaml --sweep optim.lr=1e-3,3e-4 --sweep run.seed=1,2 --dry-run
"""


def parser() -> argparse.ArgumentParser:
    """The command line, with help that teaches."""
    from dist_llm.text import adopt_options, options

    raw = argparse.RawDescriptionHelpFormatter
    top = argparse.ArgumentParser("dist-llm", description=OVERVIEW, formatter_class=raw)
    commands = top.add_subparsers(
        dest="command", required=True, metavar="prepare | adopt | check | train | submit | evaluate | generate"
    )

    options.add_arguments(commands.add_parser("prepare", help="raw text -> token shards"))

    adopt = commands.add_parser("adopt", help="token files of other programs -> a corpus that points at them")
    adopt_options.add_arguments(adopt)

    check = commands.add_parser("check", help="what is wrong with which node; start it as you would start train")
    check.add_argument(
        "--directory", type=Path, default=Path(), metavar="DIR", help="to be shared by all nodes; default: this one"
    )
    check.add_argument("--seconds", type=float, default=60.0, metavar="S", help="at most so many; default: 60")

    train = commands.add_parser("train", help="token shards -> a model", epilog=TRAIN, formatter_class=raw)
    train.add_argument("--config", type=Path, metavar="FILE", help="the run, as YAML")
    train.add_argument("--debug", action="store_true", help="one process, eager and deterministic; checks every part")
    train.add_argument("--help-config", action="store_true", help="print key, type, default and meaning of all keys")
    train.add_argument(
        "rest", nargs="*", metavar="FILE | key=value", help="the config, if not given by --config; overrides"
    )

    submit = commands.add_parser("submit", help="train on Slurm", epilog=SUBMIT, formatter_class=raw)
    submit.add_argument("config", type=Path, metavar="FILE", help="the run, as YAML")
    submit.add_argument("rest", nargs="*", metavar="key=value", help="overrides")
    submit.add_argument("--nodes", type=int, default=1, metavar="N", help="default: 1")
    submit.add_argument("--tasks-per-node", type=int, default=1, metavar="N", help="ranks of a node; default: 1")
    submit.add_argument("--sweep", action="append", default=[], metavar="KEY=A,B", help="an array; may be repeated")
    submit.add_argument("--sbatch", action="append", default=[], metavar="OPTION", help="of sbatch; may be repeated")
    submit.add_argument("--time", metavar="LIMIT", help="as --sbatch=--time=LIMIT")
    submit.add_argument("--gpus-per-node", metavar="N", help="as --sbatch=--gpus-per-node=N")
    submit.add_argument("--dry-run", action="store_true", help="show the script, submit nothing")

    evaluate = commands.add_parser("evaluate", help="loss, perplexity and bits per byte on held-out text")
    evaluate.add_argument("--checkpoint", required=True, metavar="DIR", help="a run or one checkpoint; may be a URL")
    evaluate.add_argument("--data", metavar="DIR", help="another prepared corpus of the same tokenizer")
    evaluate.add_argument("--split", choices=("heldout", "train"), default="heldout", help="default: heldout")
    evaluate.add_argument("--micro-batch", type=int, default=0, metavar="N", help="default: the run's")
    evaluate.add_argument(
        "--seq-len",
        type=int,
        default=0,
        metavar="N",
        help="tokens per window; default: the run's data.seq_len, or at most 2048 where the model was not trained here",
    )

    generate = commands.add_parser("generate", help="text from a trained model")
    generate.add_argument("--checkpoint", required=True, metavar="DIR", help="a run or one checkpoint; may be a URL")
    generate.add_argument("--prompt", action="append", metavar="TEXT", help="may be repeated; default: none")
    generate.add_argument("--max-tokens", type=int, default=128, metavar="N", help="default: 128")
    generate.add_argument("--temperature", type=float, default=1.0, metavar="T", help="0: greedy; default: 1")
    generate.add_argument("--top-p", type=float, default=1.0, metavar="P", help="nucleus; default: 1, all tokens")
    generate.add_argument("--top-k", type=int, default=0, metavar="K", help="default: 0, all tokens")
    generate.add_argument("--seed", type=int, default=0, help="default: 0")
    generate.add_argument(
        "--offload", metavar="DIR", help="of a model larger than memory: a directory on a fast disk for the rest of it"
    )
    generate.add_argument("--memory", type=float, metavar="GiB", help="with --offload: of host memory at most so much")
    return top


def run() -> None:
    """The command as a process of its own."""
    # torch makes some 300,000 objects on import, and no garbage: to look through them took a second of a short command.
    gc.set_threshold(100_000, 50, 50)
    atexit.register(gc.freeze)
    # Slurm's word that the time limit is near waits until training listens, and fails nothing that ends by itself:
    # threads that training started do not block it.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    sys.exit(main())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. 0: done. 1: a failure of ours. 2: input that the user can mend. 128 + N: stopped by signal N."""
    options = parser().parse_args(arguments)
    commands: dict[str, Callable[[argparse.Namespace], int | None]] = {
        "prepare": _prepare,
        "adopt": _adopt,
        "check": _check,
        "train": _train,
        "submit": _submit,
        "evaluate": _evaluate,
        "generate": _generate,
    }
    try:
        return commands[options.command](options) or 0
    except UserError as error:
        return _refuse(error)
    except OSError as error:
        if (mendable := user_error_of(error)) is None:
            raise
        return _refuse(mendable)
    except UnicodeEncodeError as error:
        if error.encoding.replace("-", "").lower().startswith("utf"):
            raise  # not the terminal's encoding
        return _refuse(
            UserError(
                f"standard output is {error.encoding} and cannot show {error.object[error.start : error.end]!a}; "
                "set PYTHONUTF8=1, or a UTF-8 locale such as LC_ALL=C.UTF-8"
            )
        )
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _refuse(error: UserError) -> int:
    from dist_llm.launch.world import World, read_world

    try:
        world = read_world()
    except ConfigError:
        world = World()  # who we are is what is wrong: speak at once
    if not world.main:
        # All ranks mostly fail alike, and rank 0 speaks for them: torchrun then ends the others in
        # this pause. A rank that fails alone gets to say so.
        time.sleep(3)
        print(f"rank {world.rank} on {world.host}:", file=sys.stderr)
    print(f"error: {error}", file=sys.stderr)
    return 2


def _prepare(options: argparse.Namespace) -> None:
    from dist_llm.text.options import build_options

    if options.merge:
        from dist_llm.text.merge import merge_parts

        merge_parts(options.merge)
        return
    chosen = build_options(options)
    from dist_llm.text.prepare import prepare

    prepare(chosen)


def _adopt(options: argparse.Namespace) -> None:
    from dist_llm.text.adopt import adopt
    from dist_llm.text.adopt_options import build_options

    adopt(build_options(options))


def _check(options: argparse.Namespace) -> None:
    from dist_llm.launch.world import read_world

    world = read_world()
    from dist_llm.launch.preflight import check

    check(options.directory, options.seconds, world)


def _train(options: argparse.Namespace) -> int:
    if options.help_config:
        _help_config()
        return 0
    files = [Path(item) for item in options.rest if "=" not in item]
    files += [options.config] if options.config else []
    if len(files) != 1:
        raise ConfigError(
            f"give one config file, found {len(files)}; for example: dist-llm train --config configs/demo.yaml"
        )
    overrides = [item for item in options.rest if "=" in item]
    from dist_llm.config.derive import AXES
    from dist_llm.launch.world import read_world
    from dist_llm.train.settings import read_config

    if options.debug:
        config = read_config(files[0], [*overrides, *(f"parallel.{axis}=1" for axis in AXES), "data.prefetch=0"], 1)
        from dist_llm.train.debug import debug

        debug(config)
        return 0
    world = read_world()
    config = read_config(files[0], overrides, world.size)  # torch is not imported before the config is right
    from torch.distributed.elastic.multiprocessing.errors import record

    from dist_llm.train.run import train

    # `record` hands the exception to torchrun, whose last lines name rank, host and cause.
    told = record(train)(config, world) or 0
    return 128 + told if told else 0


def _submit(options: argparse.Namespace) -> None:
    from dist_llm.launch.submit import Job, directories, parse_sweep, render, submit
    from dist_llm.train.settings import read_config

    asked = [
        f"--{name}={value}" for name in ("time", "gpus-per-node") if (value := vars(options)[name.replace("-", "_")])
    ]
    sizes = options.nodes, options.tasks_per_node
    if min(sizes) < 1:
        raise ConfigError(f"--nodes {sizes[0]}, --tasks-per-node {sizes[1]}: both must be at least 1")
    job = Job(options.config, tuple(options.rest), *sizes, (*asked, *options.sbatch), parse_sweep(options.sweep))
    configs = [read_config(job.config, run, job.ranks) for run in job.runs]
    places = directories(job, configs[0].run.dir)
    script = render(job, places)
    print(script)
    if options.dry_run:
        return
    number = submit(script)
    print(
        f"job {number}; its output: slurm-{number}{'_*' if job.sweep else ''}.log; its runs:", *places, file=sys.stderr
    )
    print(f"squeue --job {number}; scancel {number}; tensorboard --logdir {configs[0].run.dir}", file=sys.stderr)


def _help_config() -> None:
    from dist_llm.config.load import describe

    with _reader_may_leave():
        for name, kind, default, description in describe():
            print(f"{name}\n    {kind}; default: {default}\n    {description}")


def _evaluate(options: argparse.Namespace) -> None:
    from dist_llm.launch.world import read_world
    from dist_llm.train.score import Windows, score

    if min(options.micro_batch, options.seq_len) < 0:
        raise ConfigError("--micro-batch and --seq-len: must be at least 1, or 0 for the default")
    windows = Windows(options.seq_len, options.micro_batch)
    score(options.checkpoint, options.data, options.split, windows, read_world())


def _generate(options: argparse.Namespace) -> None:
    from dist_llm.generate import Offload, Sampling, stream

    if (options.offload is None) != (options.memory is None):
        raise ConfigError("--offload and --memory go together: what does not fit into the one's GiB goes to the other")
    if options.memory is not None and not 0 < options.memory < float("inf"):
        raise ConfigError(f"--memory {options.memory}: must be above 0")
    offload = Offload(Path(options.offload), int(options.memory * 2**30)) if options.offload else None
    sampling = Sampling(options.max_tokens, options.temperature, options.top_k, options.top_p, options.seed)
    with _reader_may_leave():
        stream(options.checkpoint, options.prompt or [""], sampling, offload)


@contextmanager
def _reader_may_leave() -> Iterator[None]:
    """Around what only prints: when the reader of a pipe has seen enough (`| head`), end quietly."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        # What is left in the buffer must go somewhere, or Python complains at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
