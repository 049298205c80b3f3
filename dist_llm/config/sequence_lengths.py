"""Compute the sequence lengths of a training sample from the objective, the architecture and `data.seq_len`.

A window is the run of consecutive tokens that a sample reads from the corpus. All samples of an objective have equal
lengths, so tensor shapes never change: the window is chosen such that the sample fills `data.seq_len` exactly. The
data package uses these lengths to cut windows, and the config checks use them to reject a `data.seq_len` that is too
short.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from dist_llm.config.objective_sections import (
    CausalSpec,
    ObjectiveSpec,
    PrefixSpec,
    RegisteredObjectiveSpec,
    SpanSpec,
    get_mode_token,
)
from dist_llm.config.schema import UnresolvedConfig

# Special tokens of the objectives. Their ids follow the ids of the tokenizer in this order. The sentinels come last.
SPECIAL_TOKENS = ("start", "mask", "R", "S", "X", "fim_prefix", "fim_middle", "fim_suffix")


@dataclass(frozen=True)
class SequenceLengths:
    """The lengths of one sample, in tokens."""

    window_tokens: int  # tokens that the sample reads from the corpus
    stride_tokens: int  # distance from the start of one window to the start of the next
    input_tokens: int  # inputs (and targets) of the stack with the output head
    encoder_tokens: int = 0  # inputs of the encoder of an encoder-decoder
    num_noise_tokens: int = 0  # span corruption: removed tokens
    num_spans: int = 0  # span corruption: removed spans; a sentinel replaces each span


class TargetNoise(NamedTuple):
    """What span corruption should remove from a window, before the number of spans is rounded."""

    num_noise_tokens: int
    num_spans: float


@lru_cache(maxsize=256)
def compute_sequence_lengths(spec: ObjectiveSpec, architecture: str, seq_len: int) -> SequenceLengths:
    """Return the lengths of a sample. Raises ValueError if `seq_len` is too short for the objective."""
    num_mode_tokens = 1 if get_mode_token(spec) else 0
    # Inputs of one span. Encoder: text token, sentinel, end. Decoder: also the sentinel and the token of the span; the
    # final end is only a target.
    min_span_tokens = (3 if architecture == "encoder_decoder" else 5) + num_mode_tokens
    min_tokens = {"prefix": 2 + num_mode_tokens, "fim": 7, "masked": 2, "span": min_span_tokens}.get(spec.name, 1)
    if seq_len < min_tokens:
        raise ValueError(f"{spec.name} needs at least {min_tokens} tokens")
    if isinstance(spec, SpanSpec):
        if architecture == "encoder_decoder":
            return _compute_encoder_decoder_span_lengths(spec, seq_len, num_mode_tokens)
        return _compute_decoder_span_lengths(spec, seq_len, num_mode_tokens)
    if spec.name == "masked":  # the start token precedes the window
        return SequenceLengths(window_tokens=seq_len - 1, stride_tokens=seq_len - 1, input_tokens=seq_len)
    num_text_tokens = seq_len - num_mode_tokens
    if spec.name == "prefix" and architecture == "encoder_decoder":
        return SequenceLengths(
            window_tokens=num_text_tokens, stride_tokens=num_text_tokens, input_tokens=seq_len, encoder_tokens=seq_len
        )
    return SequenceLengths(window_tokens=num_text_tokens + 1, stride_tokens=num_text_tokens, input_tokens=seq_len)


def count_noise_tokens(window_tokens: int, noise_density: float) -> int:
    """Return the number of tokens to remove from a window, at least 1 and at most window_tokens - 1."""
    return min(max(round(window_tokens * noise_density), 1), window_tokens - 1)


def _compute_target_noise(spec: SpanSpec, window_tokens: int) -> TargetNoise:
    num_noise_tokens = count_noise_tokens(window_tokens, spec.noise_density)
    num_spans = min(max(num_noise_tokens / spec.mean_span, 1.0), num_noise_tokens, window_tokens - num_noise_tokens)
    return TargetNoise(num_noise_tokens, num_spans)


def _compute_encoder_decoder_span_lengths(spec: SpanSpec, seq_len: int, num_mode_tokens: int) -> SequenceLengths:
    """Grow the window until the input of the encoder ([mode] text with sentinels, end) fills `seq_len`."""
    density = spec.noise_density
    encoder_tokens_per_window_token = 1 - density + min(density / spec.mean_span, 1 - density)
    # Start a few tokens below the expected length, because the numbers of removed tokens and spans are rounded.
    window_tokens = max(2, int((seq_len - num_mode_tokens - 6) / encoder_tokens_per_window_token))
    while True:
        num_noise_tokens, target_spans = _compute_target_noise(spec, window_tokens)
        excess = num_mode_tokens + window_tokens - num_noise_tokens + round(target_spans) + 1 - seq_len
        # One more window token can add two encoder tokens, a text token and a sentinel. Then remove one sentinel.
        if excess >= 0:
            num_spans = round(target_spans) - excess
            return SequenceLengths(
                window_tokens=window_tokens,
                stride_tokens=window_tokens,
                input_tokens=num_noise_tokens + num_spans + 1,
                encoder_tokens=seq_len,
                num_noise_tokens=num_noise_tokens,
                num_spans=num_spans,
            )
        window_tokens += 1


def _compute_decoder_span_lengths(spec: SpanSpec, seq_len: int, num_mode_tokens: int) -> SequenceLengths:
    """Choose the number of spans that fills `seq_len` and gives a mean span length closest to `mean_span`.

    A decoder reads [mode] text with sentinels, end, spans with sentinels, end. Each sentinel occurs twice.
    """
    best: tuple[float, SequenceLengths] | None = None
    for num_spans in range(1, seq_len // 2):
        window_tokens = seq_len + 1 - num_mode_tokens - 2 - 2 * num_spans
        if window_tokens < 2:
            break
        num_noise_tokens, target_spans = _compute_target_noise(spec, window_tokens)
        is_possible = num_spans <= min(num_noise_tokens, window_tokens - num_noise_tokens)
        if is_possible and (best is None or abs(num_spans - target_spans) < best[0]):
            lengths = SequenceLengths(
                window_tokens=window_tokens,
                stride_tokens=window_tokens,
                input_tokens=seq_len,
                num_noise_tokens=num_noise_tokens,
                num_spans=num_spans,
            )
            best = abs(num_spans - target_spans), lengths
    assert best is not None
    return best[1]


def compute_component_lengths(config: UnresolvedConfig) -> list[SequenceLengths]:
    """Return the lengths of each component of the objective, with `input_tokens` padded to the longest component."""
    padded_tokens = compute_inputs_len(config)
    return [
        replace(
            compute_sequence_lengths(spec, config.model.architecture, config.data.seq_len), input_tokens=padded_tokens
        )
        for spec in config.objective.components
    ]


def compute_inputs_len(config: UnresolvedConfig) -> int:
    """Return the padded input length of an encoder-decoder's decoder, a multiple of 8 tp; seq_len for other models."""
    if config.model.architecture != "encoder_decoder":
        return config.data.seq_len
    specs = config.objective.components
    longest = max(compute_sequence_lengths(spec, "encoder_decoder", config.data.seq_len).input_tokens for spec in specs)
    multiple = 8 * config.parallel.tp
    return -(-longest // multiple) * multiple


def count_sample_tokens(config: UnresolvedConfig) -> int:
    """Return the number of tokens that the model reads of each sample, including padding."""
    is_encoder_decoder = config.model.architecture == "encoder_decoder"
    return compute_inputs_len(config) + (config.data.seq_len if is_encoder_decoder else 0)


def count_objective_ids(config: UnresolvedConfig) -> int:
    """Return the number of token ids that the objective adds to the ids of the tokenizer."""
    needs_no_special_tokens = all(
        isinstance(spec, CausalSpec | PrefixSpec | RegisteredObjectiveSpec) and not get_mode_token(spec)
        for spec in config.objective.components
    )
    if needs_no_special_tokens and config.model.architecture == "decoder":
        return 0
    return len(SPECIAL_TOKENS) + max(lengths.num_spans for lengths in compute_component_lengths(config))
