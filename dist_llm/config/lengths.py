"""Compute how many tokens an objective reads per sample, and the sequence lengths of the sample.

All samples of an objective have equal lengths, so that shapes never change: a window of `window` tokens fills
`data.seq_len` exactly.
"""

from dataclasses import dataclass
from functools import lru_cache

from dist_llm.config.objective_sections import ObjectiveSpec, SpanSpec, mode_of
from dist_llm.config.schema import UnresolvedConfig

# Special token ids, which follow the tokenizer's own ids in this order; the sentinels follow them.
SPECIALS = ("start", "mask", "R", "S", "X", "fim_prefix", "fim_middle", "fim_suffix")


@dataclass(frozen=True)
class Lengths:
    """The lengths of one sample, in tokens. `source` is the input of the encoder; 0 without one."""

    window: int  # tokens read from the corpus
    stride: int  # from the start of one window to the next
    inputs: int  # inputs, and targets, of the stack that has the head
    source: int = 0
    noise: int = 0  # span: removed tokens
    spans: int = 0  # span: removed spans, each replaced by a sentinel


@lru_cache(maxsize=256)
def lengths(spec: ObjectiveSpec, architecture: str, seq_len: int) -> Lengths:
    """Return the lengths of a sample. Raises ValueError if `seq_len` is too short for the objective."""
    mode = 1 if mode_of(spec) else 0
    span = (3 if architecture == "encoder_decoder" else 5) + mode
    least = {"prefix": 2 + mode, "fim": 7, "masked": 2, "span": span}.get(spec.name, 1)
    if seq_len < least:
        raise ValueError(f"{spec.name} needs at least {least} tokens")
    if spec.name == "span":
        return _span(spec, architecture, seq_len, mode)
    if spec.name == "masked":  # the start token in front
        return Lengths(seq_len - 1, seq_len - 1, seq_len)
    if spec.name == "prefix" and architecture == "encoder_decoder":
        return Lengths(seq_len - mode, seq_len - mode, seq_len, seq_len)
    return Lengths(seq_len + 1 - mode, seq_len - mode, seq_len)


def noise_tokens(window: int, density: float) -> int:
    """Return the number of tokens to remove from a window, at least 1 and at most window - 1."""
    return min(max(round(window * density), 1), window - 1)


def _span(spec: SpanSpec, architecture: str, seq_len: int, mode: int) -> Lengths:
    def noise_and_spans(window: int) -> tuple[int, float]:
        noise = noise_tokens(window, spec.noise_density)
        return noise, min(max(noise / spec.mean_span, 1.0), noise, window - noise)

    if architecture == "encoder_decoder":
        # Grow the window until its encoder input ([mode] text with sentinels, end) fills seq_len.
        density = spec.noise_density
        output_per_token = 1 - density + min(density / spec.mean_span, 1 - density)
        window = max(2, int((seq_len - mode - 6) / output_per_token))
        while True:
            noise, target = noise_and_spans(window)
            excess = mode + window - noise + round(target) + 1 - seq_len
            if excess >= 0:  # one more token can add two (a token and a sentinel): then drop one sentinel
                spans = round(target) - excess
                return Lengths(window, window, noise + spans + 1, seq_len, noise, spans)
            window += 1
    # A decoder reads [mode] text with sentinels, end, spans with sentinels, end, so each sentinel occurs twice. Several
    # numbers of spans fill seq_len; choose the one closest to mean_span.
    best = None
    for spans in range(1, seq_len // 2):
        window = seq_len + 1 - mode - 2 - 2 * spans
        if window < 2:
            break
        noise, target = noise_and_spans(window)
        if spans <= min(noise, window - noise) and (best is None or abs(spans - target) < best[0]):
            best = abs(spans - target), Lengths(window, window, seq_len, 0, noise, spans)
    assert best is not None
    return best[1]


def all_lengths(config: UnresolvedConfig) -> list[Lengths]:
    """Return the lengths of each component of the objective, with `inputs` padded to the longest."""
    unpadded = [lengths(each, config.model.architecture, config.data.seq_len) for each in config.objective.components]
    longest = inputs_len(config)
    return [Lengths(each.window, each.stride, longest, each.source, each.noise, each.spans) for each in unpadded]


def inputs_len(config: UnresolvedConfig) -> int:
    """Return the padded input length of an encoder-decoder's decoder, a multiple of 8 tp; seq_len for other models."""
    if config.model.architecture != "encoder_decoder":
        return config.data.seq_len
    members = config.objective.components
    longest = max(lengths(each, "encoder_decoder", config.data.seq_len).inputs for each in members)
    multiple = 8 * config.parallel.tp
    return -(-longest // multiple) * multiple


def sample_tokens(config: UnresolvedConfig) -> int:
    """Tokens that the model reads of each sample, padding included."""
    is_encoder_decoder = config.model.architecture == "encoder_decoder"
    return inputs_len(config) + (config.data.seq_len if is_encoder_decoder else 0)


def extra_ids(config: UnresolvedConfig) -> int:
    """Return the number of token ids that the objective needs in addition to the tokenizer's."""
    plain = all(each.name in ("causal", "prefix") and not mode_of(each) for each in config.objective.components)
    if plain and config.model.architecture == "decoder":
        return 0
    return len(SPECIALS) + max(each.spans for each in all_lengths(config))
