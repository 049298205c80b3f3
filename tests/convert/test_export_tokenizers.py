"""Exported and imported tokenizers give the same ids as the originals. Tokenizers without an equivalent are refused."""

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
from dist_llm.config.derive import resolve_model
from dist_llm.config.model_section import ModelConfig, UnresolvedModelConfig
from dist_llm.convert.export_tokenizers import export_tokenizer, import_tokenizer
from dist_llm.convert.hf_config import READERS
from dist_llm.data.tokenizer_file import hash_tokenizer_ids
from dist_llm.errors import CheckpointError
from dist_llm.text.bpe_tokenizer import SPLIT_PATTERNS, BPETokenizer
from dist_llm.text.build_tokenizer import BYTE_IDS, build_tokenizer
from dist_llm.text.difficult_texts import DIFFICULT_TEXTS
from dist_llm.text.hf_bpe import check_same_ids, convert_bpe
from dist_llm.text.hf_tokenizer import HFTokenizer, try_convert_to_bpe
from dist_llm.text.split_pattern import BYTE_LEVEL, build_pre_tokenizer, to_oniguruma
from dist_llm.text.tokenizer import ENDOFTEXT, TOKENIZER_FILE

transformers = pytest.importorskip("transformers")

GPT2 = os.environ.get("GPT2_VOCABULARY")  # a folder with the published gpt2_vocab.json and gpt2_merges.txt
SOURCE = Path(ast.__file__).read_text(encoding="utf-8")
PROSE = [
    f"The {number}th ship sailed to port {number * 7}; it's late, they'll wait — 漢字 {number}.\r\n"
    for number in range(400)
]
STRANGE = ("", " ", "\n\n  \n", "ab  \n\n  cd  \n", "x \n", "12345678 ١٢٣٤٥", "don'T 'ſ 'K ß ŉ", "\ufeff\u0085\u2028")
TEXTS = (*DIFFICULT_TEXTS, *STRANGE, SOURCE)
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def training_texts():
    """Return an iterator of the texts on which a BPE is trained."""
    return iter([*PROSE, SOURCE[:100_000]])


def build_shuffled():
    """Build a tokenizer with substrings in random order, many of which merging never reaches, and gaps in the ids."""
    rng = random.Random(0)
    substrings = {
        SOURCE[start : start + length].encode() for start in range(0, 60_000, 50) for length in (2, 3, 4, 5, 7)
    }
    tokens = sorted({b" " + substring for substring in substrings} | substrings)
    rng.shuffle(tokens)
    ranks = BYTE_IDS | {token: 300 + 2 * number for number, token in enumerate(tokens)}
    return BPETokenizer("mine", SPLIT_PATTERNS["cl100k"], ranks, {ENDOFTEXT: 299, "<|other|>": 301})


def build_native(name):
    """Build the native tokenizer of a test case, such as `bpe:600 llama3`."""
    if name == "shuffled":
        return build_shuffled()
    if name == "published gpt2":
        if GPT2 is None:
            pytest.skip("GPT2_VOCABULARY names no folder with the published files")
        return build_tokenizer(f"{GPT2}/gpt2_vocab.json,{GPT2}/gpt2_merges.txt", training_texts=training_texts)
    spec, _, pattern = name.partition(" ")
    trained = build_tokenizer(
        spec, split_pattern=pattern.replace("cl100k", "llama3") or None, training_texts=training_texts
    )
    return BPETokenizer(name, SPLIT_PATTERNS[pattern or "gpt2"], trained.ranks, trained.special_tokens)


NAMES = ["byte", "bpe:600 gpt2", "bpe:600 llama3", "bpe:600 cl100k", "shuffled", "published gpt2"]


@pytest.fixture(scope="module", params=NAMES)
def exported(request, tmp_path_factory):
    """A native tokenizer and its Hugging Face export, which both encode the strings of special tokens as text."""
    native, directory = build_native(request.param), tmp_path_factory.mktemp("exported")
    export_tokenizer(native, directory)
    return SimpleNamespace(native=native, hf=load(directory, split_special_tokens=True), directory=directory)


