"""How much text an objective reads for a sample, and how long the sequences are that it makes of it.

Plain arithmetic, the same for every sample, so that shapes never change: a sample of `window` tokens
fills its `data.seq_len` exactly.
"""

from dataclasses import dataclass
from functools import lru_cache

from dist_llm.config.objective_sections import ObjectiveSpec, SpanSpec, mode_of
from dist_llm.config.schema import Config

# Token ids that come after the tokenizer's own, in this order; sentinels follow.
SPECIALS = ("start", "mask", "R", "S", "X", "fim_prefix", "fim_middle", "fim_suffix")


@dataclass(frozen=True)
class Lengths:
    """Of one sample. `source` is what an encoder-decoder's encoder reads; 0 where there is none."""

    window: int  # tokens read
    stride: int  # tokens to the next window
    inputs: int  # what the (only, or second) stack reads, and as many targets
    source: int = 0
    noise: int = 0  # span: tokens cut out
    spans: int = 0  # span: pieces they are cut out in, each with a sentinel


@lru_cache(maxsize=256)
def lengths(spec: ObjectiveSpec, architecture: str, seq_len: int) -> Lengths:
    """Raises ValueError where `seq_len` is too short for the objective."""
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
    """Tokens cut out of a window: some, and not all."""
    return min(max(round(window * density), 1), window - 1)


def _span(spec: SpanSpec, architecture: str, seq_len: int, mode: int) -> Lengths:
    def noise_and_spans(window: int) -> tuple[int, float]:
        noise = noise_tokens(window, spec.noise_density)
        return noise, min(max(noise / spec.mean_span, 1.0), noise, window - noise)

    if architecture == "encoder_decoder":
        # The source, [mode] text with sentinels and an end, hardly grows with each token of the window.
        density = spec.noise_density
        output_per_token = 1 - density + min(density / spec.mean_span, 1 - density)
        window = max(2, int((seq_len - mode - 6) / output_per_token))
        while True:
            noise, target = noise_and_spans(window)
            excess = mode + window - noise + round(target) + 1 - seq_len
            if excess >= 0:  # where one token more added two, to text and sentinels, a sentinel too many
                spans = round(target) - excess
                return Lengths(window, window, noise + spans + 1, seq_len, noise, spans)
            window += 1
    # In one stack, [mode] text with sentinels, end, spans with sentinels, end: a sentinel is there twice. Of the
    # numbers of spans that fill the sequence, the one nearest to what the mean length asks for.
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


def all_lengths(config: Config) -> list[Lengths]:
    """Those of each member of the objective, the inputs as long in all of them."""
    unpadded = [lengths(each, config.model.architecture, config.data.seq_len) for each in config.objective.components]
    longest = inputs_len(config)
    return [Lengths(each.window, each.stride, longest, each.source, each.noise, each.spans) for each in unpadded]


def inputs_len(config: Config) -> int:
    """Tokens that the decoder of an encoder-decoder takes, padded to a multiple that layouts divide; else seq_len."""
    if config.model.architecture != "encoder_decoder":
        return config.data.seq_len
    members = config.objective.components
    longest = max(lengths(each, "encoder_decoder", config.data.seq_len).inputs for each in members)
    multiple = 8 * config.parallel.tp
    return -(-longest // multiple) * multiple


def sample_tokens(config: Config) -> int:
    """Tokens that the model reads of each sample, padding included."""
    is_encoder_decoder = config.model.architecture == "encoder_decoder"
    return inputs_len(config) + (config.data.seq_len if is_encoder_decoder else 0)


def extra_ids(config: Config) -> int:
    """Token ids that the objective needs beyond the tokenizer's."""
    plain = all(each.name in ("causal", "prefix") and not mode_of(each) for each in config.objective.components)
    if plain and config.model.architecture == "decoder":
        return 0
    return len(SPECIALS) + max(each.spans for each in all_lengths(config))
