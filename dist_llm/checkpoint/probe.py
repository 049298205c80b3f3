"""The probe of a checkpoint: the loss and a few logits of a small fixed batch, saved as probe.json.

The batch depends on the vocabulary size and the architecture only. A reader of the weights computes the probe again: a
different result means other weights, another model, or faulty hardware. The loss is plain cross-entropy in nats per
token, on any layout. Logits are compared if both sides have them.
"""

import json
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dist_llm.config.derive import round_up
from dist_llm.config.schema import ModelConfig
from dist_llm.counter_rng import hash64, splitmix64
from dist_llm.errors import CheckpointError
from dist_llm.losses.cross_entropy import IGNORE_INDEX
from dist_llm.models.attention_mask import CAUSAL, FULL, AttentionMask, EncoderInput
from dist_llm.objectives.batch import Batch

PROBE = "probe.json"
FORMAT = "dist_llm probe 1"
ROWS, LENGTH, NUM_LOGITS = 4, 64, 8
# Tolerances by precision: of the loss, relative; of a logit, relative to the largest logit, or to 1 if that is less.
# Rounding depends on layout, device and kernel. The coarsest precision of both sides applies.
TOLERANCES = {"fp32": (1e-4, 1e-3), "fp16": (2e-3, 2e-2), "bf16": (5e-3, 5e-2), "fp8": (2e-2, 2e-1)}


@dataclass(frozen=True)
class Probe:
    """The outputs of a model: `precision` is that of the matrix products, `weights` that of the stored weights.

    `logits` are those of a few ids at the last position of the first row; None if no single rank has them.
    """

    loss: float
    logits: tuple[float, ...] | None = None
    precision: str = "fp32"
    weights: str = "fp32"

    def dump(self) -> bytes:
        """Return the content of probe.json. A number that is not finite becomes null."""
        logits = None if self.logits is None else [_finite_or_none(logit) for logit in self.logits]
        content = {"format": FORMAT, "loss": _finite_or_none(self.loss), "logits": logits}
        return json.dumps({**content, "precision": self.precision, "weights": self.weights}, indent=1).encode() + b"\n"

    def __str__(self) -> str:
        return f"loss {self.loss:.6g} ({self.precision}, weights in {self.weights})"


def parse_probe(content: bytes, where: str) -> Probe | None:
    """Parse the output of `dump`; None if it has another format version. Raises CheckpointError for other content."""
    try:
        raw = json.loads(content)
        if raw["format"] != FORMAT:
            return None
        logits = None if raw["logits"] is None else tuple(_finite_or_nan(logit) for logit in raw["logits"])
        probe = Probe(_finite_or_nan(raw["loss"]), logits, raw["precision"], raw["weights"])
        if {probe.precision, probe.weights} <= TOLERANCES.keys():
            return probe
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    raise CheckpointError(f"{where}: is not a probe that dist_llm wrote; restore the file")


def compare_probes(before: Probe, now: Probe, what: str) -> str:
    """Return a line with both probes. Raises CheckpointError, prefixed with `what`, if they differ by more than
    rounding."""
    precisions = {before.precision, now.precision} | (
        {before.weights, now.weights} if before.weights != now.weights else set()
    )
    loss_tolerance, logit_tolerance = (
        max(column) for column in zip(*(TOLERANCES[precision] for precision in precisions), strict=True)
    )
    difference = _relative_difference(before.loss, now.loss, abs(before.loss))
    values = f"the probe's loss was {before.loss:.9g} and is {now.loss:.9g}; {loss_tolerance:g} of it is allowed"
    close = difference <= loss_tolerance
    if before.logits is not None and now.logits is not None:
        scale = max(1.0, *(abs(logit) for logit in before.logits))
        pairs = list(zip(before.logits, now.logits, strict=True))
        logit_before, logit_now = max(pairs, key=lambda pair: _relative_difference(pair[0], pair[1], scale))
        values += f"; a logit was {logit_before:.6g} and is {logit_now:.6g}; {logit_tolerance * scale:.2g} is allowed"
        close &= _relative_difference(logit_before, logit_now, scale) <= logit_tolerance
    if not close:
        raise CheckpointError(f"{what}: the weights do not compute what they computed when they were saved: {values}")
    return values


def probe_batch(model: ModelConfig, multiple: int = 1) -> Batch:
    """Return the batch of a resolved model. Sequences are padded to `multiple`, so that the layout can split them.

    Padding changes no result: it is not scored, and no token attends to it.
    """
    length = min(LENGTH, model.max_seq_len) if model.positions == "learned" else LENGTH
    ids_BW = _generate_ids("probe", ROWS, length + 1, model.vocab_size)
    padding = round_up(length, multiple) - length
    inputs_BS, targets_BS = _pad(ids_BW[:, :-1], padding, 0), _pad(ids_BW[:, 1:], padding, IGNORE_INDEX)
    padding_mask = _padding_mask(length, padding)
    batch = Batch.build(inputs_BS, targets_BS, padding_mask if model.architecture == "encoder" else CAUSAL)
    if padding:  # learned positions may end at `length`
        batch = replace(batch, positions_BS=_pad(torch.arange(length).expand(ROWS, length), padding, 0))
    if model.architecture == "encoder_decoder":
        tokens_BT = _pad(_generate_ids("probe source", ROWS, length, model.vocab_size), padding, 0)
        batch = replace(batch, encoder_input=EncoderInput(tokens_BT, padding_mask, batch.positions_BS))
    return batch


def count_probe_tokens(model: ModelConfig) -> int:
    """Return how many targets of the batch are scored."""
    return probe_batch(model).num_valid_tokens


def select_logits(logits_V: Tensor) -> tuple[float, ...]:
    """Return the logits that a probe contains, from all logits of a position."""
    ids = torch.linspace(0, len(logits_V) - 1, min(NUM_LOGITS, len(logits_V))).long()
    return tuple(logits_V[ids.to(logits_V.device)].float().tolist())


def _generate_ids(name: str, rows: int, width: int, vocab_size: int) -> Tensor:
    numbers = splitmix64(torch.arange(rows * width) ^ hash64(name)) & (2**63 - 1)
    return (numbers % vocab_size).reshape(rows, width)


def _pad(tensor_BS: Tensor, padding: int, value: int) -> Tensor:
    return torch.nn.functional.pad(tensor_BS, (0, padding), value=value)


def _padding_mask(length: int, padding: int) -> AttentionMask:
    if not padding:
        return FULL
    documents_BT = _pad(torch.zeros(ROWS, length, dtype=torch.long), padding, -1)
    return AttentionMask(causal=False, documents_BT=documents_BT)


def _relative_difference(a: float, b: float, scale: float) -> float:
    """Return |a - b| / scale; 0 if the first value is not finite, which allows no comparison."""
    if not math.isfinite(a):
        return 0.0
    return abs(a - b) / max(scale, 1e-9) if math.isfinite(b) else math.inf


def _finite_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _finite_or_nan(value: Any) -> float:
    return math.nan if value is None else float(value)
