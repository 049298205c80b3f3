"""What each objective hides, shows and asks for; by statistics, and by putting the text together again."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_llm.config.lengths import SPECIALS, Lengths, lengths
from dist_llm.config.schema import ObjectiveSpec
from dist_llm.losses.cross_entropy import IGNORE
from dist_llm.objectives.build_objective import Objective, build_objective
from dist_llm.objectives.examples import TokenWindow, document_positions
from dist_llm.objectives.fill_in_the_middle import fim_example
from dist_llm.objectives.masked_lm import masked_example
from dist_llm.objectives.objective_vocabulary import Vocabulary
from dist_llm.objectives.prefix_lm import prefix_example
from dist_llm.objectives.span_corruption import sample_segment_ids, span_example
from tests.laws.law import make_config

V = 1000
EOT = V - 1
VOCABULARY = Vocabulary(V, EOT)
MASK, START = VOCABULARY.special("mask"), VOCABULARY.special("start")


def text(length, seed=0, ends=0.05):
    rng = np.random.default_rng(seed)
    return np.where(rng.random(length) < ends, EOT, rng.integers(0, V - 1, length)).astype(np.uint16)


def rng(seed=0):
    return np.random.default_rng([seed, 1])  # not the stream that the text is drawn from


def restored(kept, cut):
    """The text that a source (without mode) and its targets were made of."""
    spans = []
    for token in cut[:-1].tolist():
        if token >= VOCABULARY.sentinel(0):
            spans.append([])
        else:
            spans[-1].append(token)
    out = []
    for token in kept[:-1].tolist():
        out += spans[token - VOCABULARY.sentinel(0)] if token >= VOCABULARY.sentinel(0) else [token]
    return np.array(out)


# --- masked


def test_masked_statistics_over_a_million_tokens():
    tokens = text(1_000_000)
    row = masked_example(TokenWindow(tokens), rng(), ObjectiveSpec(name="masked"), VOCABULARY)
    inputs, targets = row.inputs_S[1:], row.targets_S[1:]
    selected = targets != IGNORE
    can_be = (tokens != EOT).sum()
    assert selected.sum() / can_be == pytest.approx(0.15, abs=0.002)
    assert not selected[tokens == EOT].any()
    assert np.array_equal(targets[selected], tokens[selected])
    assert np.array_equal(inputs[~selected], tokens[~selected]), "what is not selected is shown as it is"
    hidden = inputs[selected] == MASK
    kept = inputs[selected] == tokens[selected]
    assert hidden.mean() == pytest.approx(0.8, abs=0.005)
    assert kept.mean() == pytest.approx(0.1 + 0.1 / V, abs=0.005)
    drawn = inputs[selected][~hidden & ~kept]
    assert len(drawn) / selected.sum() == pytest.approx(0.1, abs=0.005)
    assert drawn.max() < V
    assert not (drawn == EOT).any(), "no special token is ever put in"
    assert len(set(drawn.tolist())) > 0.9 * V
    assert (row.inputs_S[0], row.targets_S[0]) == (START, IGNORE)


def test_whole_words_are_selected_together():
    word = np.zeros((V, 2), dtype=bool)
    word[: V // 2] = True  # ids below V/2 begin and end inside a word, so they go on with one
    vocabulary = Vocabulary(V, EOT, word)
    tokens = text(200_000, seed=1)
    row = masked_example(
        TokenWindow(tokens), rng(), ObjectiveSpec(name="masked", whole_words=True, mask_rate=0.2), vocabulary
    )
    selected = row.targets_S[1:] != IGNORE
    goes_on = (tokens[1:] < V // 2) & (tokens[:-1] < V // 2)
    assert np.array_equal(selected[1:][goes_on], selected[:-1][goes_on])
    assert selected[tokens != EOT].mean() == pytest.approx(0.2, abs=0.01)
    assert (selected[1:] != selected[:-1]).any()


def test_the_tokenizer_says_what_is_inside_a_word():
    from dist_llm.text.bpe_tokenizer import SPLIT_PATTERNS, BPETokenizer
    from dist_llm.text.tokenizer import ENDOFTEXT

    ranks = {bytes([byte]): byte for byte in range(256)} | {b" the": 256, b"ing": 257, b"a,": 258}
    word = BPETokenizer("t", SPLIT_PATTERNS["gpt2"], ranks, {ENDOFTEXT: 259}).vocabulary(with_word_edges=True).word_V2
    assert word[256].tolist() == [False, True]
    assert word[257].tolist() == [True, True]
    assert word[258].tolist() == [True, False]
    assert word[259].tolist() == [False, False]


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
def test_what_was_cut_out_fits_in_again(seq_len, density, mean, two_stacks, mode, seed):
    spec = ObjectiveSpec(name="span", noise_density=density, mean_span=mean, mode=mode)
    size = lengths(spec, "encoder_decoder" if two_stacks else "decoder", seq_len)
    tokens = text(size.window, seed)
    row = span_example(TokenWindow(tokens), rng(seed), spec, size, VOCABULARY, two_stacks)
    front = 1 if mode else 0
    if two_stacks:
        kept, cut = row.encoder_T, row.targets_S
        assert len(kept) == seq_len
        assert row.inputs_S.tolist() == [START, *cut[:-1].tolist()]
    else:
        assert len(row.inputs_S) == len(row.targets_S) == seq_len
        kept, cut = row.inputs_S[: row.prefix], row.targets_S[row.prefix - 1 :]
        assert (row.targets_S[: row.prefix - 1] == IGNORE).all()
        assert np.array_equal(row.inputs_S[row.prefix :], cut[:-1])
    if mode:
        assert kept[0] == VOCABULARY.special("X")
    assert np.array_equal(restored(kept[front:], cut), tokens)
    for part in (kept, cut):
        sentinels = part[part >= VOCABULARY.sentinel(0)] - VOCABULARY.sentinel(0)
        assert sentinels.tolist() == list(range(size.spans)), "each once, in order"
        assert part[-1] == EOT


@pytest.mark.parametrize("length", [2, 3, 5, 17, 100, 2000])
@pytest.mark.parametrize("density", [0.01, 0.15, 0.5, 0.9])
def test_segments_hold_all_tokens_and_none_is_empty(length, density):
    noise = min(max(round(length * density), 1), length - 1)
    for spans in {1, min(noise, length - noise)}:
        found = sample_segment_ids(rng(), length, noise, spans)
        assert sorted(set(found.tolist())) == list(range(2 * spans))
        assert (found % 2).sum() == noise
        assert (np.diff(found) >= 0).all()


def test_every_cut_is_as_likely():
    """Noise 3 in 2 spans of 6 tokens: 2 x 2 ways, each a quarter."""
    generator = rng()
    seen = Counter(tuple(sample_segment_ids(generator, 6, 3, 2).tolist()) for _ in range(4000))
    assert len(seen) == 4
    assert all(900 < count < 1100 for count in seen.values())


# --- prefix


@pytest.mark.parametrize("mode", ["", "S"])
def test_the_prefix_is_seen_and_the_rest_is_asked_for(mode):
    tokens, cuts = text(50), []
    for seed in range(2000):
        row = prefix_example(
            TokenWindow(tokens), rng(seed), ObjectiveSpec(name="prefix", mode=mode), VOCABULARY, two_stacks=False
        )
        front = [VOCABULARY.special("S")] if mode else []
        assert [*row.inputs_S.tolist(), row.targets_S[-1]] == [*front, *tokens.tolist()]
        scored = row.targets_S != IGNORE
        assert np.array_equal(np.flatnonzero(scored), np.arange(row.prefix - 1, len(row.inputs_S)))
        assert np.array_equal(row.targets_S[:-1][scored[:-1]], row.inputs_S[1:][scored[:-1]])
        cuts.append(row.prefix - len(front))
    assert set(cuts) == set(range(1, 50)), "every place"
    assert max(Counter(cuts).values()) < 3 * min(Counter(cuts).values())


def test_a_prefix_for_two_stacks():
    tokens = text(50)
    row = prefix_example(TokenWindow(tokens), rng(), ObjectiveSpec(name="prefix"), VOCABULARY, two_stacks=True)
    assert np.concatenate((row.encoder_T, row.targets_S)).tolist() == tokens.tolist()
    assert row.inputs_S.tolist() == [START, *row.targets_S[:-1].tolist()]


# --- fill in the middle


@pytest.mark.parametrize("spm", [0.0, 1.0])
def test_the_middle_comes_last(spm):
    tokens = text(40)
    before, middle, after = (VOCABULARY.special(f"fim_{part}") for part in ("prefix", "middle", "suffix"))
    for seed in range(200):
        row = fim_example(
            TokenWindow(tokens), rng(seed), ObjectiveSpec(name="fim", fim_rate=1.0, fim_spm_rate=spm), VOCABULARY
        )
        whole = [*row.inputs_S.tolist(), int(row.targets_S[-1])]
        assert np.array_equal(row.targets_S[:-1], row.inputs_S[1:])
        a, b, c = whole.index(before), whole.index(middle), whole.index(after)
        if spm:
            assert (a, c) == (0, 1)
            suffix, rest = whole[2:b], whole[b + 1 :]
            assert [*rest, *suffix] == tokens[:-3].tolist()
        else:
            assert a == 0
            assert [*whole[1:c], *whole[b + 1 :], *whole[c + 1 : b]] == tokens[:-3].tolist()


def test_some_samples_are_left_as_they_are():
    tokens = text(40)
    changed = [
        not np.array_equal(
            fim_example(TokenWindow(tokens), rng(seed), ObjectiveSpec(name="fim"), VOCABULARY).inputs_S, tokens[:-1]
        )
        for seed in range(1000)
    ]
    assert np.mean(changed) == pytest.approx(0.5, abs=0.05)


# --- documents


def test_positions_restart_in_each_document():
    documents = np.array([0, 0, 1, 1, 1, 2, 3])
    assert document_positions(documents[None])[0].tolist() == [0, 1, 0, 1, 2, 0, 0]
    assert document_positions(np.array([[0, 1, 0, 1, -1]]))[0].tolist() == [0, 0, 1, 1, 0], (
        "they need not be neighbours"
    )


@pytest.mark.parametrize("architecture", ["decoder", "encoder", "encoder_decoder"])
def test_documents_travel_with_their_tokens(architecture):
    """Each document's tokens come from a range of ids of its own, so the ids say whose they are."""
    name = {"decoder": "span", "encoder": "masked", "encoder_decoder": "span"}[architecture]
    config = make_config(
        1, {"architecture": architecture, "vocab_size": 0}, objective={"name": name}, data={"document_mask": True}
    )
    objective = build_objective(config, VOCABULARY)
    window = np.concatenate([[*range(100 * d, 100 * d + 7), EOT] for d in range(9)])
    window = window[: objective.components[0][1].window]
    with pytest.raises(ValueError, match="without document ids"):
        objective([window], np.arange(1))
    numbers = np.arange(len(window)) // 8
    batch = objective([TokenWindow(window, document_ids_W=numbers)], np.arange(1))
    parts = [(batch.inputs_BS[0], batch.mask.documents_BT[0])]
    if batch.encoder_input is not None:
        parts.append((batch.encoder_input.tokens_BT[0], batch.encoder_input.mask.documents_BT[0]))
    for tokens, documents in parts:
        real = (tokens < EOT) if name == "span" else (batch.targets_BS[0] == IGNORE) & (tokens < EOT)
        assert torch.equal(tokens[real] // 100, documents[real])
        assert len(set(documents[real].tolist())) >= 2


# --- the function of (window, seed, number)


def objective(seed=3, **changes):
    return build_objective(make_config(1, {"vocab_size": 0}, run={"seed": seed}, **changes), VOCABULARY)


MIXED = {
    "mixture": [
        {"name": "span", "mode": "R", "noise_density": 0.5},
        {"name": "causal"},
        {"name": "prefix", "mode": "S", "see_prefix": False},
    ]
}


def test_a_sample_is_a_function_of_its_number_and_not_of_its_batch():
    made = objective(objective=MIXED)
    sizes = [size.window for _, size in made.components]
    members = [0, 1, 2, 0]
    windows = [text(sizes[member], seed) for seed, member in enumerate(members)]
    together = made(windows, np.arange(4), members)
    for place in range(4):
        alone = made(windows[place : place + 1], np.array([place]), [members[place]])
        assert torch.equal(alone.inputs_BS[0], together.inputs_BS[place])
        assert torch.equal(alone.targets_BS[0], together.targets_BS[place])
        assert torch.equal(alone.mask.prefix_B[0], together.mask.prefix_B[place])
    other_number = made(windows[:1], np.array([9]), [0])
    other_seed = objective(seed=4, objective=MIXED)(windows[:1], np.array([0]), [0])
    for other in (other_number, other_seed):
        assert not torch.equal(other.inputs_BS[0], together.inputs_BS[0])


def test_members_that_see_no_prefix_have_none():
    made = objective(objective=MIXED)
    rows = [made.build_example(text(size.window), 0, member) for member, (_, size) in enumerate(made.components)]
    assert rows[0].prefix > 0
    assert (rows[1].prefix, rows[2].prefix) == (0, 0)


def test_plain_text_needs_no_rows():
    made = objective()
    windows = np.stack([text(33, seed) for seed in range(4)])
    batch = made(windows, np.arange(4))
    assert made.is_plain_causal
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
    made = build_objective(config, VOCABULARY)
    assert isinstance(made, Objective)
    assert isinstance(made.components[0][1], Lengths)
    batch = made([text(made.components[0][1].window, seed) for seed in range(5)], np.arange(5))
    assert batch.encoder_input is not None
    assert batch.encoder_input.tokens_BT.shape == (5, 32)
    padding = batch.encoder_input.mask.documents_BT == -1
    assert (~padding).sum(1).tolist() == [32 - int((row != IGNORE).sum()) for row in batch.targets_BS]
    assert batch.num_valid_tokens == int((batch.targets_BS != IGNORE).sum())
