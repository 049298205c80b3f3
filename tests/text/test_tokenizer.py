"""Each kind of tokenizer decodes ids to the encoded text, and gives the ids of its reference library."""

import base64
import json
from itertools import pairwise

import numpy as np
import pytest
import tiktoken
from tokenizers import ByteLevelBPETokenizer

from dist_llm.errors import DataError
from dist_llm.text.bpe_tokenizer import SEGMENT_CHARS, SPLIT_PATTERNS, BPETokenizer
from dist_llm.text.build_tokenizer import BYTE_IDS, _check_same_ids_on_texts, _train_hf_tokenizer, build_tokenizer
from dist_llm.text.difficult_texts import DIFFICULT_TEXTS
from dist_llm.text.tokenizer import ENDOFTEXT, TOKENIZER_FILE, Tokenizer

PROSE = [
    f"The {number}th ship sailed to port {number * 7}; it's late, they'll wait — 漢字 {number}.\r\n"
    for number in range(400)
]
UNUSUAL_TEXTS = (*DIFFICULT_TEXTS, "", "\x00", "a\ufeffb", "ſ K İ", "\u0130\u0131", "🏴󠁧󠁢󠁥󠁮󠁧󠁿" * 3)


def training_texts():
    """Return an iterator of the texts on which a BPE is trained."""
    return iter(PROSE)


def forbid_training():
    """Fail if a tokenizer reads training texts."""
    raise AssertionError("only bpe:N may read the source")


def build_from_spec(spec, pattern=None, texts=forbid_training):
    """Build the tokenizer that `--tokenizer SPEC` names."""
    return build_tokenizer(str(spec), pattern, texts)


@pytest.fixture(scope="module")
def bpe():
    """A BPE tokenizer of 400 tokens, trained on PROSE."""
    return build_from_spec("bpe:400", texts=training_texts)


@pytest.mark.parametrize("spec", ["byte", "bpe:257", "bpe:400"])
@pytest.mark.parametrize("text", UNUSUAL_TEXTS)
def test_every_text_decodes_to_itself(spec, text, bpe):
    tokenizer = bpe if spec == "bpe:400" else build_from_spec(spec, texts=training_texts)
    ids = tokenizer.encode(text)
    assert tokenizer.decode_bytes(ids) == text.encode()
    assert tokenizer.decode(ids) == text
    assert tokenizer.eot not in ids, "the string of a special token must be encoded as text"


def test_byte_ids_are_the_bytes():
    tokenizer = build_from_spec("byte")
    assert tokenizer.encode("aé").tolist() == list("aé".encode())
    assert (tokenizer.vocab_size, tokenizer.eot) == (257, 256)


@pytest.mark.parametrize("pattern", ["gpt2", "llama3"])
def test_bpe_gives_the_ids_of_the_training_library(pattern):
    tokenizer = build_from_spec("bpe:400", pattern, training_texts)
    reference = _train_hf_tokenizer(399, pattern, training_texts)
    assert (tokenizer.vocab_size, tokenizer.eot) == (400, 399)
    assert tokenizer.pattern == SPLIT_PATTERNS[pattern]
    for text in (*UNUSUAL_TEXTS, *PROSE):
        assert tokenizer.encode(text).tolist() == reference.encode(text).ids


def test_a_conversion_that_changes_ids_is_refused(bpe):
    tokens = list(bpe.ranks)
    swapped = dict(zip([*tokens[:256], *reversed(tokens[256:])], range(399), strict=True))
    swapped_tokenizer = BPETokenizer("bpe:400", bpe.pattern, swapped, bpe.special_tokens)
    with pytest.raises(DataError, match="disagree"):
        _check_same_ids_on_texts(swapped_tokenizer, _train_hf_tokenizer(399, "gpt2", training_texts), training_texts)


def test_bpe_training_is_deterministic(bpe):
    assert build_from_spec("bpe:400", texts=training_texts).sha256 == bpe.sha256


