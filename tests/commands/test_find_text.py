"""`dist-llm data find` lists each matching document once, and reports that it stopped only if more documents match."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from dist_llm.commands import find_text as find_text_module
from dist_llm.commands.find_text import MAX_DOCUMENTS, find_text
from dist_llm.data.corpus import DocumentLocation


def run_find_text(monkeypatch, capsys, num_documents, segment_steps=(0,), corpora=("a",)):
    """Search a run whose corpora have `num_documents` matching documents each. Returns the exit code and the output."""
    config = SimpleNamespace(run=SimpleNamespace(steps=10))
    history = tuple(SimpleNamespace(step=step) for step in segment_steps)
    sources = [
        SimpleNamespace(
            name="", corpus=SimpleNamespace(directory=Path(name), shards=[SimpleNamespace(file="train-00000.bin")])
        )
        for name in corpora
    ]
    documents = [
        DocumentLocation(shard=0, index=index, start=5 * index, end=5 * index + 5, completion=5 * index)
        for index in range(num_documents)
    ]
    monkeypatch.setattr(find_text_module, "open_run", lambda run: (config, history))
    monkeypatch.setattr(
        find_text_module, "open_segment", lambda *_: SimpleNamespace(plan=SimpleNamespace(sources=sources))
    )
    monkeypatch.setattr(find_text_module, "iter_matching_documents", lambda corpus, text: iter(documents))
    monkeypatch.setattr(
        find_text_module,
        "iter_steps_with_document",
        lambda plan, segment, end_step, corpus, document: iter([(segment.step + 1, 7)]),
    )
    monkeypatch.setattr(find_text_module, "_last_trained_step", lambda run, history: 3)
    code = find_text("text", Path("run"))
    return code, capsys.readouterr().out


@pytest.mark.parametrize("num_documents", [1, MAX_DOCUMENTS, MAX_DOCUMENTS + 1])
def test_the_search_reports_a_stop_only_if_more_documents_match(monkeypatch, capsys, num_documents):
    code, output = run_find_text(monkeypatch, capsys, num_documents)
    assert code == 0
    assert output.count("step 1 (was read), sample 7") == min(num_documents, MAX_DOCUMENTS)
    assert (f"stopped after {MAX_DOCUMENTS} matches" in output) == (num_documents > MAX_DOCUMENTS)


def test_a_document_of_two_segments_counts_once(monkeypatch, capsys):
    _, output = run_find_text(monkeypatch, capsys, MAX_DOCUMENTS, segment_steps=(0, 5))
    assert output.count("step 1 (was read), sample 7") == MAX_DOCUMENTS
    assert output.count("step 6 (will be read), sample 7") == MAX_DOCUMENTS
    assert "stopped" not in output


def test_equal_offsets_in_two_corpora_are_two_documents(monkeypatch, capsys):
    _, output = run_find_text(monkeypatch, capsys, MAX_DOCUMENTS, corpora=("a", "b"))
    assert output.count("document 0, corpus tokens 0 to 5") == 1
    assert f"stopped after {MAX_DOCUMENTS} matches" in output


def test_without_a_matching_document_the_exit_code_is_1(monkeypatch, capsys):
    code, output = run_find_text(monkeypatch, capsys, num_documents=0)
    assert (code, output) == (1, "no document contains this text\n")