@pytest.fixture(scope="module")
def bpe():
    """A native BPE of 600 tokens with the split pattern of Llama 3."""
    return build_native("bpe:600 llama3")


def load(directory, **kwargs):
    """Load a tokenizer with transformers."""
    return transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True, **kwargs)


def assert_same_ids(native, hf_tokenizer, text):
    """Raise AssertionError unless both tokenizers give the same ids, which decode to the text."""
    ids = native.encode(text).tolist()
    assert hf_tokenizer(text)["input_ids"] == ids
    assert hf_tokenizer.decode(ids) == native.decode(ids) == text


def test_texts_give_the_same_ids_and_decode_to_themselves(exported):
    for text in TEXTS:
        assert_same_ids(exported.native, exported.hf, text)
    partial_ids = exported.native.encode("漢字")[1:].tolist()
    assert exported.hf.decode(partial_ids) == exported.native.decode(partial_ids)


FRAGMENTS = [
    "'",
    "s",
    "S",
    "T",
    "ſ",
    "re",
    "don't",
    "1",
    "23",
    "٣",
    "½",
    " ",
    "  ",
    "\t",
    "\n",
    "\r\n",
    "\u00a0",
    "\u2028",
]
FRAGMENTS += [
    "_",
    "!?",
    "漢",
    "é",
    "e\u0301",
    "\u200d",
    "Ⅷ",
    "def ",
    "self",
    "    return",
    "\x00",
    "👩‍👩",
    "ǅ",
    "ʰ",
    "The",
]


@given(text=st.text(max_size=40) | st.lists(st.sampled_from(FRAGMENTS), max_size=25).map("".join))
@settings(max_examples=100, deadline=None)
def test_any_text_gives_the_same_ids(exported, text):
    assert_same_ids(exported.native, exported.hf, text)


def test_export_and_import_give_the_same_tokenizer(exported, tmp_path):
    assert import_tokenizer(exported.directory).sha256 == exported.native.sha256
    exported.hf.save_pretrained(tmp_path)
    assert import_tokenizer(tmp_path).sha256 == exported.native.sha256


@pytest.mark.parametrize("family", READERS)
def test_a_model_config_does_not_change_the_tokenizer_class(bpe, family, tmp_path):
    """For qwen2, AutoTokenizer uses a class of its own whatever the files say, so it has to be bypassed."""
    export_tokenizer(bpe, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    if family == "qwen2":
        assert type(load(tmp_path)).__name__ == "Qwen2Tokenizer"
        hf_tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path, split_special_tokens=True)
    else:
        hf_tokenizer = load(tmp_path, split_special_tokens=True)
    for text in DIFFICULT_TEXTS:
        assert_same_ids(bpe, hf_tokenizer, text)


def test_hugging_face_encodes_special_strings_as_special_tokens(bpe, tmp_path):
    export_tokenizer(bpe, tmp_path)
    ids = load(tmp_path)(f"the{ENDOFTEXT}ship")["input_ids"]
    assert ids == [*bpe.encode("the"), bpe.eot, *bpe.encode("ship")]


@pytest.mark.parametrize(
    ("architecture", "bos"), [("encoder", "<start>"), ("encoder_decoder", "<start>"), ("decoder", ENDOFTEXT)]
)
def test_ids_of_objectives_have_names(bpe, architecture, bos, tmp_path):
    size = {"d_model": 8, "n_layers": 1, "n_heads": 1, "max_seq_len": 77}
    model = resolve_model(UnresolvedModelConfig(architecture=architecture, vocab_size=620, **size))
    export_tokenizer(bpe, tmp_path, model)
    hf_tokenizer = load(tmp_path)
    assert (len(hf_tokenizer), hf_tokenizer.model_max_length) == (620, 77)
    assert (hf_tokenizer.bos_token, hf_tokenizer.eos_token, hf_tokenizer.pad_token, hf_tokenizer.unk_token) == (
        bos,
        ENDOFTEXT,
        ENDOFTEXT,
        None,
    )
    vocabulary = bpe.build_objective_vocabulary()
    assert hf_tokenizer.mask_token_id == vocabulary.special_id("mask")
    ids = hf_tokenizer("a <mask><sentinel 0> b<sentinel 11>")["input_ids"]
    a, b = bpe.encode("a"), bpe.encode(" b")
    assert ids == [*a, vocabulary.special_id("mask"), vocabulary.sentinel_id(0), *b, vocabulary.sentinel_id(11)]
    assert hf_tokenizer.decode(ids) == "a<mask><sentinel 0> b<sentinel 11>"
    assert hf_tokenizer.decode(ids, skip_special_tokens=True) == "a b"
    for number in range(600, 620):
        assert hf_tokenizer.convert_ids_to_tokens(number) == vocabulary.describe_added_id(number)
    assert import_tokenizer(tmp_path).sha256 == bpe.sha256


