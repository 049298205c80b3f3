"""Train a small model with several learning rates in one process and compare the held-out losses.

    python examples/sweep.py --corpus data/stdlib --lr 1e-3 3e-3 1e-2

On Slurm, `dist-llm submit --sweep optim.lr=1e-3,3e-3,1e-2` runs such a sweep as a job array instead.
"""

import argparse
from pathlib import Path

import dist_llm


def main() -> None:
    """Train with each learning rate, and print the held-out losses from low to high."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="a prepared corpus")
    parser.add_argument("--lr", type=float, nargs="+", default=[1e-3, 3e-3, 1e-2], help="learning rates")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of config keys")
    options = parser.parse_args()
    heldout_losses = {}
    for lr in options.lr:
        overrides = (f"data.path={options.corpus}", f"optim.lr={lr}", f"run.dir=runs/sweep/lr={lr:g}")
        run = dist_llm.train("debug", *overrides, *options.overrides)
        heldout_losses[lr] = dist_llm.evaluate(run).loss
    for lr, loss in sorted(heldout_losses.items(), key=lambda item: item[1]):
        print(f"lr {lr:g}: held-out loss {loss:.4f}")


if __name__ == "__main__":
    main()
