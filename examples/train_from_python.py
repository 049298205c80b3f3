"""Train from Python: prepare a corpus, train a small model, evaluate it and sample from it.

    python examples/train_from_python.py
    torchrun --nproc-per-node 2 examples/train_from_python.py --corpus data/stdlib parallel.dp_shard=2

--corpus names an existing corpus. torchrun needs it, because only a single process prepares a corpus.
"""

import argparse
from pathlib import Path

import dist_llm


def main() -> None:
    """Prepare a corpus, train, evaluate, and generate a text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, help="default: prepare the source code of the standard library")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of config keys")
    options = parser.parse_args()
    corpus = options.corpus or Path("data/example")
    if options.corpus is None and not corpus.exists():
        dist_llm.prepare("python-stdlib", corpus, tokenizer="bpe:1024", heldout_fraction=0.05)
    config = {
        "run": {"dir": "runs/example", "steps": 50},
        "model": {"d_model": 128, "n_layers": 2, "n_heads": 4},
        "data": {"path": str(corpus), "seq_len": 128, "global_batch": 8},
        "optim": {"lr": 3e-3},
        "schedule": {"warmup_steps": 10},
    }
    run = dist_llm.train(config, *options.overrides)
    evaluation = dist_llm.evaluate(run)  # printed by rank 0
    if evaluation.loss > 8:
        raise SystemExit("the model has not learned anything")
    print(dist_llm.generate(run, "def ", max_tokens=40))


if __name__ == "__main__":
    main()
