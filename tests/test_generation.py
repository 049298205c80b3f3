"""Text generation: prompts, sampling, the KV cache and the decoding of tokens.

The KV cache does not change the sampled tokens. `top_k`, `top_p` and `temperature` give the expected probabilities.
"""

import itertools
from collections import Counter

import pytest
import torch
from torch import nn

from dist_llm.config.model_section import ModelConfig
from dist_llm.errors import ConfigError
from dist_llm.generation import Prompt, Sampling, encode_prompt, generate_text, generate_tokens, sample_token
from dist_llm.models.attention_mask import FULL
from dist_llm.models.build_model import build_model
from dist_llm.models.init import init_param_
from dist_llm.objectives.objective_vocabulary import ObjectiveVocabulary
from dist_llm.param_spec import collect_param_specs
from dist_llm.text.bpe_tokenizer import SPLIT_PATTERNS, BPETokenizer
from dist_llm.text.tokenizer import ENDOFTEXT
from tests.laws.law import make_config

MAX_SEQ_LEN = 24  # tokens
GREEDY_SAMPLING = Sampling(max_tokens=12, temperature=0)
EOT = 256  # the end-of-document token of the byte tokenizer
VOCABULARY = ObjectiveVocabulary(EOT + 1, EOT)
START, MASK, MODE_S = (VOCABULARY.special_id(name) for name in ("start", "mask", "S"))
SENTINEL_0, SENTINEL_1 = VOCABULARY.sentinel_id(0), VOCABULARY.sentinel_id(1)
CAUSAL_CONFIG = make_config(ranks=1)


def build_small_model(**changes):
    """Build a model with random parameters in eval mode; `changes` are keys of its config."""
    sizes = {"d_model": 16, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "head_dim": 8, "d_ff": 32, "vocab_size": 30}
    config = ModelConfig(**sizes, max_seq_len=MAX_SEQ_LEN, init_std=0.5, **changes)
    model = build_model(config).eval()
    specs = collect_param_specs(model)
    for name, parameter in model.named_parameters():
        init_param_(
            parameter.detach(), name, specs[name].init, seed=0, shape=parameter.shape, offset=(0,) * parameter.ndim
        )
    return model


@pytest.mark.parametrize(
    "sampling",
    [GREEDY_SAMPLING, Sampling(max_tokens=12, top_k=5, top_p=0.9, seed=3), Sampling(max_tokens=12, seed=4)],
    ids=str,
)
@pytest.mark.parametrize("positions", ["rope", "learned", "sinusoidal"])
def test_cache_does_not_change_tokens(positions, sampling):
    model = build_small_model(positions=positions)
    prompt_ids = [3, 1, 4, 1, 5]
    cached = list(generate_tokens(model, Prompt(ids=prompt_ids), sampling, MAX_SEQ_LEN))
    assert cached == list(generate_tokens(model, Prompt(ids=prompt_ids), sampling, MAX_SEQ_LEN, use_cache=False))
    assert len(set(cached)) > 1, "all tokens are equal, so the test cannot detect a wrong cache"


@pytest.mark.parametrize("bidirectional", [False, True], ids=["causal", "prefix"])
@pytest.mark.parametrize("changes", [{"positions": "relative"}, {"qk_norm": True, "logit_cap": 3.0}], ids=str)
def test_cache_does_not_change_tokens_of_other_architectures(changes, bidirectional):
    model, prompt = build_small_model(**changes), Prompt(ids=[3, 1, 4, 1, 5], bidirectional=bidirectional)
    cached = list(generate_tokens(model, prompt, GREEDY_SAMPLING, MAX_SEQ_LEN))
    assert cached == list(generate_tokens(model, prompt, GREEDY_SAMPLING, MAX_SEQ_LEN, use_cache=False))


def test_prompt_prefix_is_bidirectional():
    model = build_small_model(positions="learned")
    ids = [3, 1, 4, 1, 5]
    (token,) = generate_tokens(
        model, Prompt(ids=ids, bidirectional=True), Sampling(max_tokens=1, temperature=0), MAX_SEQ_LEN
    )
    logits = model(torch.tensor([ids]), mask=FULL)
    assert token == int(logits[0, -1].argmax())
    assert not torch.allclose(logits, model(torch.tensor([ids])))


