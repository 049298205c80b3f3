"""CharTokenizer reads the meta.pkl of nanoGPT, which maps characters to ids, and never runs the code of a pickle."""

import io
import json
import os
import pickle

import numpy as np
import pytest
from tokenizers import Tokenizer as Reference

from dist_llm.convert.export_tokenizers import export_char_tokenizer
from dist_llm.data.corpus import Corpus
from dist_llm.errors import DataError
from dist_llm.generation import encode_prompt
from dist_llm.text.adopt import adopt
from dist_llm.text.adopt_options import AdoptOptions
from dist_llm.text.build_tokenizer import build_tokenizer
from dist_llm.text.char_tokenizer import CharTokenizer, read_nanogpt_meta
from dist_llm.text.prepare import PrepareOptions, prepare
from dist_llm.text.tokenizer import Tokenizer, parse_tokenizer
from tests.laws.law import make_config

TEXT = "To be, or not to be: that is the question.\nWhether 'tis nobler, é漢\n"
CHARS = sorted(set(TEXT))
META = {
    "vocab_size": len(CHARS),
    "itos": dict(enumerate(CHARS)),
    "stoi": {char: token for token, char in enumerate(CHARS)},
}


def write_meta(path, meta=META, protocol=4):
    """Write the meta.pkl of nanoGPT, from an object or from bytes; return its path."""
    path.write_bytes(meta if isinstance(meta, bytes) else pickle.dumps(meta, protocol))
    return path


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_pickle_protocol_is_read(protocol, tmp_path):
    tokenizer = read_nanogpt_meta(write_meta(tmp_path / "meta.pkl", protocol=protocol))
    assert tokenizer.encode(TEXT).tolist() == [META["stoi"][char] for char in TEXT]
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert tokenizer.decode([0, 10_000]) == CHARS[0] + "\ufffd"
    assert (tokenizer.vocab_size, tokenizer.eot, tokenizer.prefix_ids) == (len(CHARS), None, ())
    assert parse_tokenizer(tokenizer.to_json_bytes(), "location") == tokenizer


