"""The error of a refused layout lists the nearest valid layouts."""

import itertools
import math

import pytest

from dist_llm.config.check import check, find_nearest_layouts
from dist_llm.config.derive import AXES
from dist_llm.config.schema import UnresolvedConfig
from dist_llm.data.shard import CorpusManifest
from dist_llm.errors import ConfigError
from dist_llm.training.settings import read_config

TOKENIZER_SIZE = 300  # token ids of the corpus


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


def find_layout_line(config, world_size):
    """Return the line of valid layouts in the error message, or None."""
    lines = "\n".join(map(str, check(config, world_size, TOKENIZER_SIZE))).splitlines()
    layout_lines = [line for line in lines if "valid layouts" in line]
    assert len(layout_lines) <= 1
    return layout_lines[0].strip() if layout_lines else None


@pytest.mark.parametrize(
    ("config", "world_size", "line"),
    [
        # tp 8 does not divide n_kv_heads 4, but tp 4 does. dp_shard is null, so it uses the other ranks.
        (make_config(tp=8), 8, "8 ranks: dp_shard 2 x tp 4; dp_shard 4 x tp 2; dp_shard 8"),
        # dp_shard 4 uses half of the ranks. Each suggestion doubles one axis; the data axes come first.
        (make_config(dp_shard=4), 8, "8 ranks: dp_shard 8; dp_replicate 2 x dp_shard 4; dp_shard 4 x tp 2"),
        (make_config(pp=3), 4, "4 ranks: pp 4; pp 2 x dp_shard 2; dp_shard 4"),
        (make_config(cp=5), 5, None),  # the batch, heads and length are not multiples of 5, and there are only 4 blocks
        (make_config(tp=2), 1, "1 rank: dp_shard 1"),
        (make_config(data={"global_batch": 2}), 8, "8 ranks: dp_shard 2 x tp 4; "),
    ],
    ids=lambda value: "" if isinstance(value, UnresolvedConfig) else str(value),
)
def test_the_error_lists_the_nearest_layouts(config, world_size, line):
    actual = find_layout_line(config, world_size)
    if line is None:
        assert actual is None
    else:
        assert actual is not None
        assert actual.startswith("parallel: valid layouts of " + line)


def test_the_error_lists_no_layouts_if_the_layout_is_valid():
    assert find_layout_line(make_config(), world_size=8) is None
    assert check(make_config(model={"n_kv_heads": 3}), world_size=1, tokenizer_size=TOKENIZER_SIZE)
    assert find_layout_line(make_config(model={"n_kv_heads": 3}), world_size=1) is None


def list_layouts(world_size):
    """Return all tuples of axis sizes whose product is `world_size`."""
    sizes = [size for size in range(1, world_size + 1) if world_size % size == 0]
    return [layout for layout in itertools.product(sizes, repeat=len(AXES)) if math.prod(layout) == world_size]


def count_changed_axes(layout, config):
    """Count the axes whose size differs from that in the config. An axis that is null in the config is not counted."""
    sizes = {axis: getattr(config.parallel, axis) for axis in AXES}
    return sum(layout[axis] != size for axis, size in sizes.items() if size)


@pytest.mark.parametrize("world_size", [1, 2, 3, 6, 8, 12])
@pytest.mark.parametrize(
    "parallel", [{}, {"tp": 8}, {"pp": 8}, {"pp": 2, "tp": 3}, {"cp": 5}, {"dp_shard": 7}], ids=str
)
@pytest.mark.parametrize(
    "sections",
    [{}, {"data": {"global_batch": 6}}, {"model": {"n_kv_heads": 1}}, {"data": {"seq_len": 6, "micro_batch": 2}}],
    ids=str,
)
def test_suggested_layouts_are_valid_and_nearest(sections, parallel, world_size):
    config = make_config(**sections, **parallel)
    valid_layouts = []
    for sizes in list_layouts(world_size):
        layout = dict(zip(AXES, sizes, strict=True))
        if check(make_config(**sections, **layout), world_size, TOKENIZER_SIZE) == []:
            valid_layouts.append(layout)
    suggested = find_nearest_layouts(config, world_size, TOKENIZER_SIZE)
    assert len(suggested) == min(3, len(valid_layouts))
    assert all(layout in valid_layouts for layout in suggested)
    assert [count_changed_axes(layout, config) for layout in suggested] == sorted(
        count_changed_axes(layout, config) for layout in valid_layouts
    )[:3]


def test_other_layout_settings_are_kept():
    """A sequence of 7 tokens does not divide over tp ranks. Without sequence parallelism this is valid."""
    odd_length = {"data": {"seq_len": 7}}
    assert find_layout_line(
        make_config(tp=8, **odd_length), world_size=4
    ) == "parallel: valid layouts of 4 ranks: dp_shard 4; " + ("dp_replicate 2 x dp_shard 2; pp 2 x dp_shard 2")
    line = find_layout_line(make_config(tp=8, sequence_parallel=False, **odd_length), world_size=4)
    assert line == "parallel: valid layouts of 4 ranks: tp 4; dp_shard 2 x tp 2; dp_shard 4"


def test_the_layouts_follow_the_problems(tmp_path):
    CorpusManifest("uint16", TOKENIZER_SIZE, "", ("here",), {"train": (), "heldout": ()}).save(tmp_path)
    path = tmp_path / "config.yaml"
    path.write_text(
        f"run: {{dir: r, steps: 20}}\nmodel: {{d_model: 32, n_layers: 4, n_heads: 8, n_kv_heads: 4}}\n"
        f"data: {{path: '{tmp_path}', seq_len: 16, global_batch: 16}}\n"
    )
    with pytest.raises(ConfigError) as excinfo:
        read_config(path, ["parallel.tp=16", "model.n_kv_heads=3"], world_size=8)
    lines = str(excinfo.value).splitlines()
    assert lines[0] == "4 problems in the config:", "the line of layouts must not count as a problem"
    assert len(lines) == 1 + 4 + 1 + 1
    assert lines[-2] == (
        "  parallel: valid layouts of 8 ranks: dp_shard 8; dp_replicate 2 x dp_shard 4; dp_shard 4 x cp 2"
    )
