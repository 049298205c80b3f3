"""Our tokenizers and Hugging Face's give the same ids, whichever way they went; what would give others is refused."""

import ast
import json
import os
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers

import dist_llm.convert.export_tokenizers as convert
from dist_llm.config.schema import ModelConfig
from dist_llm.convert.export_tokenizers import export_tokenizer, import_tokenizer
from dist_llm.convert.hf_config import READERS
from dist_llm.data.tokenizer_file import identity
from dist_llm.errors import CheckpointError
from dist_llm.text.bpe_tokenizer import SPLIT_PATTERNS, BPETokenizer
from dist_llm.text.difficult_texts import DIFFICULT_TEXTS
from dist_llm.text.hf_bpe import convert_bpe, prove_equal
from dist_llm.text.hf_tokenizer import HFTokenizer, try_convert_to_bpe
from dist_llm.text.split_pattern import BYTE_LEVEL, build_pre_tokenizer, to_oniguruma
from dist_llm.text.tokenizer import ENDOFTEXT, TOKENIZER_FILE
from dist_llm.text.vocabulary import BYTES, build_tokenizer

transformers = pytest.importorskip("transformers")

GPT2 = os.environ.get("GPT2_VOCABULARY")  # a folder with the published gpt2_vocab.json and gpt2_merges.txt
SOURCE = Path(ast.__file__).read_text(encoding="utf-8")
PROSE = [f"The {n}th ship sailed to port {n * 7}; it's late, they'll wait — 漢字 {n}.\r\n" for n in range(400)]
STRANGE = ("", " ", "\n\n  \n", "ab  \n\n  cd  \n", "x \n", "12345678 ١٢٣٤٥", "don'T 'ſ 'K ß ŉ", "\ufeff\u0085\u2028")
TEXTS = (*DIFFICULT_TEXTS, *STRANGE, SOURCE)
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def learn():
    return iter([*PROSE, SOURCE[:100_000]])


def shuffled():
    """Substrings in no order that merging could learn, so that much is never reached; specials and gaps between."""
    rng = random.Random(0)
    cuts = {SOURCE[at : at + length].encode() for at in range(0, 60_000, 50) for length in (2, 3, 4, 5, 7)}
    tokens = sorted({b" " + cut for cut in cuts} | cuts)
    rng.shuffle(tokens)
    ranks = BYTES | {token: 300 + 2 * number for number, token in enumerate(tokens)}
    return BPETokenizer("mine", SPLIT_PATTERNS["cl100k"], ranks, {ENDOFTEXT: 299, "<|other|>": 301})


def build(name):
    if name == "shuffled":
        return shuffled()
    if name == "published gpt2":
        if GPT2 is None:
            pytest.skip("GPT2_VOCABULARY names no folder with the published files")
        return build_tokenizer(f"{GPT2}/gpt2_vocab.json,{GPT2}/gpt2_merges.txt", None, learn)
    spec, _, pattern = name.partition(" ")
    trained = build_tokenizer(spec, pattern.replace("cl100k", "llama3") or None, learn)
    return BPETokenizer(name, SPLIT_PATTERNS[pattern or "gpt2"], trained.ranks, trained.special_tokens)


NAMES = ["byte", "bpe:600 gpt2", "bpe:600 llama3", "bpe:600 cl100k", "shuffled", "published gpt2"]


@pytest.fixture(scope="module", params=NAMES)
def exported(request, tmp_path_factory):
    """A tokenizer of ours, and theirs made of it, which takes special tokens' strings for text as ours does."""
    native, directory = build(request.param), tmp_path_factory.mktemp("exported")
    export_tokenizer(native, directory)
    return SimpleNamespace(native=native, hf=load(directory, split_special_tokens=True), directory=directory)


@pytest.fixture(scope="module")
def bpe():
    return build("bpe:600 llama3")


def load(directory, **how):
    return transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True, **how)


def same(native, hf, text):
    ids = native.encode(text).tolist()
    assert hf(text)["input_ids"] == ids
    assert hf.decode(ids) == native.decode(ids) == text


def test_texts_give_the_same_ids_and_come_back(exported):
    for text in TEXTS:
        same(exported.native, exported.hf, text)
    cut = exported.native.encode("漢字")[1:].tolist()
    assert exported.hf.decode(cut) == exported.native.decode(cut)


