"""The data history: which data settings may change at a resume. A change never rewrites an earlier segment."""

import json

import numpy as np
import pytest

from dist_llm.config.derive import resolve_config
from dist_llm.config.schema import UnresolvedConfig
from dist_llm.data.data_history import (
    HISTORY_FILE,
    build_fresh_plan,
    dump_history,
    extend_history,
    open_segment,
    parse_history,
    segment_from_config,
)
from dist_llm.data.shard import CorpusManifest, ShardWriter
from dist_llm.data.streams import derive_seed, open_sources
from dist_llm.errors import DataError

# When the run resumes: it has read 5 steps of 6 samples of 4 tokens.
RESUME_POINT = {"step": 5, "samples": 30, "tokens": 120}


def write_corpus(directory, seed, num_tokens=400):
    """Write a corpus of documents of 10 tokens and return its path."""
    directory.mkdir(exist_ok=True)
    writer = ShardWriter(directory, "train", "uint16", max_tokens=100)
    for document in np.random.default_rng(seed).integers(0, 300, (num_tokens // 10, 10)):
        writer.add(document, text_bytes=10)
    CorpusManifest(
        "uint16",
        vocab_size=300,
        tokenizer_sha256="tokenizer",
        source=("random",),
        shards={"train": writer.close(), "heldout": ()},
    ).save(directory)
    return str(directory)


@pytest.fixture
def make_config(tmp_path):
    """Return a function that makes the config of a run on the sources a and b. `data` are more keys of its section."""
    paths = {name: write_corpus(tmp_path / name, seed) for seed, name in enumerate("ab")}

    def resolve_sections(seed=0, weights=(3, 1), objective=None, **data):
        sources = [
            {"name": name, "path": paths[name], "weight": float(weight)}
            for name, weight in zip("ab", weights, strict=True)
            if weight
        ]
        sections = {
            "run": {"dir": "x", "steps": 9, "seed": seed},
            "model": {"d_model": 8, "n_layers": 1, "n_heads": 1},
            "data": {"sources": sources, "seq_len": 4, "global_batch": 6, "prefetch": 0, **data},
            "objective": objective or {},
        }
        return resolve_config(UnresolvedConfig.model_validate(sections), world_size=1, tokenizer_size=300)

    return resolve_sections


def build_segment(config):
    """Return the segment of the data history that a run with this config starts."""
    return segment_from_config(config, open_sources(config))


def build_last_plan(config, history):
    """Return the sample plan of the last segment."""
    return history[-1].build_plan(open_sources(config))


def test_history_round_trip(make_config):
    history = (
        build_segment(make_config(stages=[{"from_tokens": 40, "weights": {"a": 0.0, "b": 1.0}}], skip=[[3, 5]])),
    )
    assert parse_history(dump_history(history), "data.json") == history
    with pytest.raises(DataError, match=r"^data.json: 0.first: "):  # segment 0 lacks the key `first`
        parse_history(dump_history(history).replace(b'"first"', b'"fist"', 1), "data.json")


def test_keys_of_the_file_do_not_change(make_config):
    """Runs of other versions read the file."""
    (segment,) = json.loads(dump_history((build_segment(make_config()),)))
    assert segment.keys() == {"step", "first", "global_batch", "skip", "mix"}
    assert {"first", "tokens", "sources"} <= segment["mix"].keys()
    assert segment["mix"]["sources"][0].keys() == {"name", "path", "content", "taken"}


def test_resume_with_the_same_data_keeps_the_history(make_config):
    history = (build_segment(make_config()),)
    assert extend_history(history, build_segment(make_config()), **RESUME_POINT, new_segment=False) == history


def test_a_corpus_at_a_new_path_is_the_same_corpus(make_config, tmp_path):
    history = (build_segment(make_config()),)
    (tmp_path / "a").rename(tmp_path / "c")
    relocated = make_config()
    source_a, source_b = relocated.data.sources
    sources = (source_a.model_copy(update={"path": str(tmp_path / "c")}), source_b)
    relocated = relocated.model_copy(update={"data": relocated.data.model_copy(update={"sources": sources})})
    (extended,) = extend_history(history, build_segment(relocated), **RESUME_POINT, new_segment=False)
    assert extended.spec.sources[0].path == str(tmp_path / "c")
    assert extended.spec.sources[0].content == history[0].spec.sources[0].content


@pytest.mark.parametrize("changed_keys", [{"global_batch": 9}, {"skip": [[32, 40]]}])
def test_a_changed_batch_size_or_skip_does_not_renumber_samples(changed_keys, make_config):
    """The next step begins at the next unused sample, and each number still means the same window."""
    history = (build_segment(make_config()),)
    extended = extend_history(history, build_segment(make_config(**changed_keys)), **RESUME_POINT, new_segment=False)
    assert extended[0] == history[0]
    assert (extended[1].step, extended[1].first_sample, extended[1].spec) == (5, 30, history[0].spec)
    before, after = (
        build_last_plan(make_config(), segments).locate_samples(np.arange(90)) for segments in (history, extended)
    )
    assert np.array_equal(before, after)
    # The change is reverted before a step is trained with it. Then the history keeps no trace of the change.
    assert extend_history(extended, build_segment(make_config()), **RESUME_POINT, new_segment=False)[1:] == (
        extended[1].model_copy(update={"global_batch": 6, "skip": ()}),
    )


def test_sources_continue_after_changed_weights(make_config):
    history = (build_segment(make_config()),)
    extended = extend_history(history, build_segment(make_config(weights=(1, 3))), **RESUME_POINT, new_segment=False)
    assert extended[0] == history[0], "an earlier segment was rewritten"
    old_plan = build_last_plan(make_config(), history)
    new_plan = build_last_plan(make_config(weights=(1, 3)), extended)
    source_ids, _ = old_plan.assign(np.arange(30))
    new_source_ids, new_indices = new_plan.assign(np.arange(30, 30 + 10_000))
    for source, consumed in enumerate(np.bincount(source_ids, minlength=2).tolist()):
        assert extended[1].spec.sources[source].num_consumed == consumed
        indices = new_indices[new_source_ids == source]
        assert indices.tolist() == list(range(consumed, consumed + (2500, 7500)[source])), "a sample is not read once"
    # A second resume with the same config changes nothing.
    assert (
        extend_history(
            extended, build_segment(make_config(weights=(1, 3))), step=7, samples=42, tokens=168, new_segment=False
        )
        == extended
    )


def test_stages_begin_at_their_from_tokens(make_config):
    stages = [
        {"from_tokens": 41, "weights": {"a": 0.0, "b": 1.0}},
        {"from_tokens": 80, "weights": {"a": 1.0, "b": 0.0}},
    ]
    plan = build_fresh_plan(make_config(stages=stages))
    assert [stage.first_sample for stage in plan.stages] == [0, 11, 20]  # a sample has 4 tokens; round up
    source_ids, _ = plan.assign(np.arange(30))
    assert 0 in source_ids[:11]
    assert set(source_ids[11:20]) == {1}
    assert set(source_ids[20:]) == {0}


REJECTED_CHANGES = {  # name: arguments of make_config, line of the error
    "seed": ({"seed": 1}, "run.seed: 0 -> 1"),
    "window": ({"seq_len": 5}, "data.seq_len: 4 -> 5"),
    "windows": ({"windows": "packed"}, "data.windows: stream -> packed"),
    "order": ({"order": "random"}, "data.order: shuffle -> random"),
    "objective": ({"objective": {"name": "fim", "fim_rate": 0.25}, "seq_len": 8}, "objective: .*causal.* -> .*fim"),
    "source gone": ({"weights": (1, 0)}, r"source b: .*/b \(content \w+\) -> none"),
}


@pytest.mark.parametrize("name", REJECTED_CHANGES)
def test_changed_data_is_rejected_unless_new_segment_is_set(name, make_config):
    changed_keys, message = REJECTED_CHANGES[name]
    history = (build_segment(make_config()),)
    config_segment = build_segment(make_config(**changed_keys))
    with pytest.raises(
        DataError, match=rf"differs from the data it read until step 5:(.*\n)*  {message}(.*\n)+Restore it; or set data"
    ):
        extend_history(history, config_segment, **RESUME_POINT, new_segment=False)
    extended = extend_history(history, config_segment, **RESUME_POINT, new_segment=True)
    assert extended[0] == history[0]
    assert (extended[1].step, extended[1].first_sample) == (5, 30)
    assert (extended[1].spec.first_sample, extended[1].spec.tokens) == (30, 120)
    is_source_change = name == "source gone"
    assert [source.num_consumed > 0 for source in extended[1].spec.sources] == [is_source_change] * len(
        extended[1].spec.sources
    )
    past_config, plan = open_segment(make_config(**changed_keys), extended[0])
    assert past_config.data.seq_len == 4
    assert np.array_equal(
        plan.locate_samples(np.arange(30)), build_fresh_plan(make_config()).locate_samples(np.arange(30))
    ), "the first segment gives other samples"


def test_error_names_a_changed_corpus_or_tokenizer(make_config, tmp_path):
    history = (build_segment(make_config()),)
    write_corpus(tmp_path / "b", seed=7)
    with pytest.raises(DataError, match=r"\n  source b: .*content .* -> .*content"):
        extend_history(history, build_segment(make_config()), **RESUME_POINT, new_segment=False)
    extended = extend_history(history, build_segment(make_config()), **RESUME_POINT, new_segment=True)
    assert [source.num_consumed > 0 for source in extended[1].spec.sources] == [True, False], (
        "source a does not continue, or the new source b does not start at 0"
    )
    manifest = CorpusManifest.load(tmp_path / "b")
    for name in "ab":
        CorpusManifest(
            "uint16", vocab_size=300, tokenizer_sha256="other", source=("random",), shards=manifest.shards
        ).save(tmp_path / name)
    with pytest.raises(DataError, match=r"\n  tokenizer: tokenizer -> other\n"):
        extend_history(history, build_segment(make_config()), **RESUME_POINT, new_segment=False)


def test_sources_with_different_tokenizers_are_rejected(make_config, tmp_path):
    manifest = CorpusManifest.load(tmp_path / "b")
    CorpusManifest("uint16", vocab_size=300, tokenizer_sha256="other", source=("random",), shards=manifest.shards).save(
        tmp_path / "b"
    )
    with pytest.raises(
        DataError, match=r"/b: was prepared with a different tokenizer from .*/a; prepare all sources with"
    ):
        open_sources(make_config())


def test_epochs_are_weighted_by_corpus_size(make_config, tmp_path):
    write_corpus(tmp_path / "b", seed=1, num_tokens=800)
    base = make_config()
    sources = [
        {"name": name, "path": str(tmp_path / name), "epochs": epochs} for name, epochs in (("b", 1.0), ("a", 3.0))
    ]
    data = type(base.data).model_validate({**base.data.model_dump(), "sources": sources})
    new_segment = build_segment(base.model_copy(update={"data": data}))
    assert [source.name for source in new_segment.spec.sources] == ["a", "b"], "sources are not sorted by name"
    assert new_segment.spec.stages[0].quotas == (6000, 4000)  # 3 epochs of 400 tokens, 1 epoch of 800
    tiny = [
        {"name": name, "path": str(tmp_path / name), "epochs": epochs} for name, epochs in (("b", 1e-5), ("a", 3.0))
    ]
    data = type(base.data).model_validate({**base.data.model_dump(), "sources": tiny})
    with pytest.raises(DataError, match=r"b has 6.7e-06 of the samples; the smallest share is 1/10000"):
        build_fresh_plan(base.model_copy(update={"data": data}))


def test_derive_seed_differs_per_source():
    assert derive_seed(5, "") == 5, "a run with one unnamed source does not use the seed of the run"
    assert len({derive_seed(5, name) for name in ("", "a", "b", "ab")}) == 4


def test_history_file_name_is_stable():
    assert HISTORY_FILE == "data.json"
