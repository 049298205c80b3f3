"""`python -m tests.e2e.faulty FAULT RANK STEP train ...`: run the command with a fault planted before a step of one
rank.

Faults: `raise`: an exception. `sleep`: no further progress. `stop`: SIGSTOP. `usr1`, `term`, `int`, `hup`: a signal to
the rank itself. `nan`: a NaN weight, once; `nan_always`: each time. `nan_gradient`: NaN gradients after their
reduction. `garbage`: random targets. `flip`: a flipped bit of a weight. `garbled`: wrong results of a block in this
step. `slow`: each step takes 0.3 s longer, whatever STEP is. Two faults in sequence are written as `nan+usr1 0 12+10`.
"""

import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from unittest.mock import patch

import torch
from torch import Tensor

from dist_llm.cli import main
from dist_llm.engines.native import NativeEngine
from dist_llm.models.block import Block
from dist_llm.sharded import to_local
from dist_llm.training.trainer import Trainer

SIGNALS = {"stop": signal.SIGSTOP, "usr1": signal.SIGUSR1, "term": signal.SIGTERM}
SIGNALS |= {"int": signal.SIGINT, "hup": signal.SIGHUP}


def run() -> int:
    fault, rank, steps, *arguments = sys.argv[1:]
    step = Trainer.take_step
    faults = list(zip(fault.split("+"), map(int, steps.split("+")), strict=True))

    def step_with_fault(self: Trainer) -> None:
        if fault == "slow":
            time.sleep(0.3 * (self.world.rank == int(rank)))
        elif self.world.rank == int(rank) and faults and self.progress.step + 1 == faults[0][1]:
            current = faults[0][0] if faults[0][0] == "nan_always" else faults.pop(0)[0]
            if current == "raise":
                raise ValueError("planted")
            if current == "sleep":
                time.sleep(3600)
            if current in ("nan", "nan_always"):
                next(self.engine.named_parameters())[1].data.fill_(torch.nan)
            elif current == "flip":
                to_local(next(self.engine.named_parameters())[1].data).view(-1).view(torch.int32)[:1] ^= 1 << 20
            elif current == "garbled":
                with patch.object(Block, "forward", lambda *args: 1.01 * original_forward(*args).roll(1, -1)):
                    return step(self)
            elif current in FAULTY_ACCUMULATE:
                with patch.object(NativeEngine, "accumulate", FAULTY_ACCUMULATE[current]):
                    return step(self)
            else:
                os.kill(os.getpid(), SIGNALS[current])
        return step(self)

    with patch.object(Trainer, "take_step", step_with_fault):
        return main(arguments)


original_forward: Callable[..., Tensor] = Block.forward
original_accumulate: Callable[..., Tensor] = NativeEngine.accumulate


def accumulate_nan_gradients(self: NativeEngine, *args: object) -> Tensor:
    losses = original_accumulate(self, *args)
    for _, parameter in self.named_parameters():
        to_local(parameter.grad).fill_(torch.nan)
    return losses


def accumulate_random_targets(self: NativeEngine, batches: list[object], *args: object) -> Tensor:
    ids = self.config.model.vocab_size
    corrupted = [replace(batch, targets_BS=torch.randint_like(batch.targets_BS, ids)) for batch in batches]  # type: ignore[type-var, attr-defined]
    return original_accumulate(self, corrupted, *args)


FAULTY_ACCUMULATE = {"nan_gradient": accumulate_nan_gradients, "garbage": accumulate_random_targets}

if __name__ == "__main__":
    sys.exit(run())