def test_the_error_for_too_little_text_names_the_largest_size():
    with pytest.raises(DataError, match="largest N") as excinfo:
        build_from_spec("bpe:60000", texts=training_texts)
    max_vocab_size = int(str(excinfo.value).split("use bpe:")[1].split()[0])
    assert build_from_spec(f"bpe:{max_vocab_size}", texts=training_texts).vocab_size == max_vocab_size


def test_the_tokenizer_file_equals_that_of_version_0_1_0():
    """Corpora and checkpoints of version 0.1.0 identify their tokenizer by this hash."""
    assert build_from_spec("byte").sha256 == "3f7d43fa61bfc7dba89d964f2e85218f365ff74b6664dd5fdd6259ab5bb36fef"


def test_load_restores_the_saved_tokenizer(bpe, tmp_path):
    bpe.save(tmp_path)
    before = (tmp_path / TOKENIZER_FILE).read_bytes()
    loaded = Tokenizer.load(tmp_path)
    loaded.save(tmp_path)
    assert (tmp_path / TOKENIZER_FILE).read_bytes() == before
    assert loaded == bpe
    assert loaded.sha256 == bpe.sha256
    assert build_from_spec(tmp_path) == bpe


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "missing"),
        ("{", "cannot be read"),
        ("[]", "not of format"),
        ('{"format": "other"}', "not of format"),
        ('{"format": "dist_llm tokenizer 1"}', "cannot be read"),
        ('{"format": "dist_llm tokenizer 1", "name": "x", "pattern": "", "special_tokens": {}, "ranks": {}}', "0x00"),
        ('{"format": "dist_llm tokenizer 1", "name": "x", "pattern": "", "special_tokens": {}, "ranks": 3}', "read"),
    ],
)
def test_a_bad_file_is_a_data_error(content, message, tmp_path):
    if content is not None:
        (tmp_path / TOKENIZER_FILE).write_text(content)
    with pytest.raises(DataError, match=message):
        Tokenizer.load(tmp_path)


def test_inconsistent_fields_are_data_errors():
    with pytest.raises(DataError, match="distinct"):
        BPETokenizer("x", "", BYTE_IDS, {ENDOFTEXT: 7})
    with pytest.raises(DataError, match="no special token"):
        BPETokenizer("x", "", BYTE_IDS, {})


def test_undecodable_input_becomes_replacement_characters(bpe):
    assert bpe.decode(bpe.encode("a\ud800b")) == "a\ufffdb"
    assert bpe.decode(bpe.encode("\ud83d\ude00")) == "😀"
    assert bpe.decode([*bpe.encode("a"), 5000, -1]) == "a\ufffd\ufffd"
    assert bpe.decode(bpe.encode("é")[:1]) == "\ufffd"


@pytest.mark.parametrize("num_spaces", [2 * SEGMENT_CHARS, 2_000_000])
def test_many_spaces_do_not_overflow_the_regex_engine(bpe, num_spaces):
    text = "a" + " " * num_spaces + "b"
    assert bpe.decode(bpe.encode(text)) == text


@pytest.mark.parametrize("pattern", [None, "gpt2", "llama3", "cl100k"])
def test_a_tiktoken_file_gives_its_ranks(bpe, pattern, tmp_path):
    path = tmp_path / "mine.tiktoken"
    path.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in bpe.ranks.items()))
    tokenizer = build_from_spec(path, pattern)
    assert tokenizer.ranks == bpe.ranks
    assert tokenizer.eot == 399
    assert tokenizer.pattern == SPLIT_PATTERNS[pattern or "cl100k"]


@pytest.mark.parametrize(("content", "message"), [("", "no ids"), ("IQ== 0\n???", ":2: expected"), (None, "read")])
def test_a_bad_tiktoken_file_is_refused(content, message, tmp_path):
    path = tmp_path / "mine.tiktoken"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=message):
        build_from_spec(path)


@pytest.fixture
def gpt2_files(tmp_path):
    """Train a tokenizer with `tokenizers`. Return the folder of its vocab.json and merges.txt, and the tokenizer.

    Its first id is `<|endoftext|>`.
    """
    reference = ByteLevelBPETokenizer()
    reference.train_from_iterator(PROSE, vocab_size=400, show_progress=False, special_tokens=[ENDOFTEXT])
    reference.save_model(str(tmp_path))
    return tmp_path, reference


