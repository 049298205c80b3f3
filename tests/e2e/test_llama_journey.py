"""A published model goes on: imported, trained on two ranks, exported, and still the same to its users.

The checkpoint is made here as its publishers make them: Llama, bf16, several files and an index, added tokens, BOS by a
template, a chat template, sampling settings, and more rows in its embedding than its tokenizer has ids.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer as Reference

from dist_llm.checkpoint.probe import PROBE
from dist_llm.data.tokenizer_file import identity
from dist_llm.generate import load_model
from dist_llm.text.tokenizer import Tokenizer
from tests.hf_folders import DIFFICULT, GENERATION, ORIGINALS, PROSE, write_folder
from tests.tools import command

from . import commands

transformers = pytest.importorskip("transformers")

VOCAB_SIZE = 448  # padded: a multiple of 64
STEPS = 3
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


@dataclass(frozen=True)
class Journey:
    """Where each part of it is."""

    source: Path
    imported: Path
    corpus: Path
    run: Path
    exported: Path
    untrained: Path  # the import, exported at once


def convert(*arguments: object) -> None:
    """`dist-llm convert ...`, in this process, which has imported transformers."""
    assert command("convert")(*arguments) == 0


@pytest.fixture(scope="module")
def journey(tmp_path_factory: pytest.TempPathFactory) -> Journey:
    place = tmp_path_factory.mktemp("journey")
    reference = write_folder(place / "llama", "byte_level")
    assert reference.get_vocab_size() < VOCAB_SIZE
    save_model(place / "llama")
    convert("from-hf", place / "llama", place / "imported", "--check")
    rows = [{"text": f"{text} The warship sailed. <think>"} for text in PROSE]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare = ("--source", "rows.jsonl", "--tokenizer", "llama", "--heldout-fraction", 0.2, "--workers", 1)
    commands.run("prepare", *prepare, "--out", "corpus", cwd=place)
    (place / "run.yaml").write_text(
        f"run: {{dir: run, steps: {STEPS}}}\n"
        "model: {from: imported}\n"
        "init_from: imported\n"
        "data: {path: corpus, seq_len: 32, global_batch: 4, micro_batch: 2}\n"
        "optim: {lr: 1.0e-3}\n"
        "eval: {every: 0}\n"
    )
    commands.run("train", "--config", "run.yaml", "parallel.dp_shard=2", ranks=2, cwd=place)
    convert("to-hf", place / "run", place / "exported", "--check")
    convert("to-hf", place / "imported", place / "untrained", "--dtype", "bf16")
    return Journey(*(place / name for name in ("llama", "imported", "corpus", "run", "exported", "untrained")))


def save_model(folder: Path) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(
        **sizes, intermediate_size=48, vocab_size=VOCAB_SIZE, max_position_embeddings=64, **IDS
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    kept = (folder / "generation_config.json").read_bytes()
    model.save_pretrained(folder, max_shard_size="20KB")
    (folder / "generation_config.json").write_bytes(kept)
    assert (folder / "model.safetensors.index.json").exists()
    content = json.loads((folder / "config.json").read_text())
    content.pop("rope_parameters", None)  # default RoPE, which older files do not spell out
    (folder / "config.json").write_text(json.dumps(content))


def reference_of(folder: Path) -> Reference:
    return Reference.from_file(str(folder / "tokenizer.json"))


def settings_of(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text())


def test_the_files_of_the_tokenizer_are_the_same_bytes(journey: Journey) -> None:
    for exported in (journey.exported, journey.untrained):
        for name in ORIGINALS:
            assert (exported / name).read_bytes() == (journey.source / name).read_bytes(), name


def test_fifty_difficult_texts_have_the_same_ids(journey: Journey) -> None:
    """In the source, the export (both as transformers loads them), the corpus and the checkpoint."""
    load = transformers.PreTrainedTokenizerFast.from_pretrained
    before, after = load(journey.source), load(journey.exported)
    kept = [Tokenizer.load(place) for place in (journey.corpus, commands.newest(journey.run), journey.imported)]
    assert len({identity(tokenizer.file_bytes()) for tokenizer in kept}) == 1
    for text in DIFFICULT:
        ids = before(text)["input_ids"]
        assert after(text)["input_ids"] == ids
        assert [tokenizer.encode_prompt(text) for tokenizer in kept] == [ids] * 3
        assert after.decode(ids) == before.decode(ids) == kept[0].decode(ids)
    chat = [{"role": "user", "content": "ship"}]
    assert after.apply_chat_template(chat, tokenize=False) == before.apply_chat_template(chat, tokenize=False)
    assert after.apply_chat_template(chat, tokenize=False) == "<|im_start|>ship</s>"


def test_special_ids_and_settings_are_the_sources(journey: Journey) -> None:
    for exported in (journey.exported, journey.untrained):
        before, after = (settings_of(folder, "config.json") for folder in (journey.source, exported))
        for name in (*IDS, "vocab_size", "max_position_embeddings"):
            assert after[name] == before[name], name
        generation = transformers.GenerationConfig.from_pretrained(exported).to_dict()
        assert {name: generation[name] for name in GENERATION} == GENERATION


def test_the_corpus_has_bos_added_tokens_and_the_end(journey: Journey) -> None:
    reference = reference_of(journey.source)
    ids = np.fromfile(journey.corpus / "train-00000.bin", "<u2")
    starts = np.fromfile(journey.corpus / "train-00000.offsets", "<u8").astype(int)
    assert (ids[starts] == IDS["bos_token_id"]).all()
    assert (ids[starts[1:] - 1] == IDS["eos_token_id"]).all()
    for token in ("ship", "ailed", "<think>"):
        assert np.count_nonzero(ids == reference.token_to_id(token)) >= len(starts), token
    assert ids.max() < reference.get_vocab_size()


def test_logits_are_the_same_to_1e_5(journey: Journey) -> None:
    """Untrained: those of the source. Trained: those of the run's own model; and it did train."""
    ids = torch.tensor([reference_of(journey.source).encode("The ship sailed to port 7; 漢字").ids])
    models = [
        transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for folder in (journey.source, journey.untrained, journey.exported)
    ]
    with torch.no_grad():
        source, untrained, trained = (model(ids).logits for model in models)
    assert source.shape[-1] == VOCAB_SIZE
    torch.testing.assert_close(untrained, source, rtol=0, atol=1e-5)
    ours, _, _ = load_model(commands.newest(journey.run), torch.device("cpu"))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids)[..., :VOCAB_SIZE], trained, rtol=0, atol=1e-5)
    assert (trained - source).abs().max() > 1e-3
    stored = settings_of(commands.newest(journey.run), PROBE)
    exported = settings_of(journey.exported, PROBE)
    assert abs(stored["loss"] - exported["loss"]) < 1e-5