@pytest.mark.parametrize("positions", ["learned", "relative", "rope"])
def test_encoder_runs_once_per_prompt(positions):
    model = build_small_model(architecture="encoder_decoder", n_encoder_layers=2, positions=positions)
    prompt = Prompt(ids=[7], encoder_ids=[3, 1, 4, 1, 5])
    encoder_calls = []
    model.source_norm.register_forward_hook(lambda *hook_arguments: encoder_calls.append(1))
    cached = list(generate_tokens(model, prompt, GREEDY_SAMPLING, MAX_SEQ_LEN))
    assert len(encoder_calls) == 1
    assert cached == list(generate_tokens(model, prompt, GREEDY_SAMPLING, MAX_SEQ_LEN, use_cache=False))
    assert cached != list(generate_tokens(model, Prompt(ids=[7], encoder_ids=[9, 9, 2]), GREEDY_SAMPLING, MAX_SEQ_LEN))


def encode_prompt_for(prompt="ab", architecture="decoder", **objective):
    """Encode a prompt for a model that was trained with this objective."""
    config = make_config(ranks=1, model={"architecture": architecture, "vocab_size": 400}, objective=objective)
    return encode_prompt(config, make_byte_tokenizer(), prompt)


def test_prompts_of_a_decoder_have_the_format_of_training_examples():
    a, b = b"ab"
    expected = Prompt(ids=[a, b], stop_ids=frozenset((EOT, SENTINEL_1)))
    assert encode_prompt_for(name="causal") == expected
    assert encode_prompt_for(name="prefix", mode="S").ids == [MODE_S, a, b]
    assert encode_prompt_for(name="span").ids == [a, b, SENTINEL_0, EOT, SENTINEL_0]


def test_a_prompt_is_bidirectional_if_the_objective_sees_the_prefix():
    assert encode_prompt_for(name="prefix", mode="S").bidirectional
    assert not encode_prompt_for(name="prefix", see_prefix=False).bidirectional


def test_prompts_of_an_encoder_decoder_have_the_format_of_training_examples():
    a, b = b"ab"
    prompt = encode_prompt_for(architecture="encoder_decoder", name="span")
    assert (prompt.ids, prompt.encoder_ids) == ([START, SENTINEL_0], [a, b, SENTINEL_0, EOT])
    prompt = encode_prompt_for(architecture="encoder_decoder", name="prefix", mode="S")
    assert (prompt.ids, prompt.encoder_ids) == ([START], [MODE_S, a, b])


def test_a_prompt_of_a_mixture_uses_the_component_that_predicts_the_next_token():
    prompt = encode_prompt_for(mixture=[{"name": "span", "mode": "R"}, {"name": "prefix", "mode": "S"}])
    assert prompt.ids == [MODE_S, *b"ab"]


def test_special_tokens_are_printed_by_name():
    assert generate_with_scripted_model([MASK, *b"x", EOT])[1] == ["<mask>", "x"]


def test_cached_generation_reads_each_token_once():
    model, tokens_per_call = build_small_model(), []
    model.register_forward_pre_hook(lambda module, inputs: tokens_per_call.append(inputs[0].shape[1]))
    list(generate_tokens(model, Prompt(ids=[1, 2, 3]), GREEDY_SAMPLING, MAX_SEQ_LEN))
    assert tokens_per_call == [3] + [1] * 11


def test_greedy_sampling_takes_the_most_likely_token():
    model, ids = build_small_model(), [3, 1, 4]
    for token in generate_tokens(model, Prompt(ids=ids), GREEDY_SAMPLING, MAX_SEQ_LEN):
        assert token == int(model(torch.tensor([ids]))[0, -1].argmax())
        ids = [*ids, token]


def test_seed_determines_the_tokens():
    model = build_small_model()
    runs = [
        list(generate_tokens(model, Prompt(ids=[1]), Sampling(max_tokens=10, seed=seed), MAX_SEQ_LEN))
        for seed in (0, 1, 2, 0)
    ]
    assert runs[0] == runs[3]
    assert len({tuple(run) for run in runs}) == 3


def test_global_random_state_does_not_affect_sampling():
    model = build_small_model()
    torch.manual_seed(1)
    tokens_of_first_state = list(generate_tokens(model, Prompt(ids=[1]), Sampling(max_tokens=10), MAX_SEQ_LEN))
    torch.manual_seed(2)
    assert list(generate_tokens(model, Prompt(ids=[1]), Sampling(max_tokens=10), MAX_SEQ_LEN)) == tokens_of_first_state


