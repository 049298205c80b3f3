"""The error of a refused layout lists the nearest valid layouts, and they are valid."""

import itertools
import math

import pytest

from dist_llm.config.check import check, nearest_layouts
from dist_llm.config.derive import AXES
from dist_llm.config.schema import Config
from dist_llm.data.shard import Manifest
from dist_llm.errors import ConfigError
from dist_llm.train.settings import read_config

VOCAB = 300


def make(model=(), data=(), **parallel):
    """A config whose numbers divide by 4, so that most layouts fit."""
    return Config.model_validate(
        {
            "run": {"dir": "runs/x", "steps": 20},
            "model": {"d_model": 32, "n_layers": 4, "n_heads": 8, "n_kv_heads": 4, **dict(model)},
            "data": {"path": "corpus", "seq_len": 16, "global_batch": 16, "micro_batch": 1, **dict(data)},
            "parallel": parallel,
        }
    )


def shown(config, world):
    """The line of layouts in what the user reads, or none."""
    lines = "\n".join(map(str, check(config, world, VOCAB))).splitlines()
    found = [line for line in lines if "valid layouts" in line]
    assert len(found) <= 1
    return found[0].strip() if found else None


@pytest.mark.parametrize(
    ("config", "world", "line"),
    [
        # n_kv_heads 4 over tp 8: half of it fits, and dp_shard, left at -1, takes the rest
        (make(tp=8), 8, "8 ranks: dp_shard 2 x tp 4; dp_shard 4 x tp 2; dp_shard 8"),
        # one axis doubled fills the world: the data axes come first
        (make(dp_shard=4), 8, "8 ranks: dp_shard 8; dp_replicate 2 x dp_shard 4; dp_shard 4 x tp 2"),
        (make(pp=3), 4, "4 ranks: pp 4; pp 2 x dp_shard 2; dp_shard 4"),
        (make(cp=5), 5, None),  # batch, heads and length do not divide by 5, and there are but 4 blocks
        (make(tp=2), 1, "1 rank: dp_shard 1"),
        (make(dp_shard=0), 2, "2 ranks: dp_shard 2; "),
        (make(data={"global_batch": 2}), 8, "8 ranks: dp_shard 2 x tp 4; "),
    ],
    ids=lambda value: "" if isinstance(value, Config) else str(value),
)
def test_the_line_names_the_nearest(config, world, line):
    got = shown(config, world)
    if line is None:
        assert got is None
    else:
        assert got is not None
        assert got.startswith("parallel: valid layouts of " + line)


def test_no_line_where_the_layout_is_not_what_is_wrong():
    assert shown(make(), 8) is None
    assert check(make(model={"n_kv_heads": 3}), 1, VOCAB)
    assert shown(make(model={"n_kv_heads": 3}), 1) is None


def every_layout(world):
    sizes = [size for size in range(1, world + 1) if world % size == 0]
    return [each for each in itertools.product(sizes, repeat=len(AXES)) if math.prod(each) == world]


def changed(layout, config):
    """Axes of another size than the config's; dp_shard -1 is free."""
    wanted = {axis: getattr(config.parallel, axis) for axis in AXES}
    return sum(layout[axis] != size for axis, size in wanted.items() if size > 0)


@pytest.mark.parametrize("world", [1, 2, 3, 6, 8, 12])
@pytest.mark.parametrize(
    "parallel", [{}, {"tp": 8}, {"pp": 8}, {"pp": 2, "tp": 3}, {"cp": 5}, {"dp_shard": 7}], ids=str
)
@pytest.mark.parametrize(
    "parts",
    [{}, {"data": {"global_batch": 6}}, {"model": {"n_kv_heads": 1}}, {"data": {"seq_len": 6, "micro_batch": 2}}],
    ids=str,
)
def test_what_is_named_fits_and_nothing_nearer_does(parts, parallel, world):
    config = make(**parts, **parallel)
    fitting = []
    for sizes in every_layout(world):
        layout = dict(zip(AXES, sizes, strict=True))
        if check(make(**parts, **layout), world, VOCAB) == []:
            fitting.append(layout)
    named = nearest_layouts(config, world, VOCAB)
    assert len(named) == min(3, len(fitting))
    assert all(layout in fitting for layout in named)
    assert [changed(layout, config) for layout in named] == sorted(changed(each, config) for each in fitting)[:3]


def test_the_other_settings_of_the_layout_stay():
    """7 tokens do not divide over tensor ranks; they need not where the sequence is not split."""
    odd = {"data": {"seq_len": 7}}
    assert shown(make(tp=8, **odd), 4) == "parallel: valid layouts of 4 ranks: dp_shard 4; " + (
        "dp_replicate 2 x dp_shard 2; pp 2 x dp_shard 2"
    )
    line = shown(make(tp=8, sequence_parallel=False, **odd), 4)
    assert line == "parallel: valid layouts of 4 ranks: tp 4; dp_shard 2 x tp 2; dp_shard 4"


def test_a_user_reads_it_below_the_problems(tmp_path):
    Manifest("uint16", VOCAB, "", ("here",), {"train": (), "heldout": ()}).save(tmp_path)
    path = tmp_path / "config.yaml"
    path.write_text(
        f"run: {{dir: r, steps: 20}}\nmodel: {{d_model: 32, n_layers: 4, n_heads: 8, n_kv_heads: 4}}\n"
        f"data: {{path: '{tmp_path}', seq_len: 16, global_batch: 16}}\n"
    )
    with pytest.raises(ConfigError) as caught:
        read_config(path, ["parallel.tp=16", "model.n_kv_heads=3"], 8)
    lines = str(caught.value).splitlines()
    assert lines[0] == "4 problems in the config:", "the line of layouts is no problem of its own"
    assert len(lines) == 1 + 4 + 1 + 1
    assert lines[-2] == (
        "  parallel: valid layouts of 8 ranks: dp_shard 8; dp_replicate 2 x dp_shard 4; dp_shard 4 x cp 2"
    )
