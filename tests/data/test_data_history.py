"""What may change at a resume, what is rejected, and that past segments stay unchanged."""

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
from dist_llm.data.shard import Manifest, ShardWriter
from dist_llm.data.streams import derive_seed, open_sources
from dist_llm.errors import DataError


def write_corpus(directory, seed, tokens=400):
    directory.mkdir(exist_ok=True)
    writer = ShardWriter(directory, "train", "uint16", max_tokens=100)
    for document in np.random.default_rng(seed).integers(0, 300, (tokens // 10, 10)):
        writer.add(document, text_bytes=10)
    Manifest("uint16", 300, "tokenizer", ("random",), {"train": writer.close(), "heldout": ()}).save(directory)
    return str(directory)


@pytest.fixture
def config(tmp_path):
    """Return a function that makes the config of a run on sources a and b, with other keys of `data`."""
    paths = {name: write_corpus(tmp_path / name, seed) for seed, name in enumerate("ab")}

    def make(seed=0, weights=(3, 1), objective=None, **data):
        sources = [
            {"name": name, "path": paths[name], "weight": float(w)} for name, w in zip("ab", weights, strict=True) if w
        ]
        raw = {
            "run": {"dir": "x", "steps": 9, "seed": seed},
            "model": {"d_model": 8, "n_layers": 1, "n_heads": 1},
            "data": {"sources": sources, "seq_len": 4, "global_batch": 6, "prefetch": 0, **data},
            "objective": objective or {},
        }
        return resolve_config(UnresolvedConfig.model_validate(raw), 1, 300)

    return make


def build_segment(config):
    return segment_from_config(config, open_sources(config))


def build_plan_of(config, history):
    return history[-1].build_plan(open_sources(config))


def test_history_round_trip(config):
    history = (build_segment(config(stages=[{"from_tokens": 40, "weights": {"a": 0.0, "b": 1.0}}], skip=[[3, 5]])),)
    assert parse_history(dump_history(history), "data.json") == history
    with pytest.raises(DataError, match=r"^data.json: 0.first: "):
        parse_history(dump_history(history).replace(b'"first"', b'"fist"', 1), "data.json")


def test_resume_with_the_same_data_keeps_the_history(config):
    history = (build_segment(config()),)
    assert extend_history(history, build_segment(config()), 5, 30, 120, new_segment=False) == history


def test_a_corpus_at_a_new_path_is_the_same_corpus(config, tmp_path):
    history = (build_segment(config()),)
    (tmp_path / "a").rename(tmp_path / "c")
    relocated = config()
    first, second = relocated.data.sources
    sources = (first.model_copy(update={"path": str(tmp_path / "c")}), second)
    relocated = relocated.model_copy(update={"data": relocated.data.model_copy(update={"sources": sources})})
    (extended,) = extend_history(history, build_segment(relocated), 5, 30, 120, new_segment=False)
    assert extended.mix.sources[0].path == str(tmp_path / "c")
    assert extended.mix.sources[0].content == history[0].mix.sources[0].content


@pytest.mark.parametrize("change", [{"global_batch": 9}, {"skip": [[32, 40]]}])
def test_a_changed_batch_size_or_skip_renumbers_no_sample(change, config):
    """The next step begins at the next unused sample, and each number still means the same window."""
    history = (build_segment(config()),)
    extended = extend_history(history, build_segment(config(**change)), 5, 30, 120, new_segment=False)
    assert extended[0] == history[0]
    assert (extended[1].step, extended[1].first, extended[1].mix) == (5, 30, history[0].mix)
    before, after = (
        build_plan_of(config(), segments).locate_samples(np.arange(90)) for segments in (history, extended)
    )
    assert np.array_equal(before, after)
    # Reverted before the next step: nothing was trained in between, so nothing of the change remains.
    assert extend_history(extended, build_segment(config()), 5, 30, 120, new_segment=False)[1:] == (
        extended[1].model_copy(update={"global_batch": 6, "skip": ()}),
    )


def test_changed_weights_open_a_segment_and_sources_continue(config):
    history = (build_segment(config()),)
    extended = extend_history(history, build_segment(config(weights=(1, 3))), 5, 30, 120, new_segment=False)
    assert extended[0] == history[0], "earlier segments are not rewritten"
    old, new = build_plan_of(config(), history), build_plan_of(config(weights=(1, 3)), extended)
    source_ids, _ = old.assign(np.arange(30))
    new_source_ids, new_numbers = new.assign(np.arange(30, 30 + 10_000))
    for source, consumed in enumerate(np.bincount(source_ids, minlength=2).tolist()):
        assert extended[1].mix.sources[source].num_consumed == consumed
        rows = new_numbers[new_source_ids == source]
        assert rows.tolist() == list(range(consumed, consumed + (2500, 7500)[source])), "each sample is read once"
    # A second resume with the same config changes nothing.
    assert extend_history(extended, build_segment(config(weights=(1, 3))), 7, 42, 168, new_segment=False) == extended


def test_stages_begin_at_their_from_tokens(config):
    stages = [
        {"from_tokens": 41, "weights": {"a": 0.0, "b": 1.0}},
        {"from_tokens": 80, "weights": {"a": 1.0, "b": 0.0}},
    ]
    plan = build_fresh_plan(config(stages=stages))
    assert [stage.first_sample for stage in plan.stages] == [0, 11, 20], "a sample has 4 tokens"
    source_ids, _ = plan.assign(np.arange(30))
    assert 0 in source_ids[:11]
    assert set(source_ids[11:20]) == {1}
    assert set(source_ids[20:]) == {0}


CHANGES = {
    "seed": ({"seed": 1}, "run.seed: 0 -> 1"),
    "window": ({"seq_len": 5}, "data.seq_len: 4 -> 5"),
    "windows": ({"windows": "packed"}, "data.windows: stream -> packed"),
    "order": ({"order": "random"}, "data.order: shuffle -> random"),
    "objective": ({"objective": {"name": "fim", "fim_rate": 0.25}, "seq_len": 8}, "objective: .*causal.* -> .*fim"),
    "source gone": ({"weights": (1, 0)}, r"source b: .*/b \(content \w+\) -> none"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changed_data_is_rejected_unless_new_segment_is_set(name, config):
    change, message = CHANGES[name]
    history = (build_segment(config()),)
    config_segment = build_segment(config(**change))
    with pytest.raises(
        DataError, match=rf"differs from the data it read until step 5:(.*\n)*  {message}(.*\n)+Restore it; or set data"
    ):
        extend_history(history, config_segment, 5, 30, 120, new_segment=False)
    extended = extend_history(history, config_segment, 5, 30, 120, new_segment=True)
    assert extended[0] == history[0]
    assert (extended[1].step, extended[1].first, extended[1].mix.first, extended[1].mix.tokens) == (5, 30, 30, 120)
    is_source_change = name == "source gone"
    assert [source.num_consumed > 0 for source in extended[1].mix.sources] == [is_source_change] * len(
        extended[1].mix.sources
    )
    past_config, plan = open_segment(config(**change), extended[0])
    assert past_config.data.seq_len == 4
    assert np.array_equal(
        plan.locate_samples(np.arange(30)), build_fresh_plan(config()).locate_samples(np.arange(30))
    ), "earlier samples can be read"


def test_error_names_a_changed_corpus_or_tokenizer(config, tmp_path):
    history = (build_segment(config()),)
    write_corpus(tmp_path / "b", seed=7)
    with pytest.raises(DataError, match=r"\n  source b: .*content .* -> .*content"):
        extend_history(history, build_segment(config()), 5, 30, 120, new_segment=False)
    extended = extend_history(history, build_segment(config()), 5, 30, 120, new_segment=True)
    assert [source.num_consumed > 0 for source in extended[1].mix.sources] == [True, False], (
        "source a continues, and the new b starts"
    )
    manifest = Manifest.load(tmp_path / "b")
    for name in "ab":
        Manifest("uint16", 300, "other", ("random",), manifest.shards).save(tmp_path / name)
    with pytest.raises(DataError, match=r"\n  tokenizer: tokenizer -> other\n"):
        extend_history(history, build_segment(config()), 5, 30, 120, new_segment=False)


def test_sources_with_different_tokenizers_are_rejected(config, tmp_path):
    manifest = Manifest.load(tmp_path / "b")
    Manifest("uint16", 300, "other", ("random",), manifest.shards).save(tmp_path / "b")
    with pytest.raises(DataError, match=r"/b: was prepared with another tokenizer than .*/a; prepare all sources with"):
        open_sources(config())


def test_epochs_are_weighted_by_corpus_size(config, tmp_path):
    write_corpus(tmp_path / "b", seed=1, tokens=800)
    base = config()
    sources = [{"name": name, "path": str(tmp_path / name), "epochs": e} for name, e in (("b", 1.0), ("a", 3.0))]
    data = type(base.data).model_validate({**base.data.model_dump(), "sources": sources})
    new_segment = segment_from_config(*(lambda c: (c, open_sources(c)))(base.model_copy(update={"data": data})))
    assert [source.name for source in new_segment.mix.sources] == ["a", "b"], "in the order of their names"
    assert new_segment.mix.stages[0].quotas == (6000, 4000), "3 x 400 tokens against 800"
    tiny = [{"name": name, "path": str(tmp_path / name), "epochs": e} for name, e in (("b", 1e-5), ("a", 3.0))]
    data = type(base.data).model_validate({**base.data.model_dump(), "sources": tiny})
    with pytest.raises(DataError, match=r"b has 6.7e-06 of the samples; the smallest share is 1/10000"):
        build_fresh_plan(base.model_copy(update={"data": data}))


def test_derive_seed_differs_per_source_and_is_the_run_seed_without_a_name():
    assert derive_seed(5, "") == 5
    assert len({derive_seed(5, name) for name in ("", "a", "b", "ab")}) == 4
    assert HISTORY_FILE == "data.json"
