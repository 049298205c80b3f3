"""Generation: the cache changes no token, filters keep the right tokens, and no character is split."""

import itertools
from collections import Counter

import pytest
import torch
from torch import nn

from dist_llm.config.schema import ModelConfig
from dist_llm.errors import ConfigError
from dist_llm.generation import Prompt, Sampling, encode_prompt, generate_text, generate_tokens, sample_token
from dist_llm.models.attention_mask import FULL
from dist_llm.models.build_model import build_model
from dist_llm.models.init import init_param_, init_rule
from dist_llm.text.bpe_tokenizer import SPLIT_PATTERNS, BPETokenizer
from dist_llm.text.tokenizer import ENDOFTEXT
from tests.laws.law import make_config

MAX_LENGTH = 24
GREEDY = Sampling(max_tokens=12, temperature=0)
EOT = 256
CAUSAL = make_config(1, {})


def build(**changes):
    shape = {"d_model": 16, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "head_dim": 8, "d_ff": 32, "vocab_size": 30}
    config = ModelConfig(**shape, max_seq_len=MAX_LENGTH, init_std=0.5, **changes)
    model = build_model(config).eval()
    for name, parameter in model.named_parameters():
        rule = init_rule(name, parameter.shape, config)
        init_param_(parameter.detach(), name, rule, 0, parameter.shape, (0,) * parameter.ndim)
    return model


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(12, 1.0, 5, 0.9, seed=3), Sampling(12, seed=4)], ids=str)
@pytest.mark.parametrize("positions", ["rope", "learned", "sinusoidal"])
def test_the_cache_changes_no_token(positions, sampling):
    model = build(positions=positions)
    prompt = [3, 1, 4, 1, 5]
    cached = list(generate_tokens(model, Prompt(prompt), sampling, MAX_LENGTH))
    assert cached == list(generate_tokens(model, Prompt(prompt), sampling, MAX_LENGTH, use_cache=False))
    assert len(set(cached)) > 1, "the output varies"


@pytest.mark.parametrize("bidirectional", [False, True], ids=["causal", "prefix"])
@pytest.mark.parametrize("changes", [{"positions": "relative"}, {"qk_norm": True, "logit_cap": 3.0}], ids=str)
def test_the_cache_changes_no_token_of_other_settings(changes, bidirectional):
    model, prompt = build(**changes), Prompt([3, 1, 4, 1, 5], bidirectional)
    cached = list(generate_tokens(model, prompt, GREEDY, MAX_LENGTH))
    assert cached == list(generate_tokens(model, prompt, GREEDY, MAX_LENGTH, use_cache=False))


def test_a_prefix_attends_to_all_of_itself():
    model = build(positions="learned")
    ids = [3, 1, 4, 1, 5]
    (token,) = generate_tokens(model, Prompt(ids, bidirectional=True), Sampling(1, temperature=0), MAX_LENGTH)
    logits = model(torch.tensor([ids]), mask=FULL)
    assert token == int(logits[0, -1].argmax())
    assert not torch.allclose(logits, model(torch.tensor([ids])))


@pytest.mark.parametrize("positions", ["learned", "relative", "rope"])
def test_an_encoder_decoder_encodes_once(positions):
    model = build(architecture="encoder_decoder", n_encoder_layers=2, positions=positions)
    prompt = Prompt([7], encoder_ids=[3, 1, 4, 1, 5])
    encoded = []
    model.source_norm.register_forward_hook(lambda *rest: encoded.append(1))
    cached = list(generate_tokens(model, prompt, GREEDY, MAX_LENGTH))
    assert len(encoded) == 1, "the encoder runs once"
    assert cached == list(generate_tokens(model, prompt, GREEDY, MAX_LENGTH, use_cache=False))
    assert cached != list(generate_tokens(model, Prompt([7], encoder_ids=[9, 9, 2]), GREEDY, MAX_LENGTH))


def encode_with(prompt="ab", architecture="decoder", **objective):
    changes = {"architecture": architecture, "vocab_size": 0}
    return encode_prompt(make_config(1, changes, objective=objective), byte_tokenizer(), prompt)


def test_prompts_have_the_form_of_training_examples():
    a, b, start, sentinel = ord("a"), ord("b"), 257, 257 + 8
    assert encode_with(name="causal") == Prompt([a, b], False, None, frozenset((EOT, sentinel + 1)))
    assert encode_with(name="prefix", mode="S").ids == [257 + 3, a, b]
    assert encode_with(name="prefix", mode="S").bidirectional
    assert not encode_with(name="prefix", see_prefix=False).bidirectional
    assert encode_with(name="span").ids == [a, b, sentinel, EOT, sentinel]
    prompt = encode_with(architecture="encoder_decoder", name="span")
    assert (prompt.ids, prompt.encoder_ids) == ([start, sentinel], [a, b, sentinel, EOT])
    prompt = encode_with(architecture="encoder_decoder", name="prefix", mode="S")
    assert (prompt.ids, prompt.encoder_ids) == ([start], [257 + 3, a, b])
    prompt = encode_with(mixture=[{"name": "span", "mode": "R"}, {"name": "prefix", "mode": "S"}])
    assert prompt.ids == [257 + 3, a, b], "a mixture uses its component that continues the text"


