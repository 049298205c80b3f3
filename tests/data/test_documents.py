"""Document masks follow the document offsets: with trailing, leading or no separators, in all kinds of windows."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from dist_llm.commands.verify_corpus import find_boundary_problems
from dist_llm.config.derive import resolve_config
from dist_llm.config.schema import UnresolvedConfig
from dist_llm.data.corpus import Corpus
from dist_llm.data.data_history import build_fresh_plan
from dist_llm.data.loader import build_loader
from dist_llm.data.shard import Manifest, ShardWriter
from dist_llm.data.streams import open_sources
from dist_llm.errors import DataError
from dist_llm.losses.cross_entropy import IGNORE_INDEX
from dist_llm.models.build_model import build_model
from dist_llm.objectives.build_objective import build_objective
from dist_llm.objectives.objective_vocabulary import ObjectiveVocabulary
from dist_llm.text.adopt import adopt
from dist_llm.text.adopt_options import AdoptOptions
from dist_llm.training.evaluate import HeldoutData, iter_heldout_batches
from tests.text.test_token_files import build_megatron_index

SEQ, EOT = 16, 256  # of the tokenizer `byte`
SIZES = (5, 3, 17, 9, 2, 20, 4, 6, 11, 7)
REPOSITORY = Path(__file__).parents[2]
PLACEMENTS = ("trailing", "leading", "none")


def make_documents(separators):
    """Return the ids of documents. All tokens differ except separators, so a token identifies its document."""
    starts = np.cumsum((0, *SIZES))
    documents = [np.arange(first, first + size) for first, size in zip(starts, SIZES, strict=False)]
    if separators != "none":
        position = {"trailing": -1, "leading": 0}[separators]
        for document in documents:
            document[position] = EOT
    return documents


def write_corpus(kind, separators, directory):
    """Write the documents as a corpus of this kind: the first six in one file and the rest in another."""
    documents = make_documents(separators)
    if kind == "prepared":
        writer = ShardWriter(directory, "train", "uint16", 56)
        for document in documents:
            writer.add(document, len(document))
        Manifest("uint16", 257, "none", ("x",), {"train": writer.close(), "heldout": ()}).save(directory)
        return Corpus(directory)
    files = []
    for number, file_documents in enumerate((documents[:6], documents[6:])):
        ids = np.concatenate(file_documents).astype(np.uint16)
        path = directory / f"{number}.{'npy' if kind == 'npy' else 'bin'}"
        if kind == "npy":
            np.save(path, ids)
        else:
            header = np.array([20240520, 1, len(ids), *[0] * 253], "<i4").tobytes() if kind == "llmc" else b""
            path.write_bytes(header + ids.tobytes())
        if kind == "megatron":
            path.with_suffix(".idx").write_bytes(
                build_megatron_index([len(document) for document in file_documents], range(len(file_documents) + 1))
            )
        files.append(str(path))
    position = {"trailing": "end", "leading": "start", "none": None}[separators] if kind != "megatron" else None
    options = AdoptOptions(
        kind, tuple(files), "byte", directory / "out", dtype="uint16" if kind == "bin" else None, eot_position=position
    )
    adopt(options, io.StringIO())
    return Corpus(directory / "out")


def make_config(corpus, batch=1, **data):
    raw = {
        "run": {"dir": "x", "steps": 1},
        "model": {"d_model": 16, "n_layers": 2, "n_heads": 2},
        "data": {"path": str(corpus.directory), "seq_len": SEQ, "global_batch": batch, "prefetch": 0, **data},
    }
    return resolve_config(UnresolvedConfig.model_validate(raw), 1, 257)


def load_epoch(corpus, **data):
    """Return all windows of an epoch as one batch."""
    plan = build_fresh_plan(make_config(corpus, **data))
    stream = plan.streams[0]
    config = make_config(
        corpus, stream.packed_windows.num_windows if stream.packed_windows else stream.order.num_windows, **data
    )
    (batch,) = build_loader(config, plan, ObjectiveVocabulary(257, EOT), 0, 1, pin=False).load_batches(0)
    return batch


def find_true_documents(batch, separators):
    """Return the document of each input token, computed from tokens alone.

    A separator belongs to the token beside it.
    """
    true_documents = np.repeat(np.arange(len(SIZES)), SIZES)
    rows = []
    for tokens in batch.inputs_BS.tolist():
        row = [None if token == EOT else int(true_documents[token]) for token in tokens]
        order = range(len(row)) if separators == "trailing" else reversed(range(len(row)))
        last = None
        for column in order:
            row[column] = last if row[column] is None else row[column]
            last = row[column]
        rows.append(row)
    return rows


CASES = [("prepared", placement) for placement in PLACEMENTS] + [("megatron", placement) for placement in PLACEMENTS]
CASES += [(kind, placement) for kind in ("bin", "npy", "llmc") for placement in PLACEMENTS[:2]]


@pytest.mark.parametrize("windows", ["stream", "document", "packed"])
@pytest.mark.parametrize(("kind", "separators"), CASES)
def test_document_mask_follows_the_offsets_in_all_window_kinds(kind, separators, windows, tmp_path):
    batch = load_epoch(write_corpus(kind, separators, tmp_path), windows=windows, document_mask=True)
    boundaries = 0
    rows_by_field = find_true_documents(batch, separators), batch.mask.documents_BT.tolist(), batch.targets_BS.tolist()
    for true_documents, numbers, targets in zip(*rows_by_field, strict=True):
        real = [windows == "stream" or target != IGNORE_INDEX for target in targets]  # without padding
        real_columns = [column for column, owner in enumerate(true_documents) if owner is not None and real[column]]
        for a in real_columns:
            for b in real_columns:
                assert (true_documents[a] == true_documents[b]) == (numbers[a] == numbers[b]), (true_documents, numbers)
        boundaries += len({true_documents[column] for column in real_columns}) > 1
    assert (boundaries > 0) == (windows != "document")


def build_noisy_model(config):
    """Build an fp64 model with weights so large that each attended token changes the logits."""
    model = build_model(config.model).double()
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(number))
    return model


@pytest.mark.parametrize("windows", ["stream", "packed"])
@pytest.mark.parametrize("separators", PLACEMENTS)
def test_documents_of_a_row_do_not_affect_each_other(separators, windows, tmp_path):
    """The document mask's law: logits equal those of the document alone; gradients across documents are exactly 0."""
    corpus = write_corpus("megatron", separators, tmp_path)
    batch = load_epoch(corpus, windows=windows, document_mask=True)
    true_documents = np.repeat(np.arange(len(SIZES)), SIZES)
    model = build_noisy_model(make_config(corpus))
    embedded = []
    model.embed.register_forward_hook(lambda module, inputs, out: embedded.append(out) or out.retain_grad())
    logits_BSV = model(batch.inputs_BS.long(), None, batch.mask, positions_BS=batch.positions_BS)
    (x_BSD,) = embedded
    checked = 0
    for row, numbers_S in enumerate(batch.mask.documents_BT):
        for number in numbers_S.unique().tolist():
            inside = numbers_S == number
            tokens_S = batch.inputs_BS[row][inside]
            owners = {int(true_documents[token]) for token in tokens_S.tolist() if token != EOT}
            assert len(owners) <= 1, "one document"
            alone_SV = model(tokens_S.long()[None])[0]
            torch.testing.assert_close(logits_BSV[row][inside], alone_SV, rtol=0, atol=1e-12)
            x_BSD.grad = None
            logits_BSV[row][inside].square().sum().backward(retain_graph=True)
            assert (x_BSD.grad[row][~inside] == 0).all()
            assert (x_BSD.grad[row][inside] != 0).any()
            checked += int((~inside).any())
    assert checked > 5, "rows with several documents"


