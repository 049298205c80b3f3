"""What a resume may change, what it must not, and that history stays as it was."""

import numpy as np
import pytest

from dist_llm.config.derive import resolve
from dist_llm.config.schema import Config
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


def write(directory, seed, tokens=400):
    directory.mkdir(exist_ok=True)
    writer = ShardWriter(directory, "train", "uint16", max_tokens=100)
    for document in np.random.default_rng(seed).integers(0, 300, (tokens // 10, 10)):
        writer.add(document, text_bytes=10)
    Manifest("uint16", 300, "tokenizer", ("random",), {"train": writer.close(), "heldout": ()}).save(directory)
    return str(directory)


@pytest.fixture
def config(tmp_path):
    """A run on sources a and b; keys of `data` may be changed."""
    paths = {name: write(tmp_path / name, seed) for seed, name in enumerate("ab")}

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
        return resolve(Config.model_validate(raw), 1, 300)

    return make


def segment(config):
    return segment_from_config(config, open_sources(config))


def plan_of(config, history):
    return history[-1].build_plan(open_sources(config))


def test_it_comes_back_from_its_file(config):
    history = (segment(config(stages=[{"from_tokens": 40, "weights": {"a": 0.0, "b": 1.0}}], skip=[[3, 5]])),)
    assert parse_history(dump_history(history), "data.json") == history
    with pytest.raises(DataError, match=r"^data.json: 0.first: "):
        parse_history(dump_history(history).replace(b'"first"', b'"fist"', 1), "data.json")


def test_the_same_data_is_the_same_segment(config):
    history = (segment(config()),)
    assert extend_history(history, segment(config()), 5, 30, 120, new_segment=False) == history


def test_a_corpus_that_moved_is_the_same_corpus(config, tmp_path):
    history = (segment(config()),)
    (tmp_path / "a").rename(tmp_path / "c")
    moved = config()
    first, second = moved.data.sources
    sources = (first.model_copy(update={"path": str(tmp_path / "c")}), second)
    moved = moved.model_copy(update={"data": moved.data.model_copy(update={"sources": sources})})
    (found,) = extend_history(history, segment(moved), 5, 30, 120, new_segment=False)
    assert found.mix.sources[0].path == str(tmp_path / "c")
    assert found.mix.sources[0].content == history[0].mix.sources[0].content


@pytest.mark.parametrize("change", [{"global_batch": 9}, {"skip": [[32, 40]]}])
def test_another_batch_or_skip_changes_no_sample(change, config):
    """The next step begins at the next untrained sample, and every number means what it did."""
    history = (segment(config()),)
    found = extend_history(history, segment(config(**change)), 5, 30, 120, new_segment=False)
    assert found[0] == history[0]
    assert (found[1].step, found[1].first, found[1].mix) == (5, 30, history[0].mix)
    before, after = (plan_of(config(), each).locate_samples(np.arange(90)) for each in (history, found))
    assert np.array_equal(before, after)
    # Taken back at once: nothing was trained in between, and nothing of it stays.
    assert extend_history(found, segment(config()), 5, 30, 120, new_segment=False)[1:] == (
        found[1].model_copy(update={"global_batch": 6, "skip": ()}),
    )


def test_other_weights_open_a_segment_and_each_source_goes_on(config):
    history = (segment(config()),)
    found = extend_history(history, segment(config(weights=(1, 3))), 5, 30, 120, new_segment=False)
    assert found[0] == history[0], "what was is not rewritten"
    old, new = plan_of(config(), history), plan_of(config(weights=(1, 3)), found)
    owners, _ = old.assign(np.arange(30))
    then_owners, then_numbers = new.assign(np.arange(30, 30 + 10_000))
    for source, taken in enumerate(np.bincount(owners, minlength=2).tolist()):
        assert found[1].mix.sources[source].num_consumed == taken
        mine = then_numbers[then_owners == source]
        assert mine.tolist() == list(range(taken, taken + (2500, 7500)[source])), "none twice, none left out"
    # The same again is no change.
    assert extend_history(found, segment(config(weights=(1, 3))), 7, 42, 168, new_segment=False) == found


def test_stages_begin_at_their_tokens(config):
    stages = [
        {"from_tokens": 41, "weights": {"a": 0.0, "b": 1.0}},
        {"from_tokens": 80, "weights": {"a": 1.0, "b": 0.0}},
    ]
    plan = build_fresh_plan(config(stages=stages))
    assert [stage.first for stage in plan.stages] == [0, 11, 20], "of samples of 4 tokens"
    owners, _ = plan.assign(np.arange(30))
    assert 0 in owners[:11]
    assert set(owners[11:20]) == {1}
    assert set(owners[20:]) == {0}


CHANGES = {
    "seed": ({"seed": 1}, "run.seed: 0 -> 1"),
    "window": ({"seq_len": 5}, "data.seq_len: 4 -> 5"),
    "windows": ({"windows": "packed"}, "data.windows: stream -> packed"),
    "order": ({"order": "random"}, "data.order: shuffle -> random"),
    "objective": ({"objective": {"name": "fim", "fim_rate": 0.25}, "seq_len": 8}, "objective: .*causal.* -> .*fim"),
    "source gone": ({"weights": (1, 0)}, r"source b: .*/b \(content \w+\) -> none"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_other_data_is_refused_or_a_new_segment(name, config):
    change, message = CHANGES[name]
    history = (segment(config()),)
    wanted = segment(config(**change))
    with pytest.raises(
        DataError, match=rf"differs from the data it read until step 5:(.*\n)*  {message}(.*\n)+Restore it; or set data"
    ):
        extend_history(history, wanted, 5, 30, 120, new_segment=False)
    found = extend_history(history, wanted, 5, 30, 120, new_segment=True)
    assert found[0] == history[0]
    assert (found[1].step, found[1].first, found[1].mix.first, found[1].mix.tokens) == (5, 30, 30, 120)
    kept = name == "source gone"
    assert [source.num_consumed > 0 for source in found[1].mix.sources] == [kept] * len(found[1].mix.sources)
    then, plan = open_segment(config(**change), found[0])
    assert then.data.seq_len == 4
    assert np.array_equal(
        plan.locate_samples(np.arange(30)), build_fresh_plan(config()).locate_samples(np.arange(30))
    ), "the past can be read"


def test_another_corpus_or_tokenizer_is_named(config, tmp_path):
    history = (segment(config()),)
    write(tmp_path / "b", seed=7)
    with pytest.raises(DataError, match=r"\n  source b: .*content .* -> .*content"):
        extend_history(history, segment(config()), 5, 30, 120, new_segment=False)
    found = extend_history(history, segment(config()), 5, 30, 120, new_segment=True)
    assert [source.num_consumed > 0 for source in found[1].mix.sources] == [True, False], "a goes on, the new b begins"
    manifest = Manifest.load(tmp_path / "b")
    for name in "ab":
        Manifest("uint16", 300, "other", ("random",), manifest.shards).save(tmp_path / name)
    with pytest.raises(DataError, match=r"\n  tokenizer: tokenizer -> other\n"):
        extend_history(history, segment(config()), 5, 30, 120, new_segment=False)


def test_sources_with_different_tokenizers_are_refused(config, tmp_path):
    manifest = Manifest.load(tmp_path / "b")
    Manifest("uint16", 300, "other", ("random",), manifest.shards).save(tmp_path / "b")
    with pytest.raises(DataError, match=r"/b: was prepared with another tokenizer than .*/a; prepare all sources with"):
        open_sources(config())


def test_epochs_weigh_by_size(config, tmp_path):
    write(tmp_path / "b", seed=1, tokens=800)
    base = config()
    sources = [{"name": name, "path": str(tmp_path / name), "epochs": e} for name, e in (("b", 1.0), ("a", 3.0))]
    data = type(base.data).model_validate({**base.data.model_dump(), "sources": sources})
    made = segment_from_config(*(lambda c: (c, open_sources(c)))(base.model_copy(update={"data": data})))
    assert [source.name for source in made.mix.sources] == ["a", "b"], "in the order of their names"
    assert made.mix.stages[0].quotas == (6000, 4000), "3 x 400 tokens against 800"
    tiny = [{"name": name, "path": str(tmp_path / name), "epochs": e} for name, e in (("b", 1e-5), ("a", 3.0))]
    data = type(base.data).model_validate({**base.data.model_dump(), "sources": tiny})
    with pytest.raises(DataError, match=r"b has 6.7e-06 of the samples; the least share is 1/10000"):
        build_fresh_plan(base.model_copy(update={"data": data}))


def test_each_source_has_a_seed_of_its_own_and_the_unnamed_the_runs():
    assert derive_seed(5, "") == 5
    assert len({derive_seed(5, name) for name in ("", "a", "b", "ab")}) == 4
    assert HISTORY_FILE == "data.json"
