"""Measure the probe of the weights of an engine: the loss and some logits of a fixed batch, from one forward pass.

A checkpoint stores the probe. After loading, `checkpoint/probe.py` compares the stored probe with a new one, to detect
damaged weights. Every layout can measure a probe without gathering the model.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from dist_llm.checkpoint.probe import Probe, build_probe_batch, count_probe_tokens, select_logits
from dist_llm.config.schema import Config
from dist_llm.engines.base import Engine
from dist_llm.losses.cross_entropy import CrossEntropy
from dist_llm.objectives.batch import Batch


@torch.no_grad()
def measure_probe(engine: Engine, config: Config) -> Probe:
    """Measure the probe. Every rank must call this.

    Each data-parallel rank scores the same batch, so the sum over ranks is divided by their number. Logits are measured
    only by the native engine, and only if each rank can run the full model (pp = tp = cp = 1).
    """
    parallel, model = config.parallel, config.model
    num_chunks = 2 * parallel.cp if parallel.cp > 1 else 1
    batch = build_probe_batch(model, math.lcm(num_chunks, parallel.tp * parallel.cp))
    # The shape of the batch differs from training, so compiled blocks would be recompiled.
    with _plain_cross_entropy(engine), torch.compiler.set_stance("force_eager"):
        losses_B = engine.score(engine.to_local_batch(batch))
        loss_sum = float(engine.all_reduce_over_dp_and_cp(losses_B.double().sum()))
        logits = None
        if config.engine == "native" and parallel.pp == parallel.tp == parallel.cp == 1:
            logits = _probe_logits(engine, batch)
    precision = "fp8" if config.fp8 else config.precision
    return Probe(loss_sum / (count_probe_tokens(model) * engine.dp_rank_and_size.size), logits, precision)


def _probe_logits(engine: Engine, batch: Batch) -> tuple[float, ...]:
    """Return the logits of the probe: a few ids at the last position of the first row."""
    (model,) = engine.model_parts
    batch = batch.to(engine.device)
    arguments = {**batch.forward_arguments(), "targets_BS": None}
    if batch.encoder_input is not None:
        arguments["encoder_input"] = replace(batch.encoder_input, tokens_BT=batch.encoder_input.tokens_BT[:1])
    logits_BSV = model.eval()(batch.inputs_BS[:1], **arguments)
    return select_logits(logits_BSV[0, -1])


@contextmanager
def _plain_cross_entropy(engine: Engine) -> Iterator[None]:
    """Disable label smoothing and z-loss within the block, because a resumed run may change both."""
    attributes: list[tuple[Any, str]] = [(module, "loss") for part in engine.model_parts for module in part.modules()]
    attributes.append((engine, "cross_entropy"))  # DeepSpeed's pipeline computes the loss outside the model
    values = [(owner, name, getattr(owner, name, None)) for owner, name in attributes]
    originals = [(owner, name, value) for owner, name, value in values if isinstance(value, CrossEntropy)]
    for owner, name, _ in originals:
        setattr(owner, name, CrossEntropy())
    try:
        yield
    finally:
        for owner, name, value in originals:
            setattr(owner, name, value)
