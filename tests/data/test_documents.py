"""Document masks follow the document offsets of a corpus.

The tests cover all kinds of windows and of token files, and trailing, leading or no separators. A separator is the
end-of-document token between documents.
"""

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
from dist_llm.data.shard import CorpusManifest, ShardWriter
from dist_llm.data.streams import open_sources
from dist_llm.errors import DataError
from dist_llm.losses.cross_entropy import IGNORE_INDEX
from dist_llm.models.build_model import build_model
from dist_llm.objectives.build_objective import build_objective
from dist_llm.objectives.objective_vocabulary import ObjectiveVocabulary
from dist_llm.text.adopt import adopt
from dist_llm.text.adopt_options import AdoptOptions
from dist_llm.training.evaluate import EvaluationSetup, iter_heldout_batches
from tests.text.test_token_files import build_megatron_index

SEQ_LEN = 16  # sequence length in tokens
EOT = 256  # end-of-document id of the tokenizer `byte`
DOCUMENT_SIZES = (5, 3, 17, 9, 2, 20, 4, 6, 11, 7)  # in tokens
SEPARATOR_PLACEMENTS = ("trailing", "leading", "none")


def make_documents(separators):
    """Return the token ids of each document. All ids differ except separators, so an id identifies its document."""
    starts = np.cumsum((0, *DOCUMENT_SIZES))
    documents = [np.arange(start, start + size) for start, size in zip(starts, DOCUMENT_SIZES, strict=False)]
    if separators != "none":
        separator_index = {"trailing": -1, "leading": 0}[separators]
        for document in documents:
            document[separator_index] = EOT
    return documents


def write_corpus(kind, separators, directory):
    """Write the documents as a corpus of this kind: six documents in the first file and four in the second."""
    documents = make_documents(separators)
    if kind == "prepared":
        writer = ShardWriter(directory, "train", "uint16", max_tokens=56)
        for document in documents:
            writer.add(document, len(document))
        CorpusManifest(
            "uint16",
            vocab_size=257,
            tokenizer_sha256="none",
            source=("x",),
            shards={"train": writer.close(), "heldout": ()},
        ).save(directory)
        return Corpus(directory)
    files = []
    for file_index, file_documents in enumerate((documents[:6], documents[6:])):
        ids = np.concatenate(file_documents).astype(np.uint16)
        path = directory / f"{file_index}.{'npy' if kind == 'npy' else 'bin'}"
        if kind == "npy":
            np.save(path, ids)
        else:
            # The header of llm.c has 256 ints: magic number, version, number of ids, zeros.
            header = np.array([20240520, 1, len(ids), *[0] * 253], "<i4").tobytes() if kind == "llmc" else b""
            path.write_bytes(header + ids.tobytes())
        if kind == "megatron":
            path.with_suffix(".idx").write_bytes(
                build_megatron_index([len(document) for document in file_documents], range(len(file_documents) + 1))
            )
        files.append(str(path))
    eot_position = {"trailing": "end", "leading": "start", "none": None}[separators]
    if kind == "megatron":  # its index has the document offsets
        eot_position = None
    options = AdoptOptions(
        format=kind,
        data=tuple(files),
        tokenizer="byte",
        out=directory / "out",
        dtype="uint16" if kind == "bin" else None,
        eot_position=eot_position,
    )
    adopt(options, io.StringIO())
    return Corpus(directory / "out")


def make_config(corpus, global_batch=1, **data):
    """Return a resolved config of a tiny model; `data` are keys of that section."""
    sections = {
        "run": {"dir": "x", "steps": 1},
        "model": {"d_model": 16, "n_layers": 2, "n_heads": 2},
        "data": {
            "path": str(corpus.directory),
            "seq_len": SEQ_LEN,
            "global_batch": global_batch,
            "prefetch": 0,
            **data,
        },
    }
    return resolve_config(UnresolvedConfig.model_validate(sections), world_size=1, tokenizer_size=257)


def load_epoch(corpus, **data):
    """Return all windows of an epoch as one batch."""
    plan = build_fresh_plan(make_config(corpus=corpus, **data))
    stream = plan.streams[0]
    num_windows = stream.packed_windows.num_windows if stream.packed_windows else stream.order.num_windows
    config = make_config(corpus=corpus, global_batch=num_windows, **data)
    loader = build_loader(config, plan, ObjectiveVocabulary(257, EOT), dp_rank=0, dp_size=1, pin=False)
    (batch,) = loader.load_batches(0)
    return batch


def find_true_documents(batch, separators):
    """Return the document index of each input token, computed from the token ids.

    A separator belongs to the document before it (trailing) or after it (leading).
    """
    document_of_token = np.repeat(np.arange(len(DOCUMENT_SIZES)), DOCUMENT_SIZES)
    documents_by_sequence = []
    for tokens in batch.inputs_BS.tolist():
        documents = [None if token == EOT else int(document_of_token[token]) for token in tokens]
        columns = range(len(documents)) if separators == "trailing" else reversed(range(len(documents)))
        neighbour = None
        for column in columns:
            documents[column] = neighbour if documents[column] is None else documents[column]
            neighbour = documents[column]
        documents_by_sequence.append(documents)
    return documents_by_sequence


CASES = [("prepared", placement) for placement in SEPARATOR_PLACEMENTS] + [
    ("megatron", placement) for placement in SEPARATOR_PLACEMENTS
]
CASES += [(kind, placement) for kind in ("bin", "npy", "llmc") for placement in SEPARATOR_PLACEMENTS[:2]]


