"""The probe of a checkpoint: the loss and a few logits of a small fixed batch, saved as probe.json.

Code that loads the weights computes the probe again. A different result means other weights, another model, or faulty
hardware. The batch depends only on the model config. The loss is plain cross-entropy in nats per token. Logits are
compared if both probes have them.

Shapes: B rows, S tokens of the decoder, T tokens of the encoder, W = S + 1 tokens of a window, V vocabulary.
"""

import json
import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dist_llm.config.derive import round_up
from dist_llm.config.model_section import ModelConfig
from dist_llm.counter_rng import hash64, splitmix64
from dist_llm.errors import CheckpointError
from dist_llm.losses.cross_entropy import IGNORE_INDEX
from dist_llm.models.attention_mask import CAUSAL, FULL, AttentionMask, EncoderInput
from dist_llm.objectives.batch import Batch

PROBE_FILE = "probe.json"
FORMAT = "dist_llm probe 1"
NUM_ROWS, ROW_TOKENS = 4, 64  # shape of the batch
NUM_LOGITS = 8  # logits of one position that a probe contains


class Tolerance(NamedTuple):
    """The largest differences of two probes that are explained by rounding."""

    loss: float  # relative to the loss
    logit: float  # relative to the largest logit, or to 1 if that is larger


# By precision. Rounding depends on layout, device and kernel. If the precisions of two probes differ, the larger
# tolerance applies.
TOLERANCES = {
    "fp32": Tolerance(loss=1e-4, logit=1e-3),
    "fp16": Tolerance(loss=2e-3, logit=2e-2),
    "bf16": Tolerance(loss=5e-3, logit=5e-2),
    "fp8": Tolerance(loss=2e-2, logit=2e-1),
}


@dataclass(frozen=True)
class Probe:
    """The outputs of a model on the probe batch.

    `precision` is the precision of the matrix products, and `weights` the precision of the stored weights. `logits` are
    the logits of a few ids at the last position of the first row; None if no single rank has them.
    """

    loss: float
    logits: tuple[float, ...] | None = None
    precision: str = "fp32"
    weights: str = "fp32"

    def dump(self) -> bytes:
        """Return the content of probe.json. Numbers that are not finite become null."""
        logits = None if self.logits is None else [_finite_or_none(logit) for logit in self.logits]
        content = {"format": FORMAT, "loss": _finite_or_none(self.loss), "logits": logits}
        return json.dumps({**content, "precision": self.precision, "weights": self.weights}, indent=1).encode() + b"\n"

    def __str__(self) -> str:
        return f"loss {self.loss:.6g} ({self.precision}, weights in {self.weights})"


def parse_probe(content: bytes, location: str) -> Probe | None:
    """Parse probe.json. Return None for another format version. Raises CheckpointError for any other content."""
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
    raise CheckpointError(f"{location}: is not a probe that dist_llm wrote; restore the file")


def compare_probes(saved: Probe, current: Probe, location: str) -> str:
    """Return a line with the values of both probes.

    Raises CheckpointError, which names `location`, if the probes differ by more than rounding.
    """
    precisions = {saved.precision, current.precision}
    if saved.weights != current.weights:
        precisions |= {saved.weights, current.weights}
    loss_tolerance = max(TOLERANCES[precision].loss for precision in precisions)
    logit_tolerance = max(TOLERANCES[precision].logit for precision in precisions)
    difference = _relative_difference(saved.loss, current.loss, abs(saved.loss))
    values = f"the probe's loss was {saved.loss:.9g} and is {current.loss:.9g}; {loss_tolerance:g} of it is allowed"
    is_close = difference <= loss_tolerance
    if saved.logits is not None and current.logits is not None:
        scale = max(1.0, *(abs(logit) for logit in saved.logits))
        pairs = list(zip(saved.logits, current.logits, strict=True))
        saved_logit, current_logit = max(pairs, key=lambda pair: _relative_difference(pair[0], pair[1], scale))
        values += (
            f"; a logit was {saved_logit:.6g} and is {current_logit:.6g}; {logit_tolerance * scale:.2g} is allowed"
        )
        is_close &= _relative_difference(saved_logit, current_logit, scale) <= logit_tolerance
    if not is_close:
        raise CheckpointError(
            f"{location}: the weights do not compute what they computed when they were saved: {values}"
        )
    return values


def build_probe_batch(model: ModelConfig, multiple: int = 1) -> Batch:
    """Build the probe batch of a resolved model. Rows are padded to a multiple of `multiple` tokens.

    Any layout can then split the rows. Padding changes no result: it has no targets, and no token attends to it.
    """
    num_tokens = min(ROW_TOKENS, model.max_seq_len) if model.positions == "learned" else ROW_TOKENS
    ids_BW = _generate_ids("probe", NUM_ROWS, num_tokens + 1, model.vocab_size)
    padding = round_up(num_tokens, multiple) - num_tokens
    inputs_BS, targets_BS = _pad(ids_BW[:, :-1], padding, 0), _pad(ids_BW[:, 1:], padding, IGNORE_INDEX)
    padding_mask = _padding_mask(num_tokens, padding)
    batch = Batch.build(inputs_BS, targets_BS, padding_mask if model.architecture == "encoder" else CAUSAL)
    if padding:  # learned positions may end at `num_tokens`
        batch = replace(batch, positions_BS=_pad(torch.arange(num_tokens).expand(NUM_ROWS, num_tokens), padding, 0))
    if model.architecture == "encoder_decoder":
        tokens_BT = _pad(_generate_ids("probe source", NUM_ROWS, num_tokens, model.vocab_size), padding, 0)
        batch = replace(batch, encoder_input=EncoderInput(tokens_BT, padding_mask, batch.positions_BS))
    return batch


def count_probe_tokens(model: ModelConfig) -> int:
    """Return the number of valid targets of the probe batch."""
    return build_probe_batch(model).num_valid_tokens


def select_logits(logits_V: Tensor) -> tuple[float, ...]:
    """Select the logits that a probe contains from all logits of a position."""
    ids = torch.linspace(0, len(logits_V) - 1, min(NUM_LOGITS, len(logits_V))).long()
    return tuple(logits_V[ids.to(logits_V.device)].float().tolist())


def _generate_ids(name: str, num_rows: int, row_tokens: int, vocab_size: int) -> Tensor:
    """Generate pseudorandom token ids that depend only on the arguments."""
    numbers = splitmix64(torch.arange(num_rows * row_tokens) ^ hash64(name)) & (2**63 - 1)  # not negative
    return (numbers % vocab_size).reshape(num_rows, row_tokens)


def _pad(tensor_BS: Tensor, padding: int, value: int) -> Tensor:
    """Append `padding` columns of `value`."""
    return torch.nn.functional.pad(tensor_BS, (0, padding), value=value)


def _padding_mask(num_tokens: int, padding: int) -> AttentionMask:
    """Return a bidirectional mask in which no token attends to the padding, which has document number -1."""
    if not padding:
        return FULL
    documents_BT = _pad(torch.zeros(NUM_ROWS, num_tokens, dtype=torch.long), padding, -1)
    return AttentionMask(causal=False, documents_BT=documents_BT)


def _relative_difference(saved: float, current: float, scale: float) -> float:
    """Return |saved - current| / scale. Return 0 if the saved value is not finite, which allows no comparison."""
    if not math.isfinite(saved):
        return 0.0
    return abs(saved - current) / max(scale, 1e-9) if math.isfinite(current) else math.inf


def _finite_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _finite_or_nan(value: Any) -> float:
    return math.nan if value is None else float(value)