def test_gpt2_style_files_give_the_ids_of_the_reference(gpt2_files):
    folder, reference = gpt2_files
    tokenizer = build_from_spec(folder)
    assert tokenizer == build_from_spec(f"{folder}/vocab.json,{folder}/merges.txt")
    assert (tokenizer.vocab_size, tokenizer.eot) == (400, 0)
    for text in (*PROSE, *(text for text in UNUSUAL_TEXTS if ENDOFTEXT not in text)):
        assert tokenizer.encode(text).tolist() == reference.encode(text).ids


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda ids: ids.pop(ENDOFTEXT), "no <|endoftext|>"),
        (lambda ids: ids.pop("th"), "no id for 'th'"),
        (lambda ids: ids.update({"th": ids["Ġs"], "Ġs": ids["th"]}), "ids must rise"),
        (lambda ids: ids.update({"th": "x"}), "whole number"),
    ],
)
def test_gpt2_style_files_that_do_not_match_are_refused(gpt2_files, edit, message):
    folder, _ = gpt2_files
    ids = json.loads((folder / "vocab.json").read_text())
    edit(ids)
    (folder / "vocab.json").write_text(json.dumps(ids))
    with pytest.raises(DataError) as excinfo:
        build_from_spec(folder)
    assert message in str(excinfo.value)


def test_a_tiktoken_encoding_is_found_by_name(monkeypatch):
    encoding = tiktoken.Encoding(
        "gpt2", pat_str=SPLIT_PATTERNS["gpt2"], mergeable_ranks=BYTE_IDS, special_tokens={ENDOFTEXT: 300}
    )
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding)
    tokenizer = build_from_spec("gpt2")
    assert (tokenizer.name, tokenizer.vocab_size, tokenizer.eot) == ("gpt2", 301, 300)


def test_an_unreachable_tiktoken_encoding_is_an_error_with_a_hint(monkeypatch):
    def raise_connection_error(name):
        raise ConnectionError("a very long story " * 100)

    monkeypatch.setattr(tiktoken, "get_encoding", raise_connection_error)
    with pytest.raises(DataError, match="TIKTOKEN_CACHE_DIR") as excinfo:
        build_from_spec("cl100k_base")
    assert len(str(excinfo.value)) < 400


@pytest.mark.parametrize(
    ("spec", "pattern", "message"),
    [
        ("bpe:", None, "at least 257"),
        ("bpe:256", None, "at least 257"),
        ("bpe:4k", None, "for example bpe:4096"),
        ("bpe:400", "cl100k", "offers gpt2, llama3"),
        ("byte", "gpt2", "its own pattern"),
        ("a,b,c", None, "two files"),
        ("gone/vocab.json,gone/merges.txt", None, "cannot be read"),
        ("gpt5", None, "an encoding of tiktoken: gpt2, "),
    ],
)
def test_an_invalid_spec_is_refused_with_valid_ones(spec, pattern, message):
    with pytest.raises(DataError, match=message):
        build_from_spec(spec, pattern)


def test_cl100k_and_llama3_split_text_equally():
    """The pattern cl100k is the pattern llama3 with possessive quantifiers, which are faster."""
    tokenizers = [
        BPETokenizer("x", SPLIT_PATTERNS[name], _pair_ranks(), {ENDOFTEXT: 9999}) for name in ("cl100k", "llama3")
    ]
    for text in (*UNUSUAL_TEXTS, *PROSE):
        cl100k_ids, llama3_ids = (tokenizer.encode(text) for tokenizer in tokenizers)
        np.testing.assert_array_equal(cl100k_ids, llama3_ids)


def _pair_ranks():
    """Return a vocabulary of the single bytes and of byte pairs that occur in PROSE."""
    pairs = {left + right for text in PROSE[:20] for left, right in pairwise([bytes([byte]) for byte in text.encode()])}
    return BYTE_IDS | {pair: 256 + index for index, pair in enumerate(sorted(pairs))}
