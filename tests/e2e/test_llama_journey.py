"""A published Llama model survives import, training and export: users find the same tokenizer, settings and files.

The tests build the checkpoint as publishers do: bf16, several files with an index, added tokens, BOS from a template, a
chat template, sampling settings, and more embedding rows than the tokenizer has ids.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer as HFTokenizer

from dist_llm.checkpoint.probe import PROBE_FILE
from dist_llm.data.tokenizer_file import hash_tokenizer_ids
from dist_llm.generation import load_model
from dist_llm.text.tokenizer import Tokenizer
from tests.cli_runner import make_cli_runner
from tests.hf_folders import GENERATION, MORE_DIFFICULT_TEXTS, PROSE, TOKENIZER_FILES, write_folder

from . import commands

transformers = pytest.importorskip("transformers")

VOCAB_SIZE = 448  # padded: a multiple of 64
STEPS = 3
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


@dataclass(frozen=True)
class Journey:
    """The directory of each stage of the test run."""

    source: Path
    imported: Path
    corpus: Path
    run: Path
    exported: Path
    untrained: Path  # the import, exported without training


def convert(*arguments: object) -> None:
    """Run `dist-llm convert ARGUMENTS` in this process, which has imported transformers."""
    assert make_cli_runner("convert")(*arguments) == 0


@pytest.fixture(scope="module")
def journey(tmp_path_factory: pytest.TempPathFactory) -> Journey:
    """Import a Llama model, prepare a corpus with its tokenizer, train on two ranks, and export the result."""
    root = tmp_path_factory.mktemp("journey")
    reference = write_folder(root / "llama", "byte_level")
    assert reference.get_vocab_size() < VOCAB_SIZE
    save_model(root / "llama")
    convert("from-hf", root / "llama", root / "imported", "--check")
    rows = [{"text": f"{text} The warship sailed. <think>"} for text in PROSE]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare = ("--source", "rows.jsonl", "--tokenizer", "llama", "--heldout-fraction", 0.2, "--workers", 1)
    commands.run("prepare", *prepare, "--out", "corpus", cwd=root)
    (root / "run.yaml").write_text(
        f"run: {{dir: run, steps: {STEPS}}}\n"
        "model: {from: imported}\n"
        "init_from: imported\n"
        "data: {path: corpus, seq_len: 32, global_batch: 4, micro_batch: 2}\n"
        "optim: {lr: 1.0e-3}\n"
        "eval: {every: 0}\n"
    )
    commands.run("train", "--config", "run.yaml", "parallel.dp_shard=2", ranks=2, cwd=root)
    convert("to-hf", root / "run", root / "exported", "--check")
    convert("to-hf", root / "imported", root / "untrained", "--dtype", "bf16")
    return Journey(*(root / name for name in ("llama", "imported", "corpus", "run", "exported", "untrained")))


def save_model(folder: Path) -> None:
    """Write a Llama model with random weights, sharded into several files, beside the tokenizer in `folder`."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(
        **sizes, intermediate_size=48, vocab_size=VOCAB_SIZE, max_position_embeddings=64, **IDS
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    generation_config = (folder / "generation_config.json").read_bytes()
    model.save_pretrained(folder, max_shard_size="20KB")
    (folder / "generation_config.json").write_bytes(generation_config)
    assert (folder / "model.safetensors.index.json").exists()
    content = json.loads((folder / "config.json").read_text())
    content.pop("rope_parameters", None)  # default RoPE, which older files omit
    (folder / "config.json").write_text(json.dumps(content))


def load_hf_tokenizer(folder: Path) -> HFTokenizer:
    """Return the tokenizer of a folder as Hugging Face's tokenizers library reads it."""
    return HFTokenizer.from_file(str(folder / "tokenizer.json"))


def read_json(folder: Path, name: str) -> Any:
    """Return the content of a JSON file in a folder."""
    return json.loads((folder / name).read_text())


def test_the_tokenizer_files_are_bytewise_equal(journey: Journey) -> None:
    for exported in (journey.exported, journey.untrained):
        for name in TOKENIZER_FILES:
            assert (exported / name).read_bytes() == (journey.source / name).read_bytes(), name