def test_vocabulary_padding_has_no_tokens(bpe, tmp_path):
    sizes = {"d_model": 8, "n_layers": 1, "n_heads": 1, "n_kv_heads": 1, "head_dim": 8, "d_ff": 32, "max_seq_len": 8}
    export_tokenizer(bpe, tmp_path, ModelConfig(vocab_size=640, **sizes), num_extra_ids=0)
    assert (len(load(tmp_path)), load(tmp_path).mask_token) == (600, None)
    with pytest.raises(CheckpointError, match="vocab_size: 599, but"):
        export_tokenizer(bpe, tmp_path, ModelConfig(vocab_size=599, **sizes))


def test_a_reserved_name_in_use_is_replaced(bpe, tmp_path):
    with_mask = BPETokenizer("x", bpe.pattern, bpe.ranks, {ENDOFTEXT: 599, "<mask>": 600})
    export_tokenizer(with_mask, tmp_path, num_extra_ids=10)
    assert load(tmp_path).mask_token_id == with_mask.build_objective_vocabulary().special_id("mask") == 602


def swap_items(items, a, b):
    """Exchange two items of a list or dict."""
    items[a], items[b] = items[b], items[a]


CONTENT_FAULTS = {
    "swapped merges": lambda c: swap_items(c["model"]["merges"], 5, 200),
    "swapped neighbours": lambda c: swap_items(c["model"]["merges"], 5, 6),
    "swapped parts": lambda c: c["model"]["merges"][300].reverse(),
    "a lost merge": lambda c: c["model"]["merges"].pop(100),
    "swapped ids": lambda c: swap_items(c["model"]["vocab"], "th", "Ġs"),
    "swapped bytes": lambda c: swap_items(c["model"]["vocab"], "a", "Ā"),
    "another pattern": lambda c: c.update(pre_tokenizer=build_pre_tokenizer(SPLIT_PATTERNS["gpt2"])),
    "no pattern": lambda c: c.update(pre_tokenizer=BYTE_LEVEL),
    "a space in front": lambda c: c["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True),
    "lower case": lambda c: c.update(normalizer={"type": "Lowercase"}),
    "no decoder": lambda c: c.update(decoder=None),
    "another end": lambda c: c["added_tokens"][0].update(content="<|end|>"),
    "an end of another id": lambda c: c["model"]["vocab"].update({ENDOFTEXT: 700}),
}


@pytest.mark.parametrize("fault", CONTENT_FAULTS)
def test_a_fault_in_the_written_content_is_detected(bpe, fault, monkeypatch, tmp_path):
    original = convert._build_tokenizer_json

    def build_faulty_content(*arguments):
        content = json.loads(json.dumps(original(*arguments)))
        CONTENT_FAULTS[fault](content)
        return content

    monkeypatch.setattr(convert, "_build_tokenizer_json", build_faulty_content)
    with pytest.raises(CheckpointError):
        export_tokenizer(bpe, tmp_path)


@pytest.mark.parametrize("fault", ["swapped merges", "another pattern"])
def test_comparing_both_libraries_detects_faults(bpe, fault):
    content = json.loads(json.dumps(convert._build_tokenizer_json(bpe, bpe.special_tokens, mask=None)))
    check_same_ids(bpe, content)
    CONTENT_FAULTS[fault](content)
    with pytest.raises(CheckpointError, match="differ on"):
        check_same_ids(bpe, content)


def test_a_tokenizer_without_an_equivalent_is_not_exported(bpe, tmp_path):
    for pattern in (
        r"^a|\s|\S",
        r"\w+|\W",
        r"(?m:a)|\s|\S",
        r"\S{2}?|\s",
        r"(?i:ß)|\s|\S",
        r"(\S\s){2}+",
    ):
        with pytest.raises(CheckpointError, match="two engines may read it differently"):
            export_tokenizer(BPETokenizer("x", pattern, bpe.ranks, bpe.special_tokens), tmp_path)
    with pytest.raises(CheckpointError, match=r"in '\(\?i:ss', Oniguruma also matches the last two letters"):
        export_tokenizer(BPETokenizer("x", r"\s|(?i:ss)|\S", bpe.ranks, bpe.special_tokens), tmp_path)
    token = max((token for token in bpe.ranks if token.isalpha()), key=len).decode()
    message_both, message_piece, message_decoded = (
        "special token and an ordinary one",
        "differ on 'zebra'",
        "'éé' cannot be expressed",
    )
    for special, message in (
        (token, message_both),
        ("é", message_both),
        ("zebra", message_piece),
        ("éé", message_decoded),
    ):
        with pytest.raises(CheckpointError, match=message):
            export_tokenizer(BPETokenizer("x", bpe.pattern, bpe.ranks, {ENDOFTEXT: 599, special: 600}), tmp_path)
    with pytest.raises(CheckpointError):
        export_tokenizer(BPETokenizer("x", r"\p{L}+", bpe.ranks, bpe.special_tokens), tmp_path)


ASSIGNED = [chr(code_point) for code_point in (*range(0xD800), *range(0xE000, 0x32400), *range(0xE0000, 0xE0200))]


@pytest.mark.parametrize("pattern", [r"\p{L}", r"\p{N}", r"\s", r"(?i:[sdmt]|ll|ve|re)"])
def test_both_regex_engines_match_the_same_characters(pattern):
    text = "".join(ASSIGNED)
    encoding = tiktoken.Encoding("x", pat_str=pattern, mergeable_ranks=BYTE_IDS, special_tokens={})
    native = bytes(encoding.encode(text, disallowed_special=())).decode()
    fragments = pre_tokenizers.Split(Regex(to_oniguruma(pattern)), "removed").pre_tokenize_str(text)
    assert set(native) == set(text) - {char for fragment, _ in fragments for char in fragment}


def test_patterns_are_rewritten_only_where_engines_differ():
    assert to_oniguruma(SPLIT_PATTERNS["cl100k"]) == SPLIT_PATTERNS["cl100k"].replace(
        r"\p{N}{1,3}+", r"(?>\p{N}{1,3})"
    ).replace("$", r"\z")
    for shared_pattern in (SPLIT_PATTERNS["gpt2"], SPLIT_PATTERNS["llama3"], O200K):
        assert to_oniguruma(shared_pattern) == shared_pattern
        assert to_oniguruma(to_oniguruma(shared_pattern)) == shared_pattern


def read_hf_content(bpe, **changes):
    """Return the content of a published tokenizer.json: that of `bpe` with changes."""
    content = json.loads(json.dumps(convert._build_tokenizer_json(bpe, bpe.special_tokens, mask=None)))
    content["model"].update(changes.pop("model", {}))
    return content | changes


def write_files(directory, content, **settings):
    """Write the two tokenizer files of a Hugging Face folder."""
    (directory / TOKENIZER_FILE).write_text(json.dumps(content))
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


def rename_end(bpe, name, **changes):
    """Return changes that give the end-of-document token another name."""
    vocab = {token: rank for token, rank in read_hf_content(bpe)["model"]["vocab"].items() if token != ENDOFTEXT}
    return {"model": {"vocab": vocab, **changes}, "added_tokens": [{"id": 599, "content": name, **FLAGS}]}


FLAGS = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}


