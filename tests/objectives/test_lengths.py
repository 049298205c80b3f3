"""Examples fill the sequence length exactly: lengths of windows, spans and sequences."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_llm.config.objective_sections import ObjectiveSpec, SpanSpec
from dist_llm.config.section import parse_union
from dist_llm.config.sequence_lengths import compute_sequence_lengths

span_specs = st.builds(
    lambda density, mean, mode: SpanSpec(noise_density=density, mean_span=mean, mode=mode),
    st.floats(0.01, 0.9),
    st.floats(1.0, 64.0),
    st.sampled_from(["", "X"]),
)


@given(span_specs, st.integers(5, 2000))
def test_encoder_input_fills_seq_len_exactly(spec, seq_len):
    size = compute_sequence_lengths(spec, "encoder_decoder", seq_len)
    mode = 1 if spec.mode else 0
    assert mode + size.window_tokens - size.num_noise_tokens + size.num_spans + 1 == size.encoder_tokens == seq_len
    assert size.input_tokens == size.num_noise_tokens + size.num_spans + 1
    assert 1 <= size.num_spans <= min(size.num_noise_tokens, size.window_tokens - size.num_noise_tokens)


@given(span_specs, st.integers(6, 2000))
def test_decoder_input_fills_seq_len_exactly(spec, seq_len):
    size = compute_sequence_lengths(spec, "decoder", seq_len)
    mode = 1 if spec.mode else 0
    assert (
        mode
        + (size.window_tokens - size.num_noise_tokens + size.num_spans + 1)
        + (size.num_noise_tokens + size.num_spans + 1)
        == seq_len + 1
    )
    assert size.input_tokens == seq_len
    assert 1 <= size.num_spans <= min(size.num_noise_tokens, size.window_tokens - size.num_noise_tokens)


@pytest.mark.parametrize("seq_len", [100, 512, 2048])
@pytest.mark.parametrize("architecture", ["decoder", "encoder_decoder"])
def test_spans_have_the_configured_density_and_mean_length(architecture, seq_len):
    size = compute_sequence_lengths(SpanSpec(), architecture, seq_len)
    assert size.num_noise_tokens / size.window_tokens == pytest.approx(0.15, abs=1 / size.window_tokens)
    assert abs(size.num_spans - size.num_noise_tokens / 3.0) < 1


def test_lengths_equal_those_of_t5():
    """With 15% noise in spans of 3 tokens, 568 tokens give 512 inputs and 114 targets, as in the code of T5."""
    size = compute_sequence_lengths(SpanSpec(), "encoder_decoder", seq_len=512)
    assert (size.window_tokens, size.encoder_tokens, size.input_tokens) == (568, 512, 114)


@pytest.mark.parametrize(
    ("name", "architecture", "window", "stride"),
    [("causal", "decoder", 9, 8), ("prefix", "decoder", 9, 8), ("fim", "decoder", 9, 8), ("masked", "encoder", 7, 7)],
)
def test_consecutive_windows_leave_no_gap(name, architecture, window, stride):
    size = compute_sequence_lengths(parse_union(ObjectiveSpec, {"name": name}), architecture, seq_len=8)
    assert (size.window_tokens, size.stride_tokens, size.input_tokens) == (window, stride, 8)


@pytest.mark.parametrize(("name", "min_length"), [("span", 5), ("prefix", 2), ("masked", 2), ("fim", 7)])
def test_too_short_sequence_is_rejected(name, min_length):
    architecture = "encoder" if name == "masked" else "decoder"
    compute_sequence_lengths(parse_union(ObjectiveSpec, {"name": name}), architecture, min_length)
    with pytest.raises(ValueError, match=f"{name} needs at least {min_length} tokens"):
        compute_sequence_lengths(parse_union(ObjectiveSpec, {"name": name}), architecture, min_length - 1)
