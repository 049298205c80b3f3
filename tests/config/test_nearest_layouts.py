"""The error of a refused layout lists the nearest valid layouts."""

import itertools
import math

import pytest

from dist_llm.config.check import check, find_nearest_layouts
from dist_llm.config.derive import AXES
from dist_llm.config.schema import UnresolvedConfig
from dist_llm.data.shard import Manifest
from dist_llm.errors import ConfigError
from dist_llm.training.settings import read_config

VOCAB = 300


def make_config(model=(), data=(), **parallel):
    """Return a config whose sizes are multiples of 4, so that most layouts are valid."""
    return UnresolvedConfig.model_validate(
        {
            "run": {"dir": "runs/x", "steps": 20},
            "model": {"d_model": 32, "n_layers": 4, "n_heads": 8, "n_kv_heads": 4, **dict(model)},
            "data": {"path": "corpus", "seq_len": 16, "global_batch": 16, "micro_batch": 1, **dict(data)},
            "parallel": parallel,
        }
    )


def layout_line(config, world):
    """Return the line of layouts in the user's error, or None."""
    lines = "\n".join(map(str, check(config, world, VOCAB))).splitlines()
    layout_lines = [line for line in lines if "valid layouts" in line]
    assert len(layout_lines) <= 1
    return layout_lines[0].strip() if layout_lines else None


@pytest.mark.parametrize(
    ("config", "world", "line"),
    [
        # n_kv_heads 4 with tp 8: tp 4 is valid, and dp_shard, which is null, uses the other ranks
        (make_config(tp=8), 8, "8 ranks: dp_shard 2 x tp 4; dp_shard 4 x tp 2; dp_shard 8"),
        # doubling one axis uses all ranks; the data axes come first
        (make_config(dp_shard=4), 8, "8 ranks: dp_shard 8; dp_replicate 2 x dp_shard 4; dp_shard 4 x tp 2"),
        (make_config(pp=3), 4, "4 ranks: pp 4; pp 2 x dp_shard 2; dp_shard 4"),
        (make_config(cp=5), 5, None),  # batch, heads and length are not multiples of 5, and there are only 4 blocks
        (make_config(tp=2), 1, "1 rank: dp_shard 1"),
        (make_config(data={"global_batch": 2}), 8, "8 ranks: dp_shard 2 x tp 4; "),
    ],
    ids=lambda value: "" if isinstance(value, UnresolvedConfig) else str(value),
)
def test_the_line_lists_the_nearest_layouts(config, world, line):
    actual = layout_line(config, world)
    if line is None:
        assert actual is None
    else:
        assert actual is not None
        assert actual.startswith("parallel: valid layouts of " + line)


def test_no_line_if_the_layout_is_valid():
    assert layout_line(make_config(), 8) is None
    assert check(make_config(model={"n_kv_heads": 3}), 1, VOCAB)
    assert layout_line(make_config(model={"n_kv_heads": 3}), 1) is None


def all_layouts(world):
    sizes = [size for size in range(1, world + 1) if world % size == 0]
    return [each for each in itertools.product(sizes, repeat=len(AXES)) if math.prod(each) == world]


def count_changed_axes(layout, config):
    """Count the axes of another size than in the config; dp_shard -1 is not counted."""
    sizes = {axis: getattr(config.parallel, axis) for axis in AXES}
    return sum(layout[axis] != size for axis, size in sizes.items() if size)


@pytest.mark.parametrize("world", [1, 2, 3, 6, 8, 12])
@pytest.mark.parametrize(
    "parallel", [{}, {"tp": 8}, {"pp": 8}, {"pp": 2, "tp": 3}, {"cp": 5}, {"dp_shard": 7}], ids=str
)
@pytest.mark.parametrize(
    "sections",
    [{}, {"data": {"global_batch": 6}}, {"model": {"n_kv_heads": 1}}, {"data": {"seq_len": 6, "micro_batch": 2}}],
    ids=str,
)
def test_suggested_layouts_are_valid_and_nearest(sections, parallel, world):
    config = make_config(**sections, **parallel)
    fitting = []
    for sizes in all_layouts(world):
        layout = dict(zip(AXES, sizes, strict=True))
        if check(make_config(**sections, **layout), world, VOCAB) == []:
            fitting.append(layout)
    suggested = find_nearest_layouts(config, world, VOCAB)
    assert len(suggested) == min(3, len(fitting))
    assert all(layout in fitting for layout in suggested)
    assert [count_changed_axes(layout, config) for layout in suggested] == sorted(
        count_changed_axes(each, config) for each in fitting
    )[:3]


def test_other_layout_settings_are_kept():
    """7 tokens do not divide over tensor ranks, which is valid without sequence parallelism."""
    odd_length = {"data": {"seq_len": 7}}
    assert layout_line(make_config(tp=8, **odd_length), 4) == "parallel: valid layouts of 4 ranks: dp_shard 4; " + (
        "dp_replicate 2 x dp_shard 2; pp 2 x dp_shard 2"
    )
    line = layout_line(make_config(tp=8, sequence_parallel=False, **odd_length), 4)
    assert line == "parallel: valid layouts of 4 ranks: tp 4; dp_shard 2 x tp 2; dp_shard 4"


def test_the_line_follows_the_problems(tmp_path):
    Manifest("uint16", VOCAB, "", ("here",), {"train": (), "heldout": ()}).save(tmp_path)
    path = tmp_path / "config.yaml"
    path.write_text(
        f"run: {{dir: r, steps: 20}}\nmodel: {{d_model: 32, n_layers: 4, n_heads: 8, n_kv_heads: 4}}\n"
        f"data: {{path: '{tmp_path}', seq_len: 16, global_batch: 16}}\n"
    )
    with pytest.raises(ConfigError) as excinfo:
        read_config(path, ["parallel.tp=16", "model.n_kv_heads=3"], 8)
    lines = str(excinfo.value).splitlines()
    assert lines[0] == "4 problems in the config:", "the line of layouts is not counted as a problem"
    assert len(lines) == 1 + 4 + 1 + 1
    assert lines[-2] == (
        "  parallel: valid layouts of 8 ranks: dp_shard 8; dp_replicate 2 x dp_shard 4; dp_shard 4 x cp 2"
    )