def test_a_tokenizer_like_gpt2s_is_imported(tmp_path):
    """GPT-2's form: ByteLevel contains the pattern, merges are lines, and the two files are equivalent."""
    bpe = build_native("bpe:600 gpt2")
    model = read_hf_content(bpe)["model"]
    lines = [" ".join(pair) for pair in model["merges"]]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *lines, ""]), encoding="utf-8")
    two_files = import_tokenizer(tmp_path)
    equal_bpe = try_convert_to_bpe(two_files.content, two_files.eot)
    assert (equal_bpe.ranks, equal_bpe.special_tokens) == (bpe.ranks, bpe.special_tokens)
    assert hash_tokenizer_ids(two_files.to_json_bytes()) == hash_tokenizer_ids(
        build_tokenizer(str(tmp_path), training_texts=training_texts).to_json_bytes()
    )
    hf_content = read_hf_content(
        bpe, pre_tokenizer={**BYTE_LEVEL, "use_regex": True}, model={"merges": lines, "ignore_merges": False}
    )
    write_files(tmp_path, hf_content)
    assert hash_tokenizer_ids(import_tokenizer(tmp_path).to_json_bytes()) == hash_tokenizer_ids(bpe.to_json_bytes())


@pytest.mark.parametrize("eos", ["</s>", "<|end_of_text|>", "<|stop|>", {"content": "<|stop|>"}])
def test_a_tokenizer_like_llama3s_is_imported(bpe, eos, tmp_path):
    """Llama 3's form: all possible merges are listed, ids precede a text, and the end token has another name."""
    name = eos if isinstance(eos, str) else eos["content"]
    ranks = {token: rank for token, rank in read_hf_content(bpe)["model"]["vocab"].items() if rank < 599}
    splits = [(token[:position], token[position:]) for token in ranks for position in range(1, len(token))]
    merges = [[left, original] for left, original in splits if left in ranks and original in ranks]
    merges.sort(key=lambda pair: ranks["".join(pair)])
    assert len(merges) > len(read_hf_content(bpe)["model"]["merges"])
    post_processor = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": name, "type_id": 0}}]}
    post_processor["single"].append({"Sequence": {"id": "A", "type_id": 0}})
    post_processor |= {
        "pair": post_processor["single"],
        "special_tokens": {name: {"id": name, "ids": [599], "tokens": [name]}},
    }
    write_files(
        tmp_path,
        read_hf_content(bpe, post_processor=post_processor, **rename_end(bpe, name, merges=merges)),
        eos_token=eos,
    )
    imported = import_tokenizer(tmp_path)
    equal_bpe = try_convert_to_bpe(imported.content, imported.eot)
    assert (equal_bpe.ranks, equal_bpe.special_tokens, equal_bpe.pattern) == (bpe.ranks, {ENDOFTEXT: 599}, bpe.pattern)
    assert imported.prefix_ids == (599,)
    assert not imported.equal_bpe, "equal_bpe is true, but BPE gives a corpus other ids"