WORDS = ["'", "s", "S", "T", "ſ", "re", "don't", "1", "23", "٣", "½", " ", "  ", "\t", "\n", "\r\n", "\u00a0", "\u2028"]
WORDS += ["_", "!?", "漢", "é", "e\u0301", "\u200d", "Ⅷ", "def ", "self", "    return", "\x00", "👩‍👩", "ǅ", "ʰ", "The"]


@given(text=st.text(max_size=40) | st.lists(st.sampled_from(WORDS), max_size=25).map("".join))
@settings(max_examples=100, deadline=None)
def test_any_text_gives_the_same_ids(exported, text):
    same(exported.native, exported.hf, text)


def test_the_way_there_and_back_changes_nothing(exported, tmp_path):
    assert import_tokenizer(exported.directory).sha256 == exported.native.sha256
    exported.hf.save_pretrained(tmp_path)
    assert import_tokenizer(tmp_path).sha256 == exported.native.sha256


@pytest.mark.parametrize("family", READERS)
def test_a_model_beside_it_does_not_change_the_class(bpe, family, tmp_path):
    """But for qwen2: there AutoTokenizer takes a class of its own whatever the files say, and has to be passed by."""
    export_tokenizer(bpe, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    if family == "qwen2":
        assert type(load(tmp_path)).__name__ == "Qwen2Tokenizer"
        hf = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path, split_special_tokens=True)
    else:
        hf = load(tmp_path, split_special_tokens=True)
    for text in DIFFICULT_TEXTS:
        same(bpe, hf, text)


def test_a_special_tokens_string_is_the_token_by_default(bpe, tmp_path):
    export_tokenizer(bpe, tmp_path)
    ids = load(tmp_path)(f"the{ENDOFTEXT}ship")["input_ids"]
    assert ids == [*bpe.encode("the"), bpe.eot, *bpe.encode("ship")]


@pytest.mark.parametrize(
    ("architecture", "bos"), [("encoder", "<start>"), ("encoder_decoder", "<start>"), ("decoder", ENDOFTEXT)]
)
def test_ids_of_objectives_have_names(bpe, architecture, bos, tmp_path):
    size = {"d_model": 8, "n_layers": 1, "n_heads": 1, "max_seq_len": 77}
    export_tokenizer(bpe, tmp_path, ModelConfig(architecture=architecture, vocab_size=620, **size))
    hf = load(tmp_path)
    assert (len(hf), hf.model_max_length) == (620, 77)
    assert (hf.bos_token, hf.eos_token, hf.pad_token, hf.unk_token) == (bos, ENDOFTEXT, ENDOFTEXT, None)
    vocabulary = bpe.vocabulary()
    assert hf.mask_token_id == vocabulary.special("mask")
    ids = hf("a <mask><sentinel 0> b<sentinel 11>")["input_ids"]
    a, b = bpe.encode("a"), bpe.encode(" b")
    assert ids == [*a, vocabulary.special("mask"), vocabulary.sentinel(0), *b, vocabulary.sentinel(11)]
    assert hf.decode(ids) == "a<mask><sentinel 0> b<sentinel 11>"
    assert hf.decode(ids, skip_special_tokens=True) == "a b"
    for number in range(600, 620):
        assert hf.convert_ids_to_tokens(number) == vocabulary.describe(number)
    assert import_tokenizer(tmp_path).sha256 == bpe.sha256


def test_padding_of_the_vocabulary_is_no_token(bpe, tmp_path):
    size = {"d_model": 8, "n_layers": 1, "n_heads": 1}
    export_tokenizer(bpe, tmp_path, ModelConfig(vocab_size=640, **size), extra=0)
    assert (len(load(tmp_path)), load(tmp_path).mask_token) == (600, None)
    with pytest.raises(CheckpointError, match="vocab_size: 599, but"):
        export_tokenizer(bpe, tmp_path, ModelConfig(vocab_size=599, **size))


def test_a_name_that_is_taken_gets_another(bpe, tmp_path):
    with_mask = BPETokenizer("x", bpe.pattern, bpe.ranks, {ENDOFTEXT: 599, "<mask>": 600})
    export_tokenizer(with_mask, tmp_path, extra=10)
    assert load(tmp_path).mask_token_id == with_mask.vocabulary().special("mask") == 602


