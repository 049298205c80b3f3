"""`dist-llm evaluate`: loss, perplexity and bits per byte of a checkpoint on held-out text."""

import argparse

from dist_llm.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `dist-llm evaluate`."""
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="run or checkpoint directory, or URL")
    parser.add_argument("--data", metavar="DIR", help="another prepared corpus with the same tokenizer")
    parser.add_argument("--split", choices=("heldout", "train"), default="heldout", help="default: heldout")
    parser.add_argument(
        "--micro-batch", type=int, default=0, metavar="N", help="sequences per microbatch; default: the run's"
    )
    parser.add_argument(
        "--seq-len",
        type=int,
        default=0,
        metavar="N",
        help="tokens per window; default: the run's data.seq_len, or at most 2048 for an imported model",
    )


def run(options: argparse.Namespace) -> None:
    """Evaluate and print."""
    if min(options.micro_batch, options.seq_len) < 0:
        raise ConfigError("--micro-batch and --seq-len: must be at least 1, or 0 for the default")
    from dist_llm.launch.world import read_world
    from dist_llm.training.evaluate_checkpoint import EvaluationOptions, evaluate_checkpoint

    evaluation_options = EvaluationOptions(seq_len=options.seq_len, micro_batch=options.micro_batch)
    evaluate_checkpoint(options.checkpoint, options.data, options.split, evaluation_options, read_world())