def test_fifty_difficult_texts_have_the_same_ids(journey: Journey) -> None:
    """Compare the source and the export, as transformers loads them, with the corpus, the checkpoint and the import."""
    load = transformers.PreTrainedTokenizerFast.from_pretrained
    source, exported = load(journey.source), load(journey.exported)
    tokenizers = [
        Tokenizer.load(directory)
        for directory in (journey.corpus, commands.find_latest_checkpoint(journey.run), journey.imported)
    ]
    assert len({hash_tokenizer_ids(tokenizer.to_json_bytes()) for tokenizer in tokenizers}) == 1
    for text in MORE_DIFFICULT_TEXTS:
        ids = source(text)["input_ids"]
        assert exported(text)["input_ids"] == ids
        assert [tokenizer.encode_prompt(text) for tokenizer in tokenizers] == [ids] * 3
        assert exported.decode(ids) == source.decode(ids) == tokenizers[0].decode(ids)
    chat = [{"role": "user", "content": "ship"}]
    assert exported.apply_chat_template(chat, tokenize=False) == source.apply_chat_template(chat, tokenize=False)
    assert exported.apply_chat_template(chat, tokenize=False) == "<|im_start|>ship</s>"


def test_special_ids_and_settings_equal_those_of_the_source(journey: Journey) -> None:
    for exported in (journey.exported, journey.untrained):
        before, after = (read_json(folder, "config.json") for folder in (journey.source, exported))
        for name in (*IDS, "vocab_size", "max_position_embeddings"):
            assert after[name] == before[name], name
        generation = transformers.GenerationConfig.from_pretrained(exported).to_dict()
        assert {name: generation[name] for name in GENERATION} == GENERATION


def test_the_corpus_has_bos_added_and_end_tokens(journey: Journey) -> None:
    reference = load_hf_tokenizer(journey.source)
    ids = np.fromfile(journey.corpus / "train-00000.bin", "<u2")
    starts = np.fromfile(journey.corpus / "train-00000.offsets", "<u8").astype(int)
    assert (ids[starts] == IDS["bos_token_id"]).all()
    assert (ids[starts[1:] - 1] == IDS["eos_token_id"]).all()
    for token in ("ship", "ailed", "<think>"):
        assert np.count_nonzero(ids == reference.token_to_id(token)) >= len(starts), token
    assert ids.max() < reference.get_vocab_size()


def test_logits_are_equal_to_1e_5(journey: Journey) -> None:
    """The untrained export equals the source; the trained export equals the run's model and differs from the source."""
    ids = torch.tensor([load_hf_tokenizer(journey.source).encode("The ship sailed to port 7; 漢字").ids])
    models = [
        transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for folder in (journey.source, journey.untrained, journey.exported)
    ]
    with torch.no_grad():
        source, untrained, trained = (model(ids).logits for model in models)
    assert source.shape[-1] == VOCAB_SIZE
    torch.testing.assert_close(untrained, source, rtol=0, atol=1e-5)
    native_model, _, _ = load_model(commands.find_latest_checkpoint(journey.run), torch.device("cpu"))
    with torch.no_grad():
        torch.testing.assert_close(native_model(ids)[..., :VOCAB_SIZE], trained, rtol=0, atol=1e-5)
    assert (trained - source).abs().max() > 1e-3
    stored = read_json(commands.find_latest_checkpoint(journey.run), PROBE_FILE)
    exported = read_json(journey.exported, PROBE_FILE)
    assert abs(stored["loss"] - exported["loss"]) < 1e-5


def test_generate_adds_bos_and_decodes_as_the_original(journey: Journey, tmp_path: Path) -> None:
    prompt, max_tokens = "The ship", 8
    arguments = ("--prompt", prompt, "--max-tokens", max_tokens, "--temperature", 0)
    output = commands.run("generate", "--checkpoint", journey.run, *arguments, cwd=tmp_path).stdout
    hf_model = transformers.AutoModelForCausalLM.from_pretrained(journey.exported, dtype=torch.float32)
    reference = load_hf_tokenizer(journey.source)
    prompt_ids = reference.encode(prompt).ids
    assert prompt_ids[0] == IDS["bos_token_id"]
    settings = {"max_new_tokens": max_tokens, "do_sample": False, "temperature": None, "top_p": None}
    ids = hf_model.generate(torch.tensor([prompt_ids]), **settings, eos_token_id=IDS["eos_token_id"], pad_token_id=0)[0]
    new_ids = [token for token in ids[len(prompt_ids) :].tolist() if token != IDS["eos_token_id"]]
    expected = reference.decode(prompt_ids[1:] + new_ids, skip_special_tokens=False)
    assert re.sub(r"\n$", "", output) == expected


def test_a_run_copies_the_files_of_the_imported_checkpoint(journey: Journey) -> None:
    for name in ("generation_config.json", "token_ids.json", "tokenizer.json"):
        assert (commands.find_latest_checkpoint(journey.run) / name).read_bytes() == (
            journey.imported / name
        ).read_bytes(), name
