"""HFTokenizer gives the ids of the `tokenizers` library and keeps the original files of the tokenizer."""

import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer as Reference

from dist_llm.data.tokenizer_file import hash_tokenizer_ids, is_same_tokenizer
from dist_llm.errors import DataError
from dist_llm.text.build_tokenizer import build_tokenizer
from dist_llm.text.difficult_texts import DIFFICULT_TEXTS
from dist_llm.text.hf_tokenizer import HFTokenizer
from dist_llm.text.prepare import PrepareOptions, prepare
from dist_llm.text.tokenizer import TOKENIZER_FILE, Tokenizer, parse_tokenizer
from tests.hf_folders import ADDED, MORE_DIFFICULT_TEXTS, PROSE, TOKENIZER_BUILDERS, TOKENIZER_FILES, write_folder

TEXTS = (*MORE_DIFFICULT_TEXTS, *DIFFICULT_TEXTS, *PROSE[:5])
GPT2 = os.environ.get("GPT2_VOCABULARY")  # a folder with the published gpt2_vocab.json and gpt2_merges.txt


def build_from_folder(folder):
    """Build the tokenizer of a Hugging Face folder."""
    return build_tokenizer(str(folder))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A Hugging Face folder with a tokenizer of each kind, by kind."""
    folders_by_kind = {}
    for kind in TOKENIZER_BUILDERS:
        folder = tmp_path_factory.mktemp("folders") / kind
        write_folder(folder, kind)
        folders_by_kind[kind] = folder
    return folders_by_kind


def test_difficult_texts_are_at_least_fifty():
    assert len(set(MORE_DIFFICULT_TEXTS)) >= 50


@pytest.mark.parametrize("kind", TOKENIZER_BUILDERS)
def test_ids_and_files_equal_the_originals(kind, folders, tmp_path):
    """This holds after a round trip through a file too, and when tiktoken encodes."""
    build_from_folder(folders[kind]).save(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer == build_from_folder(folders[kind])
    fast_tokenizer = tokenizer.speed_up()
    reference = Reference.from_file(str(folders[kind] / "tokenizer.json"))
    text_backend = Reference.from_file(str(folders[kind] / "tokenizer.json"))
    text_backend.encode_special_tokens = True
    bos, eos = reference.token_to_id("<s>"), reference.token_to_id("</s>")
    assert (tokenizer.prefix_ids, tokenizer.eot) == ((bos,), eos)
    for text in TEXTS:
        ids = text_backend.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text).tolist() == ids, text
        assert fast_tokenizer.encode(text).tolist() == ids, text
        assert tokenizer.encode_prompt(text) == reference.encode(text).ids, text
        assert tokenizer.decode(ids) == reference.decode(ids, skip_special_tokens=False), text
    assert tokenizer.vocab_size == 1 + max(reference.get_vocab().values())
    assert tokenizer.get_original_files() == {name: (folders[kind] / name).read_bytes() for name in TOKENIZER_FILES}


@pytest.mark.parametrize("kind", TOKENIZER_BUILDERS)
def test_incremental_decoder_equals_decode(kind, folders):
    tokenizer = build_from_folder(folders[kind])
    for prompt, continuation in (("The ship", " sailed 漢字 👩‍👩‍👧 to port."), ("", "漢 字"), ("a", "<think>b  c")):
        prompt_ids, ids = tokenizer.encode_prompt(prompt), tokenizer.encode(continuation).tolist()
        decoder = tokenizer.build_incremental_decoder(prompt_ids)
        fragments = [decoder.add(token) for token in ids]
        decoded = "".join([*fragments, decoder.end()])
        assert decoded == tokenizer.decode([*prompt_ids, *ids])[len(tokenizer.decode(prompt_ids)) :]
        assert not any(fragment.endswith("\ufffd") for fragment in fragments), "no character must be split"
    # A model may sample an id without a token, because its vocabulary is padded.
    assert tokenizer.decode([*ids, 10_000]).endswith("\ufffd")


def test_a_lone_surrogate_is_a_replacement_character(folders):
    tokenizer = build_from_folder(folders["sentencepiece_bpe"])
    assert tokenizer.encode("a\ud800b").tolist() == tokenizer.encode("a\ufffdb").tolist()
    assert tokenizer.encode_prompt("\ud83d\ude00") == tokenizer.encode_prompt("😀")


def test_tiktoken_is_used_only_if_ids_are_equal(folders, tmp_path, monkeypatch):
    write_folder(tmp_path / "plain", "byte_level", added=[])
    plain = build_from_folder(tmp_path / "plain").speed_up()
    assert plain._bpe is not None
    monkeypatch.setattr(HFTokenizer, "text_backend", None)  # so that only tiktoken can encode
    for text in ("", "the ship", "a</s>b", "漢字\r\n"):
        plain.encode(text)
    monkeypatch.undo()
    assert len(plain.encode("e\u0301")) == len(plain.encode("é")), "the test's text encodes differently without NFC"
    for kind in TOKENIZER_BUILDERS:
        assert build_from_folder(folders[kind]).speed_up()._bpe is None, (
            f"{kind}: tiktoken supports neither added tokens nor other models than BPE"
        )
    reference = write_folder(tmp_path / "added", "byte_level", added=["<think>"])
    added = build_from_folder(tmp_path / "added").speed_up()
    assert reference.token_to_id("<think>") in added.encode("a<think>b")


def test_tiktoken_is_not_used_if_its_ids_differ(tmp_path, monkeypatch):
    """The check at load runs both libraries and detects a conversion with another pattern."""
    import dist_llm.text.hf_bpe as hf_bpe

    write_folder(tmp_path, "byte_level", added=[], bos=False)
    tokenizer = build_from_folder(tmp_path)
    read_pattern = hf_bpe.read_pattern
    monkeypatch.setattr(hf_bpe, "read_pattern", lambda *args: read_pattern(*args).replace(r"\p{N}{1,3}", r"\p{N}+"))
    assert tokenizer.speed_up()._bpe is None
    assert tokenizer.speed_up().encode("1234567").tolist() == tokenizer.encode("1234567").tolist()


def test_folder_names_and_other_files_do_not_affect_the_identity(folders, tmp_path):
    renamed_folder = tmp_path / "another name"
    shutil.copytree(folders["byte_level"], renamed_folder)
    assert build_from_folder(renamed_folder).sha256 == build_from_folder(folders["byte_level"]).sha256
    (renamed_folder / "chat_template.jinja").write_text("another")
    for index, folder in enumerate((folders["byte_level"], renamed_folder, folders["unigram"])):
        (tmp_path / str(index)).mkdir()
        build_from_folder(folder).save(tmp_path / str(index))
    assert is_same_tokenizer(tmp_path / "0", tmp_path / "1")
    assert not is_same_tokenizer(tmp_path / "0", tmp_path / "2")


def test_identity_depends_on_the_pattern_but_not_on_the_name(tmp_path):
    bpe = build_tokenizer("bpe:300", training_texts=lambda: iter(PROSE))
    fields = json.loads(bpe.to_json_bytes())
    renamed = json.dumps({**fields, "name": "other"}).encode()
    assert hash_tokenizer_ids(bpe.to_json_bytes()) == hash_tokenizer_ids(renamed)
    assert hash_tokenizer_ids(bpe.to_json_bytes()) != hash_tokenizer_ids(
        json.dumps({**fields, "pattern": r"\s|\S+"}).encode()
    )


def test_gpt2_as_a_folder_equals_gpt2_as_two_files(tmp_path):
    if GPT2 is None:
        pytest.skip("GPT2_VOCABULARY names no folder with the published files")
    shutil.copy(Path(GPT2, "gpt2_vocab.json"), tmp_path / "vocab.json")
    shutil.copy(Path(GPT2, "gpt2_merges.txt"), tmp_path / "merges.txt")
    tokenizer_of_two_files = build_from_folder(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    tokenizer = build_from_folder(tmp_path)
    assert isinstance(tokenizer, HFTokenizer)
    fast_tokenizer = tokenizer.speed_up()
    assert fast_tokenizer._bpe is not None
    assert hash_tokenizer_ids(tokenizer.to_json_bytes()) == hash_tokenizer_ids(tokenizer_of_two_files.to_json_bytes())
    for text in TEXTS:
        ids = tokenizer.encode(text).tolist()
        assert ids == fast_tokenizer.encode(text).tolist() == tokenizer_of_two_files.encode(text).tolist()


def test_truncation_settings_do_not_truncate_documents(tmp_path):
    reference = write_folder(tmp_path, "wordpiece")
    reference.enable_truncation(4)
    reference.enable_padding(length=4)
    reference.save(str(tmp_path / "tokenizer.json"))
    tokenizer = build_from_folder(tmp_path)
    assert len(tokenizer.encode("the ship " * 50)) == 100
    assert len(tokenizer.encode("the")) == 1


@pytest.mark.parametrize("workers", [1, 2])
def test_prepare_writes_special_and_added_tokens(folders, workers, tmp_path):
    rows = [{"q": "the ", "t": f"warship ships {number}</s>"} for number in range(9)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out"
    folder = folders["byte_level"]
    options = {"heldout_fraction": 0.0, "workers": workers, "prompt_key": "q", "text_key": "t"}
    prepare(
        PrepareOptions(source=(str(tmp_path / "rows.jsonl"),), tokenizer=str(folder), out=out, **options), io.StringIO()
    )
    tokenizer = Tokenizer.load(out)
    ids = np.fromfile(out / "train-00000.bin", "<u2")
    starts, completions = np.fromfile(out / "train-00000.offsets", "<u8").astype(int).reshape(-1, 2).T
    assert len(starts) == 9
    assert (ids[starts] == tokenizer.prefix_ids[0]).all()
    assert (ids[[*(starts[1:] - 1), -1]] == tokenizer.eot).all()
    assert np.count_nonzero(ids == tokenizer.eot) == 9, "the string </s> in a text must be encoded as text"
    reference = Reference.from_file(str(folder / "tokenizer.json"))
    assert np.count_nonzero(ids == reference.token_to_id("ship")) == 18, "an added token must match within a word"
    assert tokenizer.decode(ids[: starts[1]]) == "<s>the warship ships 0</s></s>"
    assert (completions - starts == 1 + len(tokenizer.encode("the "))).all(), "BOS must be part of the prompt"


def test_word_edges_of_tokens(folders):
    for kind, space_mark in (("byte_level", "Ġ"), ("unigram", "▁"), ("sentencepiece_bpe", "▁")):
        tokenizer = build_from_folder(folders[kind])
        word_flags = tokenizer.build_objective_vocabulary(with_word_edges=True).word_edges_V2
        ids = tokenizer.text_backend.get_vocab()
        for token, token_id in ids.items():
            if token.startswith(space_mark) and token[1:].isalpha():
                assert word_flags[token_id].tolist() == [False, True], (kind, token)
    tokenizer = build_from_folder(folders["wordpiece"])
    word_flags = tokenizer.build_objective_vocabulary(with_word_edges=True).word_edges_V2
    ids = tokenizer.text_backend.get_vocab()
    assert word_flags[ids["the"]].tolist() == [False, True]
    assert word_flags[
        next(token_id for token, token_id in ids.items() if token.startswith("##") and token[2:].isalpha())
    ].all()


TOKENIZER_FIELDS = {  # of a valid tokenizer.json of ours
    "format": "dist_llm tokenizer 2",
    "kind": "huggingface",
    "vocab_size": 5,
    "end_token": 4,
    "first_tokens": [],
    "token_ids": {},
    "equal_bpe": "",
    "files": {"tokenizer.json": "{}"},
    "binary_files": {},
}


@pytest.mark.parametrize(
    ("changed_fields", "message"),
    [
        ({"kind": "other"}, "unknown to this version"),
        ({"kind": None}, "unknown to this version"),
        ({"vocab_size": "x"}, "cannot be read"),
        ({"end_token": 1.5}, "cannot be read"),
        ({"vocab_size": 4}, "but 4 ends"),
        ({"end_token": -1}, "but -1 ends"),
        ({"first_tokens": [7]}, "but 4 ends"),
        ({"first_tokens": 3}, "cannot be read"),
        ({"files": []}, "cannot be read"),
        ({"files": {"../x": ""}}, "outside its folder"),
        ({"files": {"a": 1}}, "cannot be read"),
        ({"binary_files": {"a": "?"}}, "cannot be read"),
        ({"token_ids": 4}, "cannot be read"),
    ],
    ids=str,
)
def test_a_malformed_file_is_a_data_error(changed_fields, message):
    with pytest.raises(DataError, match=message):
        parse_tokenizer(json.dumps(TOKENIZER_FIELDS | changed_fields).encode(), "location")


@pytest.mark.parametrize("content", ["", "{}", '{"model": []}', '{"model": {"type": "BPE", "vocab": {}, "merges": 3}}'])
def test_a_malformed_original_is_a_data_error(content):
    tokenizer = parse_tokenizer(
        json.dumps(TOKENIZER_FIELDS | {"files": {"tokenizer.json": content}}).encode(), "location"
    )
    with pytest.raises(DataError, match=r"tokenizer\.json cannot be read"):
        tokenizer.encode("text")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer.model": b"\n\x0e"}, "save_pretrained"),
        ({"vocab.txt": b"[UNK]\n"}, "save_pretrained"),
        ({"tokenizer.json": b"{"}, "cannot be read as JSON"),
        ({"tokenizer.json": b'{"model": 3}'}, "no model in it"),
        ({"tokenizer_config.json": b"[]", "tokenizer.json": b'{"model": {}}'}, "cannot be read"),
    ],
)
def test_an_unreadable_folder_is_an_error_with_a_hint(files, message, tmp_path):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        build_from_folder(tmp_path)


def test_a_tokenizer_without_an_end_token_is_refused(tmp_path):
    write_folder(tmp_path, "unigram")
    content = (tmp_path / TOKENIZER_FILE).read_text()
    (tmp_path / TOKENIZER_FILE).write_text(content.replace("</s>", "<stop>"))
    with pytest.raises(DataError, match=r"no token that ends a document.*Set eos_token"):
        build_from_folder(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {"eos_token": "<stop>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert build_from_folder(tmp_path).eot == Reference.from_file(str(tmp_path / TOKENIZER_FILE)).token_to_id("<stop>")
    assert len(ADDED) == 3