@pytest.mark.parametrize(
    ("prompt_len", "max_tokens", "num_generated"),
    [(3, 5, 5), (3, 50, MAX_SEQ_LEN - 3), (MAX_SEQ_LEN - 1, 5, 1), (3, 1, 1)],
)
def test_generation_ends_at_max_tokens_or_max_seq_len(prompt_len, max_tokens, num_generated):
    prompt, sampling = Prompt(ids=[1] * prompt_len), Sampling(max_tokens=max_tokens)
    assert len(list(generate_tokens(build_small_model(), prompt, sampling, MAX_SEQ_LEN))) == num_generated


PROBABILITIES = torch.tensor([0.15, 0.5, 0.05, 0.3])  # the most likely id is 1, then 3, 0 and 2


def count_draws(sampling, num_draws=2000):
    """Sample from PROBABILITIES and count the draws of each id."""
    generator = torch.Generator().manual_seed(0)
    return Counter(sample_token(PROBABILITIES.log(), sampling, generator) for _ in range(num_draws))


def assert_counts_match(counts, expected, num_draws=2000):
    """Check that counts are within five standard errors of the expected probabilities."""
    assert set(counts) == set(expected)
    for token_id, probability in expected.items():
        standard_error = (num_draws * probability * (1 - probability)) ** 0.5
        assert abs(counts[token_id] - num_draws * probability) < 5 * standard_error + 1e-9, token_id


@pytest.mark.parametrize(
    ("top_k", "kept_ids"), [(0, {0, 1, 2, 3}), (1, {1}), (2, {1, 3}), (3, {0, 1, 3}), (9, {0, 1, 2, 3})]
)
def test_top_k_keeps_the_k_most_likely_tokens(top_k, kept_ids):
    kept_probabilities = {token_id: float(PROBABILITIES[token_id]) for token_id in kept_ids}
    total = sum(kept_probabilities.values())
    expected = {token_id: probability / total for token_id, probability in kept_probabilities.items()}
    assert_counts_match(count_draws(Sampling(top_k=top_k)), expected)


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
def test_top_p_keeps_the_smallest_nucleus(top_p, kept_ids):
    kept_probabilities = {token_id: float(PROBABILITIES[token_id]) for token_id in kept_ids}
    total = sum(kept_probabilities.values())
    expected = {token_id: probability / total for token_id, probability in kept_probabilities.items()}
    assert_counts_match(count_draws(Sampling(top_p=top_p)), expected)


def test_top_p_1_keeps_all_tokens_despite_rounding(monkeypatch):
    num_candidates = []

    def record_candidates(probabilities_V, *args, **kwargs):
        num_candidates.append(int((probabilities_V > 0).sum()))
        return torch.tensor([0])

    monkeypatch.setattr(torch, "multinomial", record_candidates)
    logits = torch.full((1000,), -18.0)  # a probability of 1.5e-8: in fp32 its sum with 1.0 is 1.0
    logits[0] = 0.0
    sample_token(logits, Sampling(top_p=1.0), torch.Generator())
    assert num_candidates == [1000]


def test_top_p_applies_after_top_k():
    """The two most likely tokens have probabilities 5/8 and 3/8. So the first token alone exceeds one half."""
    assert set(count_draws(Sampling(top_k=2, top_p=0.6), num_draws=200)) == {1}
    assert set(count_draws(Sampling(top_p=0.6), num_draws=200)) == {1, 3}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature_raises_the_probabilities_to_a_power(temperature):
    expected = PROBABILITIES ** (1 / temperature)
    expected = (expected / expected.sum()).tolist()
    assert_counts_match(count_draws(Sampling(temperature=temperature)), dict(enumerate(expected)))


def test_temperature_zero_is_greedy():
    assert set(count_draws(Sampling(temperature=0), num_draws=20)) == {1}


def make_byte_tokenizer():
    """Build a tokenizer whose tokens are the 256 bytes and the end of a document."""
    return BPETokenizer("byte", SPLIT_PATTERNS["gpt2"], {bytes([byte]): byte for byte in range(256)}, {ENDOFTEXT: EOT})