@pytest.mark.parametrize("windows", ["stream", "document", "packed"])
@pytest.mark.parametrize(("kind", "separators"), CASES)
def test_document_mask_follows_the_offsets_in_all_window_kinds(kind, separators, windows, tmp_path):
    batch = load_epoch(write_corpus(kind, separators, tmp_path), windows=windows, document_mask=True)
    num_mixed_sequences = 0  # sequences with tokens of several documents
    true_documents_BS = find_true_documents(batch, separators)
    mask_ids_BS, targets_BS = batch.mask.documents_BT.tolist(), batch.targets_BS.tolist()
    for true_documents, mask_ids, targets in zip(true_documents_BS, mask_ids_BS, targets_BS, strict=True):
        is_text = [windows == "stream" or target != IGNORE_INDEX for target in targets]  # False: padding
        columns = [column for column, document in enumerate(true_documents) if document is not None and is_text[column]]
        for i in columns:
            for j in columns:
                is_same_document = true_documents[i] == true_documents[j]
                assert (mask_ids[i] == mask_ids[j]) == is_same_document, (true_documents, mask_ids)
        num_mixed_sequences += len({true_documents[column] for column in columns}) > 1
    assert (num_mixed_sequences > 0) == (windows != "document")


def build_noisy_model(config):
    """Build an fp64 model with large random weights, so that each attended token changes the logits."""
    model = build_model(config.model).double()
    with torch.no_grad():
        for seed, parameter in enumerate(model.parameters()):
            parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(seed))
    return model


@pytest.mark.parametrize("windows", ["stream", "packed"])
@pytest.mark.parametrize("separators", SEPARATOR_PLACEMENTS)
def test_documents_in_one_sequence_do_not_affect_each_other(separators, windows, tmp_path):
    """The logits of a document equal those of the document in its own sequence.

    Gradients from one document to another are exactly 0.
    """
    corpus = write_corpus("megatron", separators, tmp_path)
    batch = load_epoch(corpus, windows=windows, document_mask=True)
    document_of_token = np.repeat(np.arange(len(DOCUMENT_SIZES)), DOCUMENT_SIZES)
    model = build_noisy_model(make_config(corpus=corpus))
    embeddings = []
    model.embed.register_forward_hook(lambda module, inputs, out: embeddings.append(out) or out.retain_grad())
    logits_BSV = model(batch.inputs_BS.long(), mask=batch.mask, positions_BS=batch.positions_BS)
    (x_BSD,) = embeddings
    num_checked = 0  # documents that share their sequence with another document
    for sequence, mask_ids_S in enumerate(batch.mask.documents_BT):
        for mask_id in mask_ids_S.unique().tolist():
            is_inside = mask_ids_S == mask_id
            tokens_S = batch.inputs_BS[sequence][is_inside]
            documents = {int(document_of_token[token]) for token in tokens_S.tolist() if token != EOT}
            assert len(documents) <= 1, "several documents have one id in the mask"
            alone_SV = model(tokens_S.long()[None])[0]
            torch.testing.assert_close(logits_BSV[sequence][is_inside], alone_SV, rtol=0, atol=1e-12)
            x_BSD.grad = None
            logits_BSV[sequence][is_inside].square().sum().backward(retain_graph=True)
            assert (x_BSD.grad[sequence][~is_inside] == 0).all()
            assert (x_BSD.grad[sequence][is_inside] != 0).any()
            num_checked += int((~is_inside).any())
    assert num_checked > 5, "too few sequences have several documents"


def test_evaluation_uses_the_document_mask(tmp_path):
    corpus = write_corpus("megatron", "none", tmp_path)
    objective = build_objective(make_config(corpus=corpus, document_mask=True), ObjectiveVocabulary(257, EOT))
    heldout = EvaluationSetup({"": corpus}, objective, micro_batch=2)
    batches = list(iter_heldout_batches(heldout, corpus, component_index=0, dp_rank=0, dp_size=1))
    document_of_token = np.repeat(np.arange(len(DOCUMENT_SIZES)), DOCUMENT_SIZES)
    for batch in batches:
        for tokens, mask_ids in zip(batch.inputs_BS.tolist(), batch.mask.documents_BT.tolist(), strict=True):
            assert mask_ids == [int(document_of_token[token] - document_of_token[tokens[0]]) for token in tokens]
    assert len(batches) > 1


@pytest.mark.parametrize("kind", ["bin", "npy", "llmc"])
def test_unknown_document_boundaries_are_rejected_if_needed(kind, tmp_path):
    corpus = write_corpus(kind, "none", tmp_path)
    assert corpus.manifest.document_bounds is False
    assert open_sources(make_config(corpus=corpus)), "windows of one stream need document boundaries"
    for data in ({"document_mask": True}, {"windows": "document"}, {"windows": "packed"}):
        with pytest.raises(DataError, match=r"document boundaries are unknown.*document_mask to false.*tokenize"):
            open_sources(make_config(corpus=corpus, **data))
    objective = build_objective(make_config(corpus=corpus, document_mask=True), ObjectiveVocabulary(257, EOT))
    with pytest.raises(DataError, match="document boundaries are unknown"):
        EvaluationSetup({"": corpus}, objective, micro_batch=2).check()


def test_document_bounds_of_a_manifest_without_the_field(tmp_path):
    """Older manifests lack `document_bounds`. Then the source and the number of documents decide."""
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
def test_verify_corpus_accepts_every_placement_of_separators(kind, separators, tmp_path):
    corpus = write_corpus(kind, separators, tmp_path)
    assert list(find_boundary_problems(corpus)) == []
    if kind != "megatron":
        path = corpus.directory / "train-00000.offsets"
        offsets = np.fromfile(path, "<u8")
        offsets[2] += 1
        offsets.tofile(path)
        (problem,) = find_boundary_problems(Corpus(corpus.directory))
        assert f"a document should begin at token {offsets[2] - 1}" in problem