def swap(items, a, b):
    items[a], items[b] = items[b], items[a]


FAULTS = {
    "swapped merges": lambda c: swap(c["model"]["merges"], 5, 200),
    "swapped neighbours": lambda c: swap(c["model"]["merges"], 5, 6),
    "swapped parts": lambda c: c["model"]["merges"][300].reverse(),
    "a lost merge": lambda c: c["model"]["merges"].pop(100),
    "swapped ids": lambda c: swap(c["model"]["vocab"], "th", "Ġs"),
    "swapped bytes": lambda c: swap(c["model"]["vocab"], "a", "Ā"),
    "another pattern": lambda c: c.update(pre_tokenizer=build_pre_tokenizer(SPLIT_PATTERNS["gpt2"])),
    "no pattern": lambda c: c.update(pre_tokenizer=BYTE_LEVEL),
    "a space in front": lambda c: c["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True),
    "lower case": lambda c: c.update(normalizer={"type": "Lowercase"}),
    "no decoder": lambda c: c.update(decoder=None),
    "another end": lambda c: c["added_tokens"][0].update(content="<|end|>"),
    "an end of another id": lambda c: c["model"]["vocab"].update({ENDOFTEXT: 700}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_what_was_written_is_noticed(bpe, fault, monkeypatch, tmp_path):
    right = convert._build_content

    def wrong(*arguments):
        content = json.loads(json.dumps(right(*arguments)))
        FAULTS[fault](content)
        return content

    monkeypatch.setattr(convert, "_build_content", wrong)
    with pytest.raises(CheckpointError):
        export_tokenizer(bpe, tmp_path)


@pytest.mark.parametrize("fault", ["swapped merges", "another pattern"])
def test_running_both_libraries_finds_faults_too(bpe, fault):
    content = json.loads(json.dumps(convert._build_content(bpe, bpe.special_tokens, None)))
    prove_equal(bpe, content)
    FAULTS[fault](content)
    with pytest.raises(CheckpointError, match="differ on"):
        prove_equal(bpe, content)


def test_what_cannot_be_expressed_is_not_exported(bpe, tmp_path):
    for pattern in (
        r"^a|\s|\S",
        r"\w+|\W",
        r"(?m:a)|\s|\S",
        r"(?i:ss)|\s|\S",
        r"\S{2}?|\s",
        r"(?i:ß)|\s|\S",
        r"(\S\s){2}+",
    ):
        with pytest.raises(CheckpointError, match="not known to mean the same"):
            export_tokenizer(BPETokenizer("x", pattern, bpe.ranks, bpe.special_tokens), tmp_path)
    token = max((token for token in bpe.ranks if token.isalpha()), key=len).decode()
    both, piece, decoded = "special token and an ordinary one", "differ on 'zebra'", "'éé' has no equal"
    for special, message in ((token, both), ("é", both), ("zebra", piece), ("éé", decoded)):
        with pytest.raises(CheckpointError, match=message):
            export_tokenizer(BPETokenizer("x", bpe.pattern, bpe.ranks, {ENDOFTEXT: 599, special: 600}), tmp_path)
    with pytest.raises(CheckpointError):
        export_tokenizer(BPETokenizer("x", r"\p{L}+", bpe.ranks, bpe.special_tokens), tmp_path)


ASSIGNED = [chr(code_point) for code_point in (*range(0xD800), *range(0xE000, 0x32400), *range(0xE0000, 0xE0200))]


@pytest.mark.parametrize("part", [r"\p{L}", r"\p{N}", r"\s", r"(?i:[sdmt]|ll|ve|re)"])
def test_both_engines_mean_the_same_signs(part):
    text = "".join(ASSIGNED)
    encoding = tiktoken.Encoding("x", pat_str=part, mergeable_ranks=BYTES, special_tokens={})
    native = bytes(encoding.encode(text, disallowed_special=())).decode()
    cut = pre_tokenizers.Split(Regex(to_oniguruma(part)), "removed").pre_tokenize_str(text)
    assert set(native) == set(text) - {sign for piece, _ in cut for sign in piece}


def test_patterns_are_rewritten_only_where_engines_differ():
    assert to_oniguruma(SPLIT_PATTERNS["cl100k"]) == SPLIT_PATTERNS["cl100k"].replace(
        r"\p{N}{1,3}+", r"(?>\p{N}{1,3})"
    ).replace("$", r"\z")
    for same_there in (SPLIT_PATTERNS["gpt2"], SPLIT_PATTERNS["llama3"], O200K):
        assert to_oniguruma(same_there) == same_there
        assert to_oniguruma(to_oniguruma(same_there)) == same_there


def hf(bpe, **changes):
    """`tokenizer.json` as it is published elsewhere: `bpe` with one thing or another."""
    content = json.loads(json.dumps(convert._build_content(bpe, bpe.special_tokens, None)))
    content["model"].update(changes.pop("model", {}))
    return content | changes


def write(directory, content, **settings):
    (directory / TOKENIZER_FILE).write_text(json.dumps(content))
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


def named(bpe, name, **more):
    """Its end of document under another name."""
    vocab = {token: rank for token, rank in hf(bpe)["model"]["vocab"].items() if token != ENDOFTEXT}
    return {"model": {"vocab": vocab, **more}, "added_tokens": [{"id": 599, "content": name, **FLAGS}]}


FLAGS = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}


def test_gpt2s_form(tmp_path):
    """Its own pattern within ByteLevel, merges as lines, and the two files say the same."""
    bpe = build("bpe:600 gpt2")
    model = hf(bpe)["model"]
    lines = [" ".join(pair) for pair in model["merges"]]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *lines, ""]), encoding="utf-8")
    two_files = import_tokenizer(tmp_path)
    equal = try_convert_to_bpe(two_files.content, two_files.eot)
    assert (equal.ranks, equal.special_tokens) == (bpe.ranks, bpe.special_tokens)
    assert identity(two_files.file_bytes()) == identity(build_tokenizer(str(tmp_path), None, learn).file_bytes())
    hf_content = hf(
        bpe, pre_tokenizer={**BYTE_LEVEL, "use_regex": True}, model={"merges": lines, "ignore_merges": False}
    )
    write(tmp_path, hf_content)
    assert identity(import_tokenizer(tmp_path).file_bytes()) == identity(bpe.file_bytes())


