"""The probe of the weights that an engine holds, on any layout, by one forward pass without gathering the model."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from dist_llm.checkpoint.probe import Probe, logits_of, num_scored, probe_batch
from dist_llm.config.schema import Config
from dist_llm.engines.base import Engine
from dist_llm.losses.cross_entropy import CrossEntropy
from dist_llm.objectives.batch import Batch


@torch.no_grad()
def measure_probe(engine: Engine, config: Config) -> Probe:
    """Every rank calls it. Each data rank scores the same batch, so that the sum over ranks counts it several times.

    Logits are those of the native engine where each rank can run the whole model; other layouts give the loss alone.
    """
    parallel, model = config.parallel, config.model
    pieces = 2 * parallel.cp if parallel.cp > 1 else 1
    batch = probe_batch(model, math.lcm(pieces, parallel.tp * parallel.cp))
    # The batch has another shape than training's: compiled blocks would be compiled again for it.
    with _plain_cross_entropy(engine), torch.compiler.set_stance("force_eager"):
        losses_B = engine.score(engine.to_local_batch(batch))
        total = float(engine.all_reduce_over_data(losses_B.double().sum()))
        logits = None
        if config.engine == "native" and parallel.pp == parallel.tp == parallel.cp == 1:
            logits = _probe_logits(engine, batch)
    precision = "fp8" if config.fp8 else config.precision
    return Probe(total / (num_scored(model) * engine.dp_rank_and_size[1]), logits, precision)


def _probe_logits(engine: Engine, batch: Batch) -> tuple[float, ...]:
    (model,) = engine.model_parts
    batch = batch.to(engine.device)
    arguments = {**batch.forward_arguments(), "targets_BS": None}
    if batch.encoder_input is not None:
        arguments["encoder_input"] = replace(batch.encoder_input, tokens_BT=batch.encoder_input.tokens_BT[:1])
    logits_BSV = model.eval()(batch.inputs_BS[:1], **arguments)
    return logits_of(logits_BSV[0, -1])


@contextmanager
def _plain_cross_entropy(engine: Engine) -> Iterator[None]:
    """Within the block losses have no label smoothing and no z-loss, which a config may change on a resume."""
    owners: list[tuple[Any, str]] = [(module, "loss") for part in engine.model_parts for module in part.modules()]
    owners.append((engine, "cross_entropy"))  # DeepSpeed's pipeline computes it outside the model
    before = [(each, name, getattr(each, name, None)) for each, name in owners]
    before = [each for each in before if isinstance(each[2], CrossEntropy)]
    for owner, name, _ in before:
        setattr(owner, name, CrossEntropy())
    try:
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)