def test_an_id_that_the_objective_added_shows_its_name():
    assert run_script([257 + 1, *b"x", EOT])[1] == ["<mask>", "x"]


def test_with_the_cache_each_token_is_read_once():
    model, lengths = build(), []
    model.register_forward_pre_hook(lambda module, inputs: lengths.append(inputs[0].shape[1]))
    list(generate_tokens(model, Prompt([1, 2, 3]), GREEDY, MAX_LENGTH))
    assert lengths == [3] + [1] * 11


def test_greedy_takes_the_likeliest_each_time():
    model, ids = build(), [3, 1, 4]
    for token in generate_tokens(model, Prompt(ids), GREEDY, MAX_LENGTH):
        assert token == int(model(torch.tensor([ids]))[0, -1].argmax())
        ids = [*ids, token]


def test_seeds_repeat_and_differ():
    model = build()
    runs = [list(generate_tokens(model, Prompt([1]), Sampling(10, seed=seed), MAX_LENGTH)) for seed in (0, 1, 2, 0)]
    assert runs[0] == runs[3]
    assert len({tuple(run) for run in runs}) == 3


def test_the_global_random_state_does_not_matter():
    model = build()
    torch.manual_seed(1)
    first = list(generate_tokens(model, Prompt([1]), Sampling(10), MAX_LENGTH))
    torch.manual_seed(2)
    assert list(generate_tokens(model, Prompt([1]), Sampling(10), MAX_LENGTH)) == first


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "max_length", "expected_length"),
    [(3, 5, 24, 5), (3, 50, 24, 21), (23, 5, 24, 1), (3, 1, 24, 1)],
)
def test_generation_ends_at_max_tokens_or_the_length_of_the_model(prompt, max_tokens, max_length, expected_length):
    assert (
        len(list(generate_tokens(build(), Prompt([1] * prompt), Sampling(max_tokens), max_length))) == expected_length
    )


PROBABILITIES = torch.tensor([0.15, 0.5, 0.05, 0.3])  # ids by likelihood: 1, 3, 0, 2


def draw_counts(sampling, n=2000, logits=None):
    generator = torch.Generator().manual_seed(0)
    logits = PROBABILITIES.log() if logits is None else logits
    return Counter(sample_token(logits, sampling, generator) for _ in range(n))


def match_probabilities(counts, expected, n=2000):
    """Check that counts are within five standard errors of the expected probabilities."""
    assert set(counts) == set(expected)
    return all(abs(counts[i] - n * p) < 5 * (n * p * (1 - p)) ** 0.5 + 1e-9 for i, p in expected.items())


@pytest.mark.parametrize(
    ("top_k", "kept_ids"), [(0, {0, 1, 2, 3}), (1, {1}), (2, {1, 3}), (3, {0, 1, 3}), (9, {0, 1, 2, 3})]
)
def test_top_k_keeps_the_k_likeliest_in_proportion(top_k, kept_ids):
    total = sum(float(PROBABILITIES[i]) for i in kept_ids)
    assert match_probabilities(
        draw_counts(Sampling(top_k=top_k)), {i: float(PROBABILITIES[i]) / total for i in kept_ids}
    )


@pytest.mark.parametrize(
    ("top_p", "kept_ids"),
    [
        (0.01, {1}),
        (0.49, {1}),
        (0.51, {1, 3}),
        (0.79, {1, 3}),
        (0.81, {0, 1, 3}),
        (0.96, {0, 1, 2, 3}),
        (1.0, {0, 1, 2, 3}),
    ],
)
def test_top_p_keeps_the_fewest_that_hold_p(top_p, kept_ids):
    total = sum(float(PROBABILITIES[i]) for i in kept_ids)
    assert match_probabilities(
        draw_counts(Sampling(top_p=top_p)), {i: float(PROBABILITIES[i]) / total for i in kept_ids}
    )


def test_top_p_1_keeps_the_tokens_beyond_which_the_sum_rounds_to_1(monkeypatch):
    num_candidates = []

    def multinomial(probabilities_V, *rest, **more):
        num_candidates.append(int((probabilities_V > 0).sum()))
        return torch.tensor([0])

    monkeypatch.setattr(torch, "multinomial", multinomial)
    logits = torch.full((1000,), -18.0)  # 1.5e-8 each: less than half the distance from 1 to the next number
    logits[0] = 0.0
    sample_token(logits, Sampling(top_p=1.0), torch.Generator())
    assert num_candidates == [1000]


