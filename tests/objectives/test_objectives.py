"""Objectives make the right inputs and targets. Tests check statistics, and reconstruct the text from examples."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_llm.config.objective_sections import FIMSpec, MaskedSpec, PrefixSpec, SpanSpec
from dist_llm.config.sequence_lengths import SPECIAL_TOKENS, SequenceLengths, compute_sequence_lengths
from dist_llm.losses.cross_entropy import IGNORE_INDEX
from dist_llm.objectives.build_objective import Objective, build_objective
from dist_llm.objectives.examples import TokenWindow, compute_document_positions
from dist_llm.objectives.fill_in_the_middle import make_fim_example
from dist_llm.objectives.masked_lm import make_masked_example
from dist_llm.objectives.objective_vocabulary import ObjectiveVocabulary
from dist_llm.objectives.prefix_lm import make_prefix_example
from dist_llm.objectives.span_corruption import make_span_example, sample_piece_ids
from tests.laws.law import make_config

VOCAB_SIZE = 1000
EOT = VOCAB_SIZE - 1  # the token at the end of a document
VOCABULARY = ObjectiveVocabulary(VOCAB_SIZE, EOT)
MASK, START = VOCABULARY.special_id("mask"), VOCABULARY.special_id("start")


def make_text(length, seed=0, ends=0.05):
    """Return random token ids; the fraction `ends` of them ends a document."""
    rng = np.random.default_rng(seed)
    return np.where(rng.random(length) < ends, EOT, rng.integers(0, VOCAB_SIZE - 1, length)).astype(np.uint16)


def make_rng(seed=0):
    """Return a generator of other random numbers than those in `make_text`."""
    return np.random.default_rng([seed, 1])


def reconstruct_text(source, target):
    """Reconstruct the text from the corrupted text (without mode token) and the removed spans."""
    spans = []
    for token in target[:-1].tolist():
        if token >= VOCABULARY.sentinel_id(0):
            spans.append([])
        else:
            spans[-1].append(token)
    tokens = []
    for token in source[:-1].tolist():
        tokens += spans[token - VOCABULARY.sentinel_id(0)] if token >= VOCABULARY.sentinel_id(0) else [token]
    return np.array(tokens)


# --- masked


def test_masked_fractions_match_the_paper():
    tokens = make_text(1_000_000)
    row = make_masked_example(TokenWindow(tokens), make_rng(), MaskedSpec(), VOCABULARY)
    inputs, targets = row.inputs_S[1:], row.targets_S[1:]
    selected = targets != IGNORE_INDEX
    num_selectable = (tokens != EOT).sum()
    assert selected.sum() / num_selectable == pytest.approx(0.15, abs=0.002)
    assert not selected[tokens == EOT].any()
    assert np.array_equal(targets[selected], tokens[selected])
    assert np.array_equal(inputs[~selected], tokens[~selected]), "an unselected token changed"
    is_masked = inputs[selected] == MASK
    is_unchanged = inputs[selected] == tokens[selected]
    assert is_masked.mean() == pytest.approx(0.8, abs=0.005)
    assert is_unchanged.mean() == pytest.approx(0.1 + 0.1 / VOCAB_SIZE, abs=0.005)
    replacements = inputs[selected][~is_masked & ~is_unchanged]
    assert len(replacements) / selected.sum() == pytest.approx(0.1, abs=0.005)
    assert replacements.max() < VOCAB_SIZE
    assert not (replacements == EOT).any(), "a replacement is a special token"
    assert len(set(replacements.tolist())) > 0.9 * VOCAB_SIZE
    assert (row.inputs_S[0], row.targets_S[0]) == (START, IGNORE_INDEX)


def test_whole_word_masking_selects_all_tokens_of_a_word():
    word_edges_V2 = np.zeros((VOCAB_SIZE, 2), dtype=bool)
    word_edges_V2[: VOCAB_SIZE // 2] = True  # ids below VOCAB_SIZE/2 begin and end inside a word, so they continue one
    vocabulary = ObjectiveVocabulary(VOCAB_SIZE, EOT, word_edges_V2)
    tokens = make_text(200_000, seed=1)
    row = make_masked_example(TokenWindow(tokens), make_rng(), MaskedSpec(whole_words=True, mask_rate=0.2), vocabulary)
    selected = row.targets_S[1:] != IGNORE_INDEX
    is_inside = (tokens[1:] < VOCAB_SIZE // 2) & (tokens[:-1] < VOCAB_SIZE // 2)
    assert np.array_equal(selected[1:][is_inside], selected[:-1][is_inside])
    assert selected[tokens != EOT].mean() == pytest.approx(0.2, abs=0.01)
    assert (selected[1:] != selected[:-1]).any()


def test_word_edges_of_a_bpe_tokenizer():
    from dist_llm.text.bpe_tokenizer import SPLIT_PATTERNS, BPETokenizer
    from dist_llm.text.tokenizer import ENDOFTEXT

    ranks = {bytes([byte]): byte for byte in range(256)} | {b" the": 256, b"ing": 257, b"a,": 258}
    word_edges_V2 = (
        BPETokenizer("t", SPLIT_PATTERNS["gpt2"], ranks, {ENDOFTEXT: 259})
        .build_objective_vocabulary(with_word_edges=True)
        .word_edges_V2
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
def test_span_corruption_keeps_all_tokens(seq_len, density, mean, is_encoder_decoder, mode, seed):
    spec = SpanSpec(noise_density=density, mean_span=mean, mode=mode)
    size = compute_sequence_lengths(spec, "encoder_decoder" if is_encoder_decoder else "decoder", seq_len)
    tokens = make_text(size.window_tokens, seed)
    row = make_span_example(TokenWindow(tokens), make_rng(seed), spec, size, VOCABULARY, is_encoder_decoder)
    num_prefix = 1 if mode else 0
    if is_encoder_decoder:
        source, target = row.encoder_T, row.targets_S
        assert len(source) == seq_len
        assert row.inputs_S.tolist() == [START, *target[:-1].tolist()]
    else:
        assert len(row.inputs_S) == len(row.targets_S) == seq_len
        source, target = row.inputs_S[: row.prefix_len], row.targets_S[row.prefix_len - 1 :]
        assert (row.targets_S[: row.prefix_len - 1] == IGNORE_INDEX).all()
        assert np.array_equal(row.inputs_S[row.prefix_len :], target[:-1])
    if mode:
        assert source[0] == VOCABULARY.special_id("X")
    assert np.array_equal(reconstruct_text(source[num_prefix:], target), tokens)
    for sequence in (source, target):
        sentinels = sequence[sequence >= VOCABULARY.sentinel_id(0)] - VOCABULARY.sentinel_id(0)
        assert sentinels.tolist() == list(range(size.num_spans)), "a sentinel is missing, repeated or out of order"
        assert sequence[-1] == EOT


@pytest.mark.parametrize("length", [2, 3, 5, 17, 100, 2000])
@pytest.mark.parametrize("density", [0.01, 0.15, 0.5, 0.9])
def test_segments_partition_the_tokens(length, density):
    num_noise = min(max(round(length * density), 1), length - 1)
    for num_spans in {1, min(num_noise, length - num_noise)}:
        piece_ids = sample_piece_ids(make_rng(), length, num_noise, num_spans)
        assert sorted(set(piece_ids.tolist())) == list(range(2 * num_spans))
        assert (piece_ids % 2).sum() == num_noise
        assert (np.diff(piece_ids) >= 0).all()


def test_all_span_divisions_are_equally_likely():
    """Six tokens with three noise tokens in two spans have 2 x 2 divisions, each with probability 1/4."""
    generator = make_rng()
    counts = Counter(
        tuple(sample_piece_ids(generator, num_tokens=6, num_noise_tokens=3, num_spans=2).tolist()) for _ in range(4000)
    )
    assert len(counts) == 4
    assert all(900 < count < 1100 for count in counts.values())


# --- prefix


@pytest.mark.parametrize("mode", ["", "S"])
def test_prefix_tokens_have_no_loss(mode):
    tokens, prefix_lengths = make_text(50), []
    for seed in range(2000):
        row = make_prefix_example(
            TokenWindow(tokens), make_rng(seed), PrefixSpec(mode=mode), VOCABULARY, is_encoder_decoder=False
        )
        front = [VOCABULARY.special_id("S")] if mode else []
        assert [*row.inputs_S.tolist(), row.targets_S[-1]] == [*front, *tokens.tolist()]
        scored = row.targets_S != IGNORE_INDEX
        assert np.array_equal(np.flatnonzero(scored), np.arange(row.prefix_len - 1, len(row.inputs_S)))
        assert np.array_equal(row.targets_S[:-1][scored[:-1]], row.inputs_S[1:][scored[:-1]])
        prefix_lengths.append(row.prefix_len - len(front))
    assert set(prefix_lengths) == set(range(1, 50)), "a prefix length does not occur"
    assert max(Counter(prefix_lengths).values()) < 3 * min(Counter(prefix_lengths).values())


def test_encoder_reads_the_prefix():
    tokens = make_text(50)
    row = make_prefix_example(TokenWindow(tokens), make_rng(), PrefixSpec(), VOCABULARY, is_encoder_decoder=True)
    assert np.concatenate((row.encoder_T, row.targets_S)).tolist() == tokens.tolist()
    assert row.inputs_S.tolist() == [START, *row.targets_S[:-1].tolist()]


# --- fill in the middle


@pytest.mark.parametrize("spm", [0.0, 1.0])
def test_fim_moves_the_middle_to_the_end(spm):
    tokens = make_text(40)
    before, middle, after = (VOCABULARY.special_id(f"fim_{part}") for part in ("prefix", "middle", "suffix"))
    for seed in range(200):
        row = make_fim_example(TokenWindow(tokens), make_rng(seed), FIMSpec(fim_rate=1.0, fim_spm_rate=spm), VOCABULARY)
        sequence = [*row.inputs_S.tolist(), int(row.targets_S[-1])]
        assert np.array_equal(row.targets_S[:-1], row.inputs_S[1:])
        before_at, middle_at, after_at = sequence.index(before), sequence.index(middle), sequence.index(after)
        if spm:
            assert (before_at, after_at) == (0, 1)
            suffix, prefix_and_middle = sequence[2:middle_at], sequence[middle_at + 1 :]
            assert [*prefix_and_middle, *suffix] == tokens[:-3].tolist()
        else:
            assert before_at == 0
            prefix, suffix = sequence[1:after_at], sequence[after_at + 1 : middle_at]
            assert [*prefix, *sequence[middle_at + 1 :], *suffix] == tokens[:-3].tolist()


def test_fim_rate_is_respected():
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


def test_positions_restart_at_each_document():
    documents = np.array([0, 0, 1, 1, 1, 2, 3])
    assert compute_document_positions(documents[None])[0].tolist() == [0, 1, 0, 1, 2, 0, 0]
    assert compute_document_positions(np.array([[0, 1, 0, 1, -1]]))[0].tolist() == [0, 0, 1, 1, 0], (
        "positions are wrong where a document's tokens are not adjacent"
    )


@pytest.mark.parametrize("architecture", ["decoder", "encoder", "encoder_decoder"])
def test_document_ids_follow_reordered_tokens(architecture):
    """The ids of document d are from 100 d to 100 d + 6, so an id identifies its document."""
    name = {"decoder": "span", "encoder": "masked", "encoder_decoder": "span"}[architecture]
    config = make_config(
        ranks=1,
        model={"architecture": architecture, "vocab_size": 400},
        objective={"name": name},
        data={"document_mask": True},
    )
    objective = build_objective(config, VOCABULARY)
    window = np.concatenate([[*range(100 * d, 100 * d + 7), EOT] for d in range(9)])
    window = window[: objective.components[0][1].window_tokens]
    with pytest.raises(ValueError, match="without document ids"):
        objective([window], np.arange(1))
    document_ids = np.arange(len(window)) // 8
    batch = objective([TokenWindow(window, document_ids_W=document_ids)], np.arange(1))
    sequences = [(batch.inputs_BS[0], batch.mask.documents_BT[0])]
    if batch.encoder_input is not None:
        sequences.append((batch.encoder_input.tokens_BT[0], batch.encoder_input.mask.documents_BT[0]))
    for tokens, documents in sequences:
        is_text = (tokens < EOT) if name == "span" else (batch.targets_BS[0] == IGNORE_INDEX) & (tokens < EOT)
        assert torch.equal(tokens[is_text] // 100, documents[is_text])
        assert len(set(documents[is_text].tolist())) >= 2


# --- examples depend only on (window, seed, sample id)


def make_objective(seed=3, **changes):
    """Build an objective; `changes` are config sections."""
    return build_objective(make_config(ranks=1, model={"vocab_size": 400}, run={"seed": seed}, **changes), VOCABULARY)


MIXED = {
    "mixture": [
        {"name": "span", "mode": "R", "noise_density": 0.5},
        {"name": "causal"},
        {"name": "prefix", "mode": "S", "see_prefix": False},
    ]
}


def test_example_depends_only_on_its_sample_id():
    objective = make_objective(objective=MIXED)
    sizes = [size.window_tokens for _, size in objective.components]
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


def test_causal_components_have_no_prefix():
    objective = make_objective(objective=MIXED)
    rows = [
        objective.build_example(make_text(size.window_tokens), 0, component_id)
        for component_id, (_, size) in enumerate(objective.components)
    ]
    assert rows[0].prefix_len > 0
    assert (rows[1].prefix_len, rows[2].prefix_len) == (0, 0)


def test_causal_batch_equals_shifted_windows():
    objective = make_objective()
    windows = np.stack([make_text(33, seed) for seed in range(4)])
    batch = objective(windows, np.arange(4))
    assert objective.has_plain_windows
    assert batch.mask.is_trivial
    assert np.array_equal(batch.inputs_BS, windows[:, :-1])
    assert np.array_equal(batch.targets_BS, windows[:, 1:])
    assert batch.num_valid_tokens == 4 * 32


def test_added_ids_have_names():
    assert [VOCABULARY.describe_added_id(VOCAB_SIZE + number) for number in range(len(SPECIAL_TOKENS))] == [
        f"<{name}>" for name in SPECIAL_TOKENS
    ]
    assert VOCABULARY.describe_added_id(VOCABULARY.sentinel_id(7)) == "<sentinel 7>"
    assert VOCABULARY.describe_added_id(EOT) is None


def test_padding_has_no_loss():
    config = make_config(
        ranks=1, model={"architecture": "encoder_decoder", "vocab_size": 400}, objective={"name": "prefix"}
    )
    objective = build_objective(config, VOCABULARY)
    assert isinstance(objective, Objective)
    assert isinstance(objective.components[0][1], SequenceLengths)
    batch = objective([make_text(objective.components[0][1].window_tokens, seed) for seed in range(5)], np.arange(5))
    assert batch.encoder_input is not None
    assert batch.encoder_input.tokens_BT.shape == (5, 32)
    padding = batch.encoder_input.mask.documents_BT == -1
    assert (~padding).sum(1).tolist() == [32 - int((row != IGNORE_INDEX).sum()) for row in batch.targets_BS]
    assert batch.num_valid_tokens == int((batch.targets_BS != IGNORE_INDEX).sum())