@pytest.mark.parametrize("eos", ["</s>", "<|end_of_text|>", "<|stop|>", {"content": "<|stop|>"}])
def test_llama3s_form(bpe, eos, tmp_path):
    """All ways to make a token in the list of merges, ids in front of a text, an end of another name."""
    name = eos if isinstance(eos, str) else eos["content"]
    ranks = {token: rank for token, rank in hf(bpe)["model"]["vocab"].items() if rank < 599}
    cuts = [(token[:cut], token[cut:]) for token in ranks for cut in range(1, len(token))]
    merges = [[left, right] for left, right in cuts if left in ranks and right in ranks]
    merges.sort(key=lambda pair: ranks["".join(pair)])
    assert len(merges) > len(hf(bpe)["model"]["merges"])
    front = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": name, "type_id": 0}}]}
    front["single"].append({"Sequence": {"id": "A", "type_id": 0}})
    front |= {"pair": front["single"], "special_tokens": {name: {"id": name, "ids": [599], "tokens": [name]}}}
    write(tmp_path, hf(bpe, post_processor=front, **named(bpe, name, merges=merges)), eos_token=eos)
    imported = import_tokenizer(tmp_path)
    equal = try_convert_to_bpe(imported.content, imported.eot)
    assert (equal.ranks, equal.special_tokens, equal.pattern) == (bpe.ranks, {ENDOFTEXT: 599}, bpe.pattern)
    assert imported.first_ids == (599,)
    assert not imported.equal_bpe, "of a corpus with other ids in front"


def test_qwens_form(bpe, tmp_path):
    """NFC, no whole pieces, an end of a turn beside the end of a document, an added token that is not special."""
    content = hf(bpe, normalizer={"type": "NFC"}, model={"ignore_merges": False})
    content["added_tokens"] += [{"id": 600, "content": "<|im_end|>", **FLAGS}]
    content["added_tokens"] += [{"id": 601, "content": "<think>", **FLAGS, "special": False}]
    write(tmp_path, content, eos_token="<|im_end|>")
    imported = import_tokenizer(tmp_path)
    assert isinstance(imported, HFTokenizer)
    assert (imported.eot, imported.first_ids, imported.vocab_size) == (599, (), 602)
    assert try_convert_to_bpe(imported.content, imported.eot) is None, "an ordinary added token is looked for in text"
    assert imported.encode("a<think>b<|im_end|>").tolist()[:3] == [*bpe.encode("a"), 601, *bpe.encode("b")]
    assert 600 not in imported.encode("a<think>b<|im_end|>")