def test_generate_puts_bos_in_front_and_decodes_as_the_original(journey: Journey, tmp_path: Path) -> None:
    prompt, count = "The ship", 8
    arguments = ("--prompt", prompt, "--max-tokens", count, "--temperature", 0)
    said = commands.run("generate", "--checkpoint", journey.run, *arguments, cwd=tmp_path).stdout
    theirs = transformers.AutoModelForCausalLM.from_pretrained(journey.exported, dtype=torch.float32)
    reference = reference_of(journey.source)
    start = reference.encode(prompt).ids
    assert start[0] == IDS["bos_token_id"]
    settings = {"max_new_tokens": count, "do_sample": False, "temperature": None, "top_p": None}
    ids = theirs.generate(torch.tensor([start]), **settings, eos_token_id=IDS["eos_token_id"], pad_token_id=0)[0]
    new = [token for token in ids[len(start) :].tolist() if token != IDS["eos_token_id"]]
    want = reference.decode(start[1:] + new, skip_special_tokens=False)
    assert re.sub(r"\n$", "", said) == want


def test_a_run_keeps_the_files_that_its_start_came_with(journey: Journey) -> None:
    for name in ("generation_config.json", "token_ids.json", "tokenizer.json"):
        assert (commands.newest(journey.run) / name).read_bytes() == (journey.imported / name).read_bytes(), name
