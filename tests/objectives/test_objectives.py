"""What each objective hides, shows and asks for, by statistics and by reconstruction of the text."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_llm.config.lengths import SPECIALS, Lengths, lengths
from dist_llm.config.objective_sections import FIMSpec, MaskedSpec, PrefixSpec, SpanSpec
from dist_llm.losses.cross_entropy import IGNORE
from dist_llm.objectives.build_objective import Objective, build_objective
from dist_llm.objectives.examples import TokenWindow, document_positions
from dist_llm.objectives.fill_in_the_middle import make_fim_example
from dist_llm.objectives.masked_lm import make_masked_example
from dist_llm.objectives.objective_vocabulary import Vocabulary
from dist_llm.objectives.prefix_lm import make_prefix_example
from dist_llm.objectives.span_corruption import make_span_example, sample_segment_ids
from tests.laws.law import make_config

V = 1000
EOT = V - 1
VOCABULARY = Vocabulary(V, EOT)
MASK, START = VOCABULARY.special_id("mask"), VOCABULARY.special_id("start")


def make_text(length, seed=0, ends=0.05):
    rng = np.random.default_rng(seed)
    return np.where(rng.random(length) < ends, EOT, rng.integers(0, V - 1, length)).astype(np.uint16)


def make_rng(seed=0):
    return np.random.default_rng([seed, 1])  # not the stream of make_text


def reconstruct_text(source, target):
    """Reconstruct the text from a source (without mode) and its targets."""
    spans = []
    for token in target[:-1].tolist():
        if token >= VOCABULARY.sentinel(0):
            spans.append([])
        else:
            spans[-1].append(token)
    tokens = []
    for token in source[:-1].tolist():
        tokens += spans[token - VOCABULARY.sentinel(0)] if token >= VOCABULARY.sentinel(0) else [token]
    return np.array(tokens)


# --- masked


def test_masked_statistics_over_a_million_tokens():
    tokens = make_text(1_000_000)
    row = make_masked_example(TokenWindow(tokens), make_rng(), MaskedSpec(), VOCABULARY)
    inputs, targets = row.inputs_S[1:], row.targets_S[1:]
    selected = targets != IGNORE
    num_selectable = (tokens != EOT).sum()
    assert selected.sum() / num_selectable == pytest.approx(0.15, abs=0.002)
    assert not selected[tokens == EOT].any()
    assert np.array_equal(targets[selected], tokens[selected])
    assert np.array_equal(inputs[~selected], tokens[~selected]), "unselected tokens are unchanged"
    is_masked = inputs[selected] == MASK
    is_unchanged = inputs[selected] == tokens[selected]
    assert is_masked.mean() == pytest.approx(0.8, abs=0.005)
    assert is_unchanged.mean() == pytest.approx(0.1 + 0.1 / V, abs=0.005)
    replacements = inputs[selected][~is_masked & ~is_unchanged]
    assert len(replacements) / selected.sum() == pytest.approx(0.1, abs=0.005)
    assert replacements.max() < V
    assert not (replacements == EOT).any(), "replacements are never special tokens"
    assert len(set(replacements.tolist())) > 0.9 * V
    assert (row.inputs_S[0], row.targets_S[0]) == (START, IGNORE)


def test_whole_words_are_selected_together():
    word_edges_V2 = np.zeros((V, 2), dtype=bool)
    word_edges_V2[: V // 2] = True  # ids below V/2 begin and end inside a word, so they continue one
    vocabulary = Vocabulary(V, EOT, word_edges_V2)
    tokens = make_text(200_000, seed=1)
    row = make_masked_example(TokenWindow(tokens), make_rng(), MaskedSpec(whole_words=True, mask_rate=0.2), vocabulary)
    selected = row.targets_S[1:] != IGNORE
    is_inside = (tokens[1:] < V // 2) & (tokens[:-1] < V // 2)
    assert np.array_equal(selected[1:][is_inside], selected[:-1][is_inside])
    assert selected[tokens != EOT].mean() == pytest.approx(0.2, abs=0.01)
    assert (selected[1:] != selected[:-1]).any()


def test_the_tokenizer_says_what_is_inside_a_word():
    from dist_llm.text.bpe_tokenizer import SPLIT_PATTERNS, BPETokenizer
    from dist_llm.text.tokenizer import ENDOFTEXT

    ranks = {bytes([byte]): byte for byte in range(256)} | {b" the": 256, b"ing": 257, b"a,": 258}
    word_edges_V2 = (
        BPETokenizer("t", SPLIT_PATTERNS["gpt2"], ranks, {ENDOFTEXT: 259}).vocabulary(with_word_edges=True).word_V2
    )
    assert word_edges_V2[256].tolist() == [False, True]
    assert word_edges_V2[257].tolist() == [True, True]
    assert word_edges_V2[258].tolist() == [True, False]
    assert word_edges_V2[259].tolist() == [False, False]


# --- span


@settings(max_examples=60, deadline=None)
@given(
    st.integers(6, 2000),
    st.floats(0.02, 0.9),
    st.floats(1.0, 40.0),
    st.booleans(),
    st.sampled_from(["", "X"]),
    st.integers(0, 1000),
)
def test_the_text_can_be_reconstructed(seq_len, density, mean, is_encoder_decoder, mode, seed):
    spec = SpanSpec(noise_density=density, mean_span=mean, mode=mode)
    size = lengths(spec, "encoder_decoder" if is_encoder_decoder else "decoder", seq_len)
    tokens = make_text(size.window, seed)
    row = make_span_example(TokenWindow(tokens), make_rng(seed), spec, size, VOCABULARY, is_encoder_decoder)
    num_prefix = 1 if mode else 0
    if is_encoder_decoder:
        source, target = row.encoder_T, row.targets_S
        assert len(source) == seq_len
        assert row.inputs_S.tolist() == [START, *target[:-1].tolist()]
    else:
        assert len(row.inputs_S) == len(row.targets_S) == seq_len
        source, target = row.inputs_S[: row.prefix], row.targets_S[row.prefix - 1 :]
        assert (row.targets_S[: row.prefix - 1] == IGNORE).all()
        assert np.array_equal(row.inputs_S[row.prefix :], target[:-1])
    if mode:
        assert source[0] == VOCABULARY.special_id("X")
    assert np.array_equal(reconstruct_text(source[num_prefix:], target), tokens)
    for sequence in (source, target):
        sentinels = sequence[sequence >= VOCABULARY.sentinel(0)] - VOCABULARY.sentinel(0)
        assert sentinels.tolist() == list(range(size.spans)), "each occurs once, in order"
        assert sequence[-1] == EOT


@pytest.mark.parametrize("length", [2, 3, 5, 17, 100, 2000])
@pytest.mark.parametrize("density", [0.01, 0.15, 0.5, 0.9])
def test_segments_hold_all_tokens_and_none_is_empty(length, density):
    noise = min(max(round(length * density), 1), length - 1)
    for spans in {1, min(noise, length - noise)}:
        segment_ids = sample_segment_ids(make_rng(), length, noise, spans)
        assert sorted(set(segment_ids.tolist())) == list(range(2 * spans))
        assert (segment_ids % 2).sum() == noise
        assert (np.diff(segment_ids) >= 0).all()


def test_all_splits_are_equally_likely():
    """Noise 3 in 2 spans of 6 tokens: each of the 2 x 2 splits has probability a quarter."""
    generator = make_rng()
    counts = Counter(tuple(sample_segment_ids(generator, 6, 3, 2).tolist()) for _ in range(4000))
    assert len(counts) == 4
    assert all(900 < count < 1100 for count in counts.values())


# --- prefix


@pytest.mark.parametrize("mode", ["", "S"])
def test_the_prefix_is_input_and_the_rest_is_scored(mode):
    tokens, prefix_lengths = make_text(50), []
    for seed in range(2000):
        row = make_prefix_example(
            TokenWindow(tokens), make_rng(seed), PrefixSpec(mode=mode), VOCABULARY, is_encoder_decoder=False
        )
        front = [VOCABULARY.special_id("S")] if mode else []
        assert [*row.inputs_S.tolist(), row.targets_S[-1]] == [*front, *tokens.tolist()]
        scored = row.targets_S != IGNORE
        assert np.array_equal(np.flatnonzero(scored), np.arange(row.prefix - 1, len(row.inputs_S)))
        assert np.array_equal(row.targets_S[:-1][scored[:-1]], row.inputs_S[1:][scored[:-1]])
        prefix_lengths.append(row.prefix - len(front))
    assert set(prefix_lengths) == set(range(1, 50)), "every position"
    assert max(Counter(prefix_lengths).values()) < 3 * min(Counter(prefix_lengths).values())


def test_a_prefix_for_an_encoder_decoder():
    tokens = make_text(50)
    row = make_prefix_example(TokenWindow(tokens), make_rng(), PrefixSpec(), VOCABULARY, is_encoder_decoder=True)
    assert np.concatenate((row.encoder_T, row.targets_S)).tolist() == tokens.tolist()
    assert row.inputs_S.tolist() == [START, *row.targets_S[:-1].tolist()]


# --- fill in the middle


@pytest.mark.parametrize("spm", [0.0, 1.0])
def test_the_middle_comes_last(spm):
    tokens = make_text(40)
    before, middle, after = (VOCABULARY.special_id(f"fim_{part}") for part in ("prefix", "middle", "suffix"))
    for seed in range(200):
        row = make_fim_example(TokenWindow(tokens), make_rng(seed), FIMSpec(fim_rate=1.0, fim_spm_rate=spm), VOCABULARY)
        sequence = [*row.inputs_S.tolist(), int(row.targets_S[-1])]
        assert np.array_equal(row.targets_S[:-1], row.inputs_S[1:])
        a, b, c = sequence.index(before), sequence.index(middle), sequence.index(after)
        if spm:
            assert (a, c) == (0, 1)
            suffix, middle_part = sequence[2:b], sequence[b + 1 :]
            assert [*middle_part, *suffix] == tokens[:-3].tolist()
        else:
            assert a == 0
            assert [*sequence[1:c], *sequence[b + 1 :], *sequence[c + 1 : b]] == tokens[:-3].tolist()


def test_some_samples_are_left_as_they_are():
    tokens = make_text(40)
    is_changed = [
        not np.array_equal(
            make_fim_example(TokenWindow(tokens), make_rng(seed), FIMSpec(), VOCABULARY).inputs_S,
            tokens[:-1],
        )
        for seed in range(1000)
    ]
    assert np.mean(is_changed) == pytest.approx(0.5, abs=0.05)


# --- documents


def test_positions_restart_in_each_document():
    documents = np.array([0, 0, 1, 1, 1, 2, 3])
    assert document_positions(documents[None])[0].tolist() == [0, 1, 0, 1, 2, 0, 0]
    assert document_positions(np.array([[0, 1, 0, 1, -1]]))[0].tolist() == [0, 0, 1, 1, 0], (
        "they need not be neighbours"
    )


@pytest.mark.parametrize("architecture", ["decoder", "encoder", "encoder_decoder"])
def test_documents_travel_with_their_tokens(architecture):
    """Each document's tokens come from their own range of ids, so ids identify documents."""
    name = {"decoder": "span", "encoder": "masked", "encoder_decoder": "span"}[architecture]
    config = make_config(
        1, {"architecture": architecture, "vocab_size": 0}, objective={"name": name}, data={"document_mask": True}
    )
    objective = build_objective(config, VOCABULARY)
    window = np.concatenate([[*range(100 * d, 100 * d + 7), EOT] for d in range(9)])
    window = window[: objective.components[0][1].window]
    with pytest.raises(ValueError, match="without document ids"):
        objective([window], np.arange(1))
    document_ids = np.arange(len(window)) // 8
    batch = objective([TokenWindow(window, document_ids_W=document_ids)], np.arange(1))
    sequences = [(batch.inputs_BS[0], batch.mask.documents_BT[0])]
    if batch.encoder_input is not None:
        sequences.append((batch.encoder_input.tokens_BT[0], batch.encoder_input.mask.documents_BT[0]))
    for tokens, documents in sequences:
        is_text = (tokens < EOT) if name == "span" else (batch.targets_BS[0] == IGNORE) & (tokens < EOT)
        assert torch.equal(tokens[is_text] // 100, documents[is_text])
        assert len(set(documents[is_text].tolist())) >= 2


# --- the function of (window, seed, number)


def make_objective(seed=3, **changes):
    return build_objective(make_config(1, {"vocab_size": 0}, run={"seed": seed}, **changes), VOCABULARY)


MIXED = {
    "mixture": [
        {"name": "span", "mode": "R", "noise_density": 0.5},
        {"name": "causal"},
        {"name": "prefix", "mode": "S", "see_prefix": False},
    ]
}


def test_a_sample_is_a_function_of_its_number_and_not_of_its_batch():
    objective = make_objective(objective=MIXED)
    sizes = [size.window for _, size in objective.components]
    component_ids = [0, 1, 2, 0]
    windows = [make_text(sizes[component_id], seed) for seed, component_id in enumerate(component_ids)]
    batch = objective(windows, np.arange(4), component_ids)
    for index in range(4):
        alone = objective(windows[index : index + 1], np.array([index]), [component_ids[index]])
        assert torch.equal(alone.inputs_BS[0], batch.inputs_BS[index])
        assert torch.equal(alone.targets_BS[0], batch.targets_BS[index])
        assert torch.equal(alone.mask.prefix_B[0], batch.mask.prefix_B[index])
    other_number = objective(windows[:1], np.array([9]), [0])
    other_seed = make_objective(seed=4, objective=MIXED)(windows[:1], np.array([0]), [0])
    for other in (other_number, other_seed):
        assert not torch.equal(other.inputs_BS[0], batch.inputs_BS[0])


def test_components_that_see_no_prefix_have_none():
    objective = make_objective(objective=MIXED)
    rows = [
        objective.build_example(make_text(size.window), 0, component_id)
        for component_id, (_, size) in enumerate(objective.components)
    ]
    assert rows[0].prefix > 0
    assert (rows[1].prefix, rows[2].prefix) == (0, 0)


def test_plain_text_needs_no_rows():
    objective = make_objective()
    windows = np.stack([make_text(33, seed) for seed in range(4)])
    batch = objective(windows, np.arange(4))
    assert objective.is_plain_causal
    assert batch.mask.is_trivial
    assert np.array_equal(batch.inputs_BS, windows[:, :-1])
    assert np.array_equal(batch.targets_BS, windows[:, 1:])
    assert batch.num_valid_tokens == 4 * 32


def test_ids_that_an_objective_adds_have_names():
    assert [VOCABULARY.describe(V + number) for number in range(len(SPECIALS))] == [f"<{name}>" for name in SPECIALS]
    assert VOCABULARY.describe(VOCABULARY.sentinel(7)) == "<sentinel 7>"
    assert VOCABULARY.describe(EOT) is None


def test_shorter_rows_are_padded_and_not_scored():
    config = make_config(1, {"architecture": "encoder_decoder", "vocab_size": 0}, objective={"name": "prefix"})
    objective = build_objective(config, VOCABULARY)
    assert isinstance(objective, Objective)
    assert isinstance(objective.components[0][1], Lengths)
    batch = objective([make_text(objective.components[0][1].window, seed) for seed in range(5)], np.arange(5))
    assert batch.encoder_input is not None
    assert batch.encoder_input.tokens_BT.shape == (5, 32)
    padding = batch.encoder_input.mask.documents_BT == -1
    assert (~padding).sum(1).tolist() == [32 - int((row != IGNORE).sum()) for row in batch.targets_BS]
    assert batch.num_valid_tokens == int((batch.targets_BS != IGNORE).sum())