def test_a_tokenizer_like_qwens_is_imported(bpe, tmp_path):
    """Qwen's form: NFC, no ignore_merges, an end of a turn, and an added token that is not special."""
    content = read_hf_content(bpe, normalizer={"type": "NFC"}, model={"ignore_merges": False})
    content["added_tokens"] += [{"id": 600, "content": "<|im_end|>", **FLAGS}]
    content["added_tokens"] += [{"id": 601, "content": "<think>", **FLAGS, "special": False}]
    write_files(tmp_path, content, eos_token="<|im_end|>")
    imported = import_tokenizer(tmp_path)
    assert isinstance(imported, HFTokenizer)
    assert (imported.eot, imported.prefix_ids, imported.vocab_size) == (599, (), 602)
    assert try_convert_to_bpe(imported.content, imported.eot) is None, (
        "BPE is used, but it does not match an ordinary added token in text"
    )
    assert imported.encode("a<think>b<|im_end|>").tolist()[:3] == [*bpe.encode("a"), 601, *bpe.encode("b")]
    assert 600 not in imported.encode("a<think>b<|im_end|>")


def swap_ids(bpe):
    """Return a tokenizer in which two tokens have each other's ids."""
    vocab = read_hf_content(bpe)["model"]["vocab"]
    swap_items(vocab, "th", "Ġs")
    return read_hf_content(bpe, model={"vocab": vocab})


