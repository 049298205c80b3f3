"""Run `dist-llm` with a fault before a step of one rank.

    python -m tests.e2e.run_with_fault FAULT RANK STEP train ...

faults.py starts this program. The faults:
  raise                  an exception
  sleep                  no further progress
  stop                   SIGSTOP to the rank
  usr1, term, int, hup   this signal to the rank
  nan, nan_always        a NaN in a weight, once or each time that the step runs
  nan_gradient           NaN gradients after their reduction
  random_targets         random targets in this step
  flip                   a flipped bit of a weight
  wrong_block            wrong outputs of all blocks in this step
  slow                   each step of the rank takes SLOW_SECONDS longer; STEP is ignored
  none                   no fault
Two faults in sequence are written as `nan+usr1 0 12+10`: nan before step 12, then usr1 before step 10.
"""

import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from dist_llm.cli import main
from dist_llm.engines.native import NativeEngine
from dist_llm.models.block import Block
from dist_llm.sharded import to_local
from dist_llm.training.trainer import Trainer

SLOW_SECONDS = 0.3
BIT_MASK = 1 << 20  # the bit of an fp32 weight that `flip` changes, in its mantissa
SIGNALS = {"stop": signal.SIGSTOP, "usr1": signal.SIGUSR1, "term": signal.SIGTERM}
SIGNALS |= {"int": signal.SIGINT, "hup": signal.SIGHUP}


def run() -> int:
    """Run the command with the faults of the command line; return its exit code."""
    fault_names, rank, steps, *arguments = sys.argv[1:]
    original_step = Trainer.take_step
    faults = list(zip(fault_names.split("+"), map(int, steps.split("+")), strict=True))

    def step_with_fault(self: Trainer) -> None:
        if fault_names == "slow":
            time.sleep(SLOW_SECONDS if self.world.rank == int(rank) else 0.0)
        elif self.world.rank == int(rank) and faults and self.progress.step + 1 == faults[0][1]:
            fault = faults[0][0] if faults[0][0] == "nan_always" else faults.pop(0)[0]
            if fault == "raise":
                raise ValueError("planted")
            if fault == "sleep":
                time.sleep(3600)
            if fault in ("nan", "nan_always"):
                next(self.engine.named_parameters())[1].data.fill_(torch.nan)
            elif fault == "flip":
                to_local(next(self.engine.named_parameters())[1].data).view(-1).view(torch.int32)[:1] ^= BIT_MASK
            elif fault == "wrong_block":
                with patch.object(Block, "forward", forward_wrong_block):
                    return original_step(self)
            elif fault in FAULTY_ACCUMULATE:
                with patch.object(NativeEngine, "accumulate", FAULTY_ACCUMULATE[fault]):
                    return original_step(self)
            else:
                os.kill(os.getpid(), SIGNALS[fault])
        return original_step(self)

    with patch.object(Trainer, "take_step", step_with_fault):
        return main(arguments)


original_forward = Block.forward
original_accumulate: Callable[..., Tensor] = NativeEngine.accumulate


def forward_wrong_block(self: Block, *args: Any) -> tuple[Tensor, Tensor | None]:
    x_BSD, router_stats = original_forward(self, *args)
    return 1.01 * x_BSD.roll(1, -1), router_stats


def accumulate_nan_gradients(self: NativeEngine, *args: object) -> Tensor:
    """Compute the losses, and set all gradients to NaN."""
    losses = original_accumulate(self, *args)
    for _, parameter in self.named_parameters():
        assert parameter.grad is not None
        to_local(parameter.grad).fill_(torch.nan)
    return losses


def accumulate_random_targets(self: NativeEngine, batches: list[object], *args: object) -> Tensor:
    """Accumulate the batches with random targets in place of theirs."""
    vocab_size = self.config.model.vocab_size
    corrupted = [replace(batch, targets_BS=torch.randint_like(batch.targets_BS, vocab_size)) for batch in batches]  # type: ignore[type-var, attr-defined]
    return original_accumulate(self, corrupted, *args)


FAULTY_ACCUMULATE = {"nan_gradient": accumulate_nan_gradients, "random_targets": accumulate_random_targets}

if __name__ == "__main__":
    sys.exit(run())