def test_the_nucleus_is_taken_after_top_k():
    """The two likeliest tokens have 5/8 and 3/8, so the first alone has more than half."""
    assert set(draw_counts(Sampling(top_k=2, top_p=0.6), 200)) == {1}
    assert set(draw_counts(Sampling(top_p=0.6), 200)) == {1, 3}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature_is_a_power_of_the_probabilities(temperature):
    expected = PROBABILITIES ** (1 / temperature)
    expected = (expected / expected.sum()).tolist()
    assert match_probabilities(draw_counts(Sampling(temperature=temperature)), dict(enumerate(expected)))


def test_temperature_zero_is_greedy():
    assert set(draw_counts(Sampling(temperature=0), 20)) == {1}


def byte_tokenizer():
    return BPETokenizer("byte", SPLIT_PATTERNS["gpt2"], {bytes([byte]): byte for byte in range(256)}, {ENDOFTEXT: EOT})


class ScriptedModel(nn.Module):
    """A model that returns the given ids whatever its input, then `x` forever."""

    def __init__(self, ids):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.ids, self.input_ids, self.calls = [*ids], [], 0

    def forward(self, tokens_BS, mask, cache):
        self.input_ids.append(tokens_BS[0].tolist())
        token = self.ids[self.calls] if self.calls < len(self.ids) else ord("x")
        self.calls += 1
        return nn.functional.one_hot(torch.tensor(token), EOT + 9).float().expand(*tokens_BS.shape, EOT + 9)


def run_script(ids, max_tokens=100, prompt="a", max_length=200, stop=True):
    model = ScriptedModel(ids)
    encoded_prompt = encode_prompt(CAUSAL, byte_tokenizer(), prompt)
    strings = list(
        generate_text(model, byte_tokenizer(), encoded_prompt, Sampling(max_tokens, temperature=0), max_length, stop)
    )
    return model, strings


def test_generation_stops_before_the_end_of_text():
    model, strings = run_script([*b"hi", EOT, *b"more"])
    assert strings == ["h", "i"]
    assert model.calls == 3


def test_a_sharded_model_continues_without_output():
    model, strings = run_script([*b"hi", EOT, *b"more"], max_tokens=10, stop=False)
    assert strings == ["h", "i"]
    assert model.calls == 10


@pytest.mark.parametrize("word", ["é", "漢字", "a🙂b", "naïve — 漢"])
def test_characters_are_complete(word):
    _, strings = run_script([*word.encode(), EOT])
    assert strings == list(word)


def test_a_character_cut_by_the_last_token_shows_as_replaced():
    word = "a漢".encode()
    assert run_script(word, max_tokens=3)[1] == ["a", "�"]
    assert run_script([*word[:2], EOT])[1] == ["a", "�"], "also when the end of text splits it"
    assert "".join(run_script([*b"a", 0xFF, *b"b", EOT])[1]) == "a�b", "invalid bytes"


def test_the_prompt_is_read_and_an_empty_one_is_the_end_of_text():
    assert run_script([EOT], prompt="hé")[0].input_ids == [[*"hé".encode()]]
    assert run_script([EOT], prompt="")[0].input_ids == [[EOT]]
    assert run_script([EOT], prompt=ENDOFTEXT)[0].input_ids == [[*ENDOFTEXT.encode()]], (
        "the name of the end of text is plain text in a prompt"
    )


def test_a_prompt_as_long_as_the_model_is_refused():
    with pytest.raises(ConfigError, match="the prompt has 5 tokens, but the model takes at most 5; shorten it"):
        run_script([], prompt="abcde", max_length=5)
    assert run_script([*b"z"], prompt="abcd", max_length=5)[1] == ["z"]


def test_strings_are_yielded_as_they_are_sampled():
    model = ScriptedModel(b"abc")
    strings = generate_text(
        model, byte_tokenizer(), encode_prompt(CAUSAL, byte_tokenizer(), "p"), Sampling(50, temperature=0), 100
    )
    assert list(itertools.islice(strings, 2)) == ["a", "b"]
    assert model.calls == 2


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("max_tokens", 0, "--max-tokens 0: must be at least 1"),
        ("temperature", -0.1, "--temperature -0.1: must be at least 0"),
        ("temperature", float("nan"), "--temperature nan: must be"),
        ("top_k", -1, "--top-k -1: must be at least 0"),
        ("top_p", 0.0, "--top-p 0.0: must be above 0 and at most 1"),
        ("top_p", 1.1, "--top-p 1.1: must be above 0 and at most 1"),
    ],
)
def test_a_setting_out_of_range_is_named(field, value, message):
    with pytest.raises(ConfigError, match=message):
        Sampling(**{field: value}).check()


def test_all_settings_out_of_range_are_reported_and_limits_pass():
    with pytest.raises(ConfigError) as excinfo:
        Sampling(0, -1, -1, 2).check()
    assert len(str(excinfo.value).splitlines()) == 4
    Sampling(1, 0, 0, 1).check()
    Sampling(1, 0, 1, 0.001).check()