class ScriptedModel(nn.Module):
    """A model that predicts the given ids in their order, whatever its input is, and then `x` forever."""

    def __init__(self, ids):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.ids, self.input_ids, self.num_calls = [*ids], [], 0

    def forward(self, tokens_BS, mask, cache):
        self.input_ids.append(tokens_BS[0].tolist())
        token = self.ids[self.num_calls] if self.num_calls < len(self.ids) else ord("x")
        self.num_calls += 1
        return nn.functional.one_hot(torch.tensor(token), EOT + 9).float().expand(*tokens_BS.shape, EOT + 9)


def generate_with_scripted_model(ids, max_tokens=100, prompt="a", max_seq_len=200, stop=True):
    """Return the scripted model and the strings that it generates."""
    model = ScriptedModel(ids)
    encoded_prompt = encode_prompt(CAUSAL_CONFIG, make_byte_tokenizer(), prompt)
    sampling = Sampling(max_tokens=max_tokens, temperature=0)
    strings = list(generate_text(model, make_byte_tokenizer(), encoded_prompt, sampling, max_seq_len, stop=stop))
    return model, strings


def test_generation_stops_at_the_end_of_document_token():
    model, strings = generate_with_scripted_model([*b"hi", EOT, *b"more"])
    assert strings == ["h", "i"]
    assert model.num_calls == 3


def test_generation_with_stop_false_continues_without_output():
    """With a sharded model, all ranks must call the model equally often."""
    model, strings = generate_with_scripted_model([*b"hi", EOT, *b"more"], max_tokens=10, stop=False)
    assert strings == ["h", "i"]
    assert model.num_calls == 10


@pytest.mark.parametrize("word", ["é", "漢字", "a🙂b", "naïve — 漢"])
def test_yielded_characters_are_complete(word):
    _, strings = generate_with_scripted_model([*word.encode(), EOT])
    assert strings == list(word)


def test_incomplete_character_becomes_a_replacement_character():
    word = "a漢".encode()
    assert generate_with_scripted_model(word, max_tokens=3)[1] == ["a", "�"], (
        "the text is wrong where max_tokens ends inside a character"
    )
    assert generate_with_scripted_model([*word[:2], EOT])[1] == ["a", "�"], (
        "the text is wrong where the document ends inside a character"
    )


def test_invalid_bytes_become_replacement_characters():
    assert "".join(generate_with_scripted_model([*b"a", 0xFF, *b"b", EOT])[1]) == "a�b"


def test_the_model_reads_the_prompt():
    assert generate_with_scripted_model([EOT], prompt="hé")[0].input_ids == [[*"hé".encode()]]


def test_an_empty_prompt_is_the_end_of_document_token():
    assert generate_with_scripted_model([EOT], prompt="")[0].input_ids == [[EOT]]


def test_the_name_of_the_end_of_document_token_is_plain_text_in_a_prompt():
    assert generate_with_scripted_model([EOT], prompt=ENDOFTEXT)[0].input_ids == [[*ENDOFTEXT.encode()]]


def test_a_too_long_prompt_is_rejected():
    with pytest.raises(ConfigError, match="the prompt has 5 tokens, but the model takes at most 5; shorten it"):
        generate_with_scripted_model([], prompt="abcde", max_seq_len=5)
    assert generate_with_scripted_model([*b"z"], prompt="abcd", max_seq_len=5)[1] == ["z"]


def test_text_is_yielded_while_it_is_sampled():
    model = ScriptedModel(b"abc")
    strings = generate_text(
        model,
        make_byte_tokenizer(),
        encode_prompt(CAUSAL_CONFIG, make_byte_tokenizer(), "p"),
        Sampling(max_tokens=50, temperature=0),
        max_seq_len=100,
    )
    assert list(itertools.islice(strings, 2)) == ["a", "b"]
    assert model.num_calls == 2


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


def test_all_settings_out_of_range_are_reported():
    with pytest.raises(ConfigError) as excinfo:
        Sampling(max_tokens=0, temperature=-1, top_k=-1, top_p=2).check()
    assert len(str(excinfo.value).splitlines()) == 4


def test_settings_at_their_limits_pass():
    Sampling(max_tokens=1, temperature=0, top_k=0, top_p=1).check()
    Sampling(max_tokens=1, temperature=0, top_k=1, top_p=0.001).check()