def ids_by_frequency(bpe):
    vocab = hf(bpe)["model"]["vocab"]
    swap(vocab, "th", "Ġs")
    return hf(bpe, model={"vocab": vocab})


def pair_twice(bpe):
    """The pair that makes a token comes late, another one that makes the same comes early."""
    ranks, merges = hf(bpe)["model"]["vocab"], hf(bpe)["model"]["merges"]
    token = next("".join(pair) for pair in merges if len("".join(pair)) == 3 and "".join(pair)[1:] in ranks)
    index = next(index for index, pair in enumerate(merges) if "".join(pair) == token)
    return hf(bpe, model={"merges": [*merges[:index], [token[:1], token[1:]], *merges[index + 1 :], merges[index]]})


def unreached(bpe):
    """A token that merging never makes, in a tokenizer that takes no whole pieces."""
    model = hf(bpe)["model"]
    vocab = model["vocab"] | {"qzq": 601, "zq": 602}
    more = {"vocab": vocab, "merges": [*model["merges"], ["qz", "q"]], "ignore_merges": False}
    return hf(bpe, model={**more, "vocab": vocab | {"qz": 603}})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda bpe: None, "no tokenizer.json, nor vocab.json"),
        (lambda bpe: [], "cannot be read"),
        (lambda bpe: {"model": {}}, "cannot be read"),
        (lambda bpe: hf(bpe, model={"merges": [["a", "漢"]]}), "cannot be read"),
        (lambda bpe: hf(bpe, **named(bpe, "<|stop|>")), "no token that ends a document"),
    ],
)
def test_what_cannot_be_read_is_not_imported(bpe, change, message, tmp_path):
    content = change(bpe)
    if content is not None:
        write(tmp_path, content)
    with pytest.raises(CheckpointError, match=message) as caught:
        import_tokenizer(tmp_path)
    assert str(caught.value).startswith(str(tmp_path))
    assert str(caught.value).endswith("The weights can still be converted, without a tokenizer.")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda bpe: hf(bpe, model={"type": "Unigram"}), "is Unigram, not byte-level BPE"),
        (lambda bpe: hf(bpe, model={"type": "WordPiece"}), "is WordPiece, not"),
        (lambda bpe: hf(bpe, model={"byte_fallback": True}), "BPE with byte_fallback"),
        (lambda bpe: hf(bpe, model={"end_of_word_suffix": "</w>"}), "BPE with end_of_word_suffix"),
        (lambda bpe: hf(bpe, pre_tokenizer=None), "not by one split pattern"),
        (lambda bpe: hf(bpe, pre_tokenizer={**BYTE_LEVEL, "add_prefix_space": True}), "a space in front"),
        (lambda bpe: hf(bpe, normalizer={"type": "NFKC"}), "NFKC"),
        (lambda bpe: hf(bpe, pre_tokenizer=onig(r"\p{N}{1,3}+|.")), "not known to mean the same"),
        (lambda bpe: hf(bpe, pre_tokenizer=onig(r"\p{N}{1,3}+|\s|\S")), "tiktoken reads it differently"),
        (pair_twice, "do not rise in the order of its merges"),
        (lambda bpe: hf(bpe, model={"merges": hf(bpe)["model"]["merges"][:-1]}), "do not rise"),
        (unreached, "do not rise in the order of its merges"),
        (ids_by_frequency, "do not rise in the order of its merges"),
    ],
)
def test_what_tiktoken_cannot_run_is_run_by_tokenizers(bpe, change, message, tmp_path):
    """`convert_bpe` refuses it, so that no corpus is ever made with other ids than the original's."""
    content = change(bpe)
    with pytest.raises(CheckpointError, match=message):
        convert_bpe(content, ENDOFTEXT, {}, "x")
    assert try_convert_to_bpe(content, 599) is None


def onig(regex):
    split = {"type": "Split", "behavior": "Isolated", "invert": False, "pattern": {"Regex": regex}}
    return {"type": "Sequence", "pretokenizers": [split, BYTE_LEVEL]}
