"""`dist-llm generate`: generate text with a trained model."""

import argparse
from pathlib import Path

from dist_llm.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `dist-llm generate`."""
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="run or checkpoint directory, or URL")
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="repeatable; default: an empty prompt")
    parser.add_argument("--max-tokens", type=int, default=128, metavar="N", help="tokens to generate; default: 128")
    parser.add_argument("--temperature", type=float, default=1.0, metavar="T", help="0 is greedy; default: 1")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="top-p sampling; 1, the default: off")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="top-k sampling; 0, the default: off")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling; default: 0")
    parser.add_argument("--offload", metavar="DIR", help="on a fast disk: keep the weights beyond --memory there")
    parser.add_argument("--memory", type=float, metavar="GiB", help="with --offload: limit of host memory")


def run(options: argparse.Namespace) -> None:
    """Print a continuation of each prompt."""
    from dist_llm.commands.output import ignore_broken_pipe
    from dist_llm.generation import OffloadOptions, Sampling, print_continuations

    if (options.offload is None) != (options.memory is None):
        raise ConfigError(
            "--offload and --memory must be set together: weights beyond --memory GiB go to the --offload directory"
        )
    if options.memory is not None and not 0 < options.memory < float("inf"):
        raise ConfigError(f"--memory {options.memory}: must be above 0")
    offload = OffloadOptions(Path(options.offload), int(options.memory * 2**30)) if options.offload else None
    sampling = Sampling(options.max_tokens, options.temperature, options.top_k, options.top_p, options.seed)
    with ignore_broken_pipe():
        print_continuations(options.checkpoint, options.prompt or [""], sampling, offload)