def test_evaluation_uses_the_document_mask(tmp_path):
    corpus = write_corpus("megatron", "none", tmp_path)
    objective = build_objective(make_config(corpus, document_mask=True), ObjectiveVocabulary(257, EOT))
    batches = list(iter_heldout_batches(HeldoutData({"": corpus}, objective, 2), corpus, 0, 0, 1))
    true_documents = np.repeat(np.arange(len(SIZES)), SIZES)
    for batch in batches:
        for tokens, numbers in zip(batch.inputs_BS.tolist(), batch.mask.documents_BT.tolist(), strict=True):
            assert numbers == [int(true_documents[token] - true_documents[tokens[0]]) for token in tokens]
    assert len(batches) > 1


@pytest.mark.parametrize("kind", ["bin", "npy", "llmc"])
def test_unknown_document_boundaries_are_rejected_if_needed(kind, tmp_path):
    corpus = write_corpus(kind, "none", tmp_path)
    assert corpus.manifest.document_bounds is False
    assert open_sources(make_config(corpus)), "one stream needs no documents"
    for data in ({"document_mask": True}, {"windows": "document"}, {"windows": "packed"}):
        with pytest.raises(DataError, match=r"document boundaries are unknown.*document_mask to false.*tokenize"):
            open_sources(make_config(corpus, **data))
    objective = build_objective(make_config(corpus, document_mask=True), ObjectiveVocabulary(257, EOT))
    with pytest.raises(DataError, match="document boundaries are unknown"):
        HeldoutData({"": corpus}, objective, 2).check()


def test_older_manifests_have_bounds_if_a_file_has_several_documents(tmp_path):
    corpus = write_corpus("bin", "none", tmp_path)
    path = corpus.directory / "manifest.json"
    fields = json.loads(path.read_text())
    del fields["document_bounds"]
    path.write_text(json.dumps(fields))
    with pytest.raises(DataError, match="document boundaries are unknown"):
        Corpus(corpus.directory).check_document_bounds()
    path.write_text(json.dumps(fields | {"source": ["adopted from megatron files"]}))
    Corpus(corpus.directory).check_document_bounds()
    local_shards = []
    for shard in fields["shards"]["train"]:
        shutil.copy(shard["file"], corpus.directory)
        local_shards.append(shard | {"file": Path(shard["file"]).name})
    shards = {"train": local_shards, "heldout": []}
    path.write_text(json.dumps(fields | {"source": ["notes.txt"], "shards": shards}))
    Corpus(corpus.directory).check_document_bounds()


@pytest.mark.parametrize(("kind", "separators"), [case for case in CASES if case[0] != "prepared"])
def test_verify_accepts_leading_trailing_and_no_separators(kind, separators, tmp_path):
    corpus = write_corpus(kind, separators, tmp_path)
    assert list(find_boundary_problems(corpus)) == []
    if kind != "megatron":
        path = corpus.directory / "train-00000.offsets"
        offsets = np.fromfile(path, "<u8")
        offsets[2] += 1
        offsets.tofile(path)
        (problem,) = find_boundary_problems(Corpus(corpus.directory))
        assert f"a document should begin at token {offsets[2] - 1}" in problem