class RunsCommand:
    """An object that unpickles by a function call."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


INVALID_META = {  # fault: content of meta.pkl
    "a command": pickle.dumps(META | {"x": RunsCommand(os.system, ("touch run",))}),
    "an old command": b"cos\nsystem\n(S'touch run'\ntR.",
    "a class": pickle.dumps(META | {"x": io.BytesIO}),
    "an instance": pickle.dumps(META | {"x": ValueError("x")}),
    "an array": pickle.dumps(META | {"x": np.arange(3)}),
    "bytes": pickle.dumps(META | {"x": b"x"}),
    "a name from the stack": b"\x80\x04\x8c\x02os\x8c\x06system\x93.",
    "a persistent id": b"\x80\x04\x8c\x01xQ.",
    "a memo index that needs 32 GB": b"\x80\x04}r\xff\xff\xff\xff.",
    "a text of 4 GB": b"\x80\x04X\xff\xff\xff\xffx.",
    "truncated": pickle.dumps(META)[:-9],
    "empty": b"",
    "not a pickle": b"hello",
    "not a dictionary": pickle.dumps([1, 2]),
    "no stoi": pickle.dumps({"vocab_size": 3}),
    "stoi of lists": pickle.dumps({"stoi": [1, 2]}),
    "an id twice": pickle.dumps({"stoi": {"a": 0, "b": 0}}),
    "a negative id": pickle.dumps({"stoi": {"a": -1}}),
    "an id of 20 digits": pickle.dumps({"stoi": {"a": 10**20}}),
    "a boolean id": pickle.dumps({"stoi": {"a": True}}),
    "two characters": pickle.dumps({"stoi": {"ab": 0}}),
    "a surrogate": b"\x80\x04}\x8c\x04stoi}X\x03\x00\x00\x00\xed\xa0\x80K\x00ss.",
    "a number for a character": pickle.dumps({"stoi": {1: 0}}),
    "tables that differ": pickle.dumps(META | {"itos": {0: "x"}}),
    "a wrong vocab_size": pickle.dumps(META | {"vocab_size": 3}),
}


@pytest.mark.parametrize("fault", INVALID_META)
def test_an_invalid_file_is_an_error_and_runs_no_code(fault, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write_meta(tmp_path / "meta.pkl", INVALID_META[fault])
    with pytest.raises(DataError) as excinfo:
        build_tokenizer(str(path))
    assert str(excinfo.value).startswith(str(path))
    assert not (tmp_path / "run").exists(), "a pickle must not run its command"


def test_deep_nesting_is_an_error(tmp_path):
    deeply_nested = b"\x80\x04}\x8c\x04stoi}" + b"\x8c\x01a" + b"(" * 100_000 + b"l" * 100_000 + b"ss."
    with pytest.raises(DataError, match="not a whole number"):
        read_nanogpt_meta(write_meta(tmp_path / "meta.pkl", deeply_nested))


def test_a_corpus_of_nanogpt_keeps_its_ids(tmp_path):
    write_meta(tmp_path / "meta.pkl")
    ids = np.array([META["stoi"][char] for char in TEXT], np.uint16)
    ids.tofile(tmp_path / "train.bin")
    options = AdoptOptions(
        format="bin",
        data=(str(tmp_path / "train.bin"),),
        tokenizer=str(tmp_path / "meta.pkl"),
        out=tmp_path / "out",
        dtype="uint16",
    )
    adopt(options, io.StringIO())
    corpus, tokenizer = Corpus(tmp_path / "out"), Tokenizer.load(tmp_path / "out")
    assert tokenizer == build_tokenizer(str(tmp_path)), "the folder of the file must give the same tokenizer"
    assert corpus.manifest.vocab_size == len(CHARS), "the vocabulary must be that of nanoGPT"
    assert tokenizer.decode(corpus.read(np.array([0]), len(ids))[0]) == TEXT
    assert corpus.manifest.count_text_bytes("train") == len(TEXT.encode())
    assert not corpus.manifest.has_document_bounds, "the corpus must have no document boundaries, as in nanoGPT"


def prepare_texts(texts, tmp_path, workers):
    """Prepare the texts with the tokenizer of META; return the directory of the corpus."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    options = PrepareOptions(
        source=(str(tmp_path / "rows.jsonl"),),
        tokenizer=str(write_meta(tmp_path / "meta.pkl")),
        out=tmp_path / "out",
        heldout_fraction=0.0,
        workers=workers,
    )
    prepare(options, io.StringIO())
    return options.out


def test_prepare_concatenates_documents(tmp_path):
    texts = [TEXT, "question", "b"]
    corpus = prepare_texts(texts, tmp_path, workers=1)
    assert Tokenizer.load(corpus).decode(np.fromfile(corpus / "train-00000.bin", "<u2")) == "".join(texts)
    assert Corpus(corpus).get_document_offsets(0).tolist() == [0, len(TEXT), len(TEXT) + 8]


@pytest.mark.parametrize("workers", [1, 2])
def test_prepare_reports_a_character_without_an_id(workers, tmp_path):
    with pytest.raises(DataError, match=r"rows\.jsonl:1: character 'Ж' \(U\+0416\), number 3"):
        prepare_texts(["be Ж"], tmp_path, workers)


def test_an_export_gives_the_same_ids(tmp_path):
    tokenizer = CharTokenizer(META["stoi"])
    export_char_tokenizer(tokenizer, tmp_path)
    reference = Reference.from_file(str(tmp_path / "tokenizer.json"))
    assert reference.encode(TEXT).ids == tokenizer.encode(TEXT).tolist()
    assert reference.decode(reference.encode(TEXT).ids) == TEXT


def test_character_prompt_has_no_stop_ids():
    tokenizer = CharTokenizer(META["stoi"])
    config = make_config(ranks=1, objective={"name": "causal"})
    prompt = encode_prompt(config, tokenizer, "be")
    assert prompt.ids == tokenizer.encode("be").tolist()
    assert encode_prompt(config, tokenizer, "").ids == [META["stoi"]["\n"]], (
        "an empty prompt is not replaced by a newline, the first prompt of nanoGPT's sample.py"
    )
    assert not prompt.stop_ids & set(META["stoi"].values())