def duplicate_merge(bpe):
    """Return a tokenizer in which an early merge makes the same token as the late merge that it needs."""
    ranks, merges = read_hf_content(bpe)["model"]["vocab"], read_hf_content(bpe)["model"]["merges"]
    token = next("".join(pair) for pair in merges if len("".join(pair)) == 3 and "".join(pair)[1:] in ranks)
    index = next(index for index, pair in enumerate(merges) if "".join(pair) == token)
    return read_hf_content(
        bpe, model={"merges": [*merges[:index], [token[:1], token[1:]], *merges[index + 1 :], merges[index]]}
    )


def add_unreachable_token(bpe):
    """Return a tokenizer with a token that merging never makes, without ignore_merges."""
    model = read_hf_content(bpe)["model"]
    vocab = model["vocab"] | {"qzq": 601, "zq": 602}
    model_changes = {"vocab": vocab, "merges": [*model["merges"], ["qz", "q"]], "ignore_merges": False}
    return read_hf_content(bpe, model={**model_changes, "vocab": vocab | {"qz": 603}})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda bpe: None, "has neither tokenizer.json nor vocab.json"),
        (lambda bpe: [], "cannot be read"),
        (lambda bpe: {"model": {}}, "cannot be read"),
        (lambda bpe: read_hf_content(bpe, model={"merges": [["a", "漢"]]}), "cannot be read"),
        (lambda bpe: read_hf_content(bpe, **rename_end(bpe, "<|stop|>")), "no token that ends a document"),
    ],
)
def test_unreadable_files_are_not_imported(bpe, change, message, tmp_path):
    content = change(bpe)
    if content is not None:
        write_files(tmp_path, content)
    with pytest.raises(CheckpointError, match=message) as excinfo:
        import_tokenizer(tmp_path)
    assert str(excinfo.value).startswith(str(tmp_path))
    assert str(excinfo.value).endswith("The weights can still be converted, without a tokenizer.")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda bpe: read_hf_content(bpe, model={"type": "Unigram"}), "is Unigram, not byte-level BPE"),
        (lambda bpe: read_hf_content(bpe, model={"type": "WordPiece"}), "is WordPiece, not"),
        (lambda bpe: read_hf_content(bpe, model={"byte_fallback": True}), "BPE with byte_fallback"),
        (lambda bpe: read_hf_content(bpe, model={"end_of_word_suffix": "</w>"}), "BPE with end_of_word_suffix"),
        (lambda bpe: read_hf_content(bpe, pre_tokenizer=None), "only one split pattern"),
        (
            lambda bpe: read_hf_content(bpe, pre_tokenizer={**BYTE_LEVEL, "add_prefix_space": True}),
            "without add_prefix_space",
        ),
        (lambda bpe: read_hf_content(bpe, normalizer={"type": "NFKC"}), "NFKC"),
        (lambda bpe: read_hf_content(bpe, pre_tokenizer=split_content(r"\p{N}{1,3}+|.")), "may read it differently"),
        (
            lambda bpe: read_hf_content(bpe, pre_tokenizer=split_content(r"\p{N}{1,3}+|\s|\S")),
            "tiktoken reads it differently",
        ),
        (duplicate_merge, "do not ascend in the order of its merges"),
        (
            lambda bpe: read_hf_content(bpe, model={"merges": read_hf_content(bpe)["model"]["merges"][:-1]}),
            "do not ascend",
        ),
        (add_unreachable_token, "do not ascend in the order of its merges"),
        (swap_ids, "do not ascend in the order of its merges"),
    ],
)
def test_a_tokenizer_that_tiktoken_cannot_express_uses_tokenizers(bpe, change, message, tmp_path):
    """`convert_bpe` refuses it, so that no corpus ever has ids other than the original's."""
    content = change(bpe)
    with pytest.raises(CheckpointError, match=message):
        convert_bpe(content, ENDOFTEXT, {}, "x")
    assert try_convert_to_bpe(content, 599) is None


def split_content(regex):
    """Return a pre-tokenizer that splits by a regex and then maps bytes."""
    split = {"type": "Split", "behavior": "Isolated", "invert": False, "pattern": {"Regex": regex}}
    return {"type": "Sequence", "pretokenizers": [split, BYTE_LEVEL]}
