"""`python -m tests.e2e.faulty FAULT RANK STEP train ...`: the command, with a fault planted before a step of one rank.

raise: an exception. sleep: it goes on with nothing. stop: SIGSTOP. usr1, term, int, hup: a signal to itself.
nan: a weight, once; nan_always: each time. nan_gradient: gradients, once reduced. garbage: other targets than those of
the text. flip: a bit of a weight. garbled: the results of a block, in this step. slow: 0.3 s longer in each step,
whatever the STEP. Two faults at their steps, one after the other: nan+usr1 0 12+10.
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
from dist_llm.train.trainer import Trainer

SIGNALS = {"stop": signal.SIGSTOP, "usr1": signal.SIGUSR1, "term": signal.SIGTERM}
SIGNALS |= {"int": signal.SIGINT, "hup": signal.SIGHUP}


def run() -> int:
    fault, rank, at, *arguments = sys.argv[1:]
    step = Trainer.step
    faults = list(zip(fault.split("+"), map(int, at.split("+")), strict=True))

    def faulty(self: Trainer) -> None:
        if fault == "slow":
            time.sleep(0.3 * (self.world.rank == int(rank)))
        elif self.world.rank == int(rank) and faults and self.progress.step + 1 == faults[0][1]:
            now = faults[0][0] if faults[0][0] == "nan_always" else faults.pop(0)[0]
            if now == "raise":
                raise ValueError("planted")
            if now == "sleep":
                time.sleep(3600)
            if now in ("nan", "nan_always"):
                next(self.engine.named_parameters())[1].data.fill_(torch.nan)
            elif now == "flip":
                to_local(next(self.engine.named_parameters())[1].data).view(-1).view(torch.int32)[:1] ^= 1 << 20
            elif now == "garbled":
                with patch.object(Block, "forward", lambda *given: 1.01 * forward(*given).roll(1, -1)):
                    return step(self)
            elif now in BROKEN:
                with patch.object(NativeEngine, "accumulate", BROKEN[now]):
                    return step(self)
            else:
                os.kill(os.getpid(), SIGNALS[now])
        return step(self)

    with patch.object(Trainer, "step", faulty):
        return main(arguments)


forward: Callable[..., Tensor] = Block.forward
accumulate: Callable[..., Tensor] = NativeEngine.accumulate


def nan_gradient(self: NativeEngine, *given: object) -> Tensor:
    losses = accumulate(self, *given)
    for _, parameter in self.named_parameters():
        to_local(parameter.grad).fill_(torch.nan)
    return losses


def garbage(self: NativeEngine, batches: list[object], *given: object) -> Tensor:
    ids = self.config.model.vocab_size
    made = [replace(each, targets_BS=torch.randint_like(each.targets_BS, ids)) for each in batches]  # type: ignore[type-var, attr-defined]
    return accumulate(self, made, *given)


BROKEN = {"nan_gradient": nan_gradient, "garbage": garbage}

if __name__ == "__main__":
    sys.exit(run())
