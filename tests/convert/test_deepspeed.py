"""DeepSpeed's checkpoints: we read exactly what DeepSpeed holds, and DeepSpeed goes on from what we write."""

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_llm.convert import deepspeed_read
from dist_llm.convert.deepspeed_files import load_mapped
from dist_llm.convert.deepspeed_layout import PartitionLayout, Shapes, contiguous_layout, per_param_layout
from dist_llm.convert.deepspeed_read import open_deepspeed
from dist_llm.convert.deepspeed_write import write_deepspeed, write_universal
from dist_llm.errors import CheckpointError
from tests.convert.deepspeed_runs import FROZEN, Named, Run, deepspeed_run, new, plain
from tests.laws.worlds import GlooWorld

if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("deepspeed is not installed", allow_module_level=True)

BF16 = {"bf16": {"enabled": True}}
RUNS = {
    "0": Run(0),
    "1": Run(1),
    "2": Run(2),
    "3": Run(3),
    "1 even": Run(1, "even"),
    "1 shared": Run(1, "shared"),
    "2 shared": Run(2, "shared"),
    "3 shared": Run(3, "shared"),
    "2 aligned": Run(2, zero={"parameter_alignment": True}),
    "3 sub-groups": Run(3, zero={"sub_group_size": 100}),
    "1 elastic": Run(1, zero={"elastic_checkpoint": True}),
    "1 bf16": Run(1, config=BF16),
    "1 bf16, fp32 gradients": Run(1, config={**BF16, "data_types": {"grad_accum_dtype": "fp32"}}),
    "2 bf16": Run(2, config=BF16),
    "3 bf16": Run(3, config=BF16),
}


class InMemoryWeights:
    """Tensors in memory, as something to be written."""

    def __init__(self, tensors: Named) -> None:
        self.tensors = tensors
        self.shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}

    def read(self, name: str) -> Tensor:
        return self.tensors[name]


class Ranks:
    """Worlds of this module's own: DeepSpeed changes torch in the processes it is used in."""

    def __init__(self) -> None:
        self.worlds: dict[int, GlooWorld] = {}

    def run(self, run: Run, size: int = 2) -> tuple[Named, Named]:
        for other, workers in self.worlds.items():
            workers.pause(other != size)
        if size not in self.worlds or not self.worlds[size].alive:
            self.worlds[size] = GlooWorld(size)
        return self.worlds[size].run(deepspeed_run, run)[0]


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    ranks = Ranks()
    yield ranks
    for workers in ranks.worlds.values():
        workers.stop()


@pytest.fixture(scope="module")
def saved(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """saved(key, world) -> (the directory of a run of RUNS, what DeepSpeed held when it saved); made once."""
    runs_by_key: dict[tuple[str, int], tuple[Path, Named]] = {}

    def save(key: str, size: int = 2) -> tuple[Path, Named]:
        if (key, size) not in runs_by_key:
            path = tmp_path_factory.mktemp("saved")
            runs_by_key[key, size] = path, ranks.run(replace(RUNS[key], save=path), size)[1]
        return runs_by_key[key, size]

    return save


@pytest.fixture
def copy(saved: Any, tmp_path: Path) -> Any:
    """copy(key) -> a copy of a run's directory, to be damaged."""
    return lambda key: Path(shutil.copytree(saved(key)[0], tmp_path / "copy"))


def equal(actual: Any, expected: Named) -> None:
    """The same names, shapes and bits."""
    assert sorted(actual.shapes) == sorted(expected)
    for name, tensor in expected.items():
        assert actual.shapes[name] == tuple(tensor.shape), name
        assert torch.equal(actual.read(name), tensor.float()), name


def groups_of(model: str) -> tuple[list[list[str]], list[dict[str, Any]]]:
    """What the writer asks of an optimizer."""
    _, optimizer, groups = new(model)
    return groups, [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]


def train_plain(model: str, steps: int) -> Named:
    return list(plain(model, steps))[-1]


def tag_of(directory: Path) -> Path:
    return directory / (directory / "latest").read_text()


@pytest.mark.parametrize("key", RUNS)
def test_reader_matches_deepspeed_state(key: str, saved: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    directory, expected = saved(key)
    monkeypatch.setitem(sys.modules, "deepspeed", None)  # an import of it would fail
    model = RUNS[key].model
    actual = open_deepspeed(directory, groups_of(model)[0] if RUNS[key].stage == 0 else ())
    if model == "shared":
        expected = {**expected, "model.source_embed.tokens.weight": expected["model.embed.tokens.weight"]}
    equal(actual, expected)
    equal(open_deepspeed(tag_of(directory), groups_of(model)[0]), expected)


@pytest.mark.slow
def test_reader_handles_round_robin_gradients(ranks: Ranks, tmp_path: Path) -> None:
    """DeepSpeed cannot look moments up there, so those of a plain run are what they should be."""
    _, state = ranks.run(Run(2, save=tmp_path, zero={"round_robin_gradients": True}))
    actual = open_deepspeed(tmp_path)
    for name, tensor in train_plain("odd", 3).items():
        torch.testing.assert_close(actual.read(name), tensor, rtol=1e-4, atol=1e-6)
        assert name not in state or torch.equal(actual.read(name), state[name])


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("key", ["1", "2", "3", "3 shared", "2 aligned"])
def test_we_read_other_world_sizes(key: str, size: int, saved: Any) -> None:
    directory, expected = saved(key, size)
    if "shared" in key:
        expected = {**expected, "model.source_embed.tokens.weight": expected["model.embed.tokens.weight"]}
    equal(open_deepspeed(directory), expected)


def test_these_runs_have_padding() -> None:
    """Else the tests above would not see it ignored."""
    model, _, groups = new("odd")
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for group in groups:
        flat = contiguous_layout({name: shapes[name] for name in group}, 2)
        assert flat.unpadded_sizes[-1] < flat.sizes[-1]
    assert any(parameter.numel() % 2 for parameter in model.parameters())


def without_padding(shapes: Shapes, world: int, gaps: Sequence[int] = ()) -> PartitionLayout:
    """Stages 1 and 2: partitions of as many elements as there are."""
    full = contiguous_layout(shapes, 1, gaps)
    size = -(-full.unpadded_sizes[0] // world)
    slices = {
        name: [
            slice(max(elements.start - rank * size, 0), max(min(elements.stop - rank * size, size), 0))
            for rank in range(world)
        ]
        for name, (elements,) in full.slices.items()
    }
    return PartitionLayout(slices, [size] * world, contiguous_layout(shapes, world, gaps).unpadded_sizes)


def reversed_order(layout: Any) -> Any:
    return lambda shapes, *rest: layout(dict(reversed(shapes.items())), *rest)


def padded_shards(shapes: Shapes, world: int) -> PartitionLayout:
    """Stage 3: the padding of the last shards is read as elements."""
    right = per_param_layout(shapes, world)
    return replace(right, slices={name: [slices[0]] * world for name, slices in right.slices.items()})


@pytest.mark.parametrize(
    ("key", "function", "broken"),
    [
        ("1", "contiguous_layout", without_padding),
        ("1", "contiguous_layout", reversed_order(contiguous_layout)),
        ("2 aligned", "contiguous_layout", lambda shapes, world, gaps: contiguous_layout(shapes, world)),
        ("3", "per_param_layout", padded_shards),
        ("3", "per_param_layout", reversed_order(per_param_layout)),
    ],
    ids=["no padding", "order", "no gaps", "parts with padding", "order of parts"],
)
def test_a_planted_bug_is_noticed(
    key: str, function: str, broken: Any, saved: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, expected = saved(key)
    equal(open_deepspeed(directory), expected)
    monkeypatch.setattr(deepspeed_read, function, broken)
    with pytest.raises((AssertionError, RuntimeError, CheckpointError)):
        equal(open_deepspeed(directory), expected)


def test_stage_0_without_groups_gives_weights_alone(saved: Any) -> None:
    directory, expected = saved("0")
    equal(open_deepspeed(directory), {name: tensor for name, tensor in expected.items() if name.startswith("model.")})
    groups, _ = groups_of("odd")
    with pytest.raises(CheckpointError, match="give its groups"):
        open_deepspeed(directory, groups[:1])
    with pytest.raises(CheckpointError, match="in order"):
        open_deepspeed(directory, groups[::-1])


def converted(tag: Path, output: Path) -> Path:
    """A universal checkpoint, by DeepSpeed's own converter."""
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    command += ["--input_folder", str(tag), "--output_folder", str(output / tag.name)]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == 0, done.stderr
    return output


@pytest.mark.parametrize(
    "key", ["2 shared", *(pytest.param(key, marks=pytest.mark.slow) for key in ("1", "3", "3 shared"))]
)
def test_a_universal_checkpoint(key: str, saved: Any, tmp_path: Path) -> None:
    directory, expected = saved(key)
    actual = open_deepspeed(converted(tag_of(directory), tmp_path))
    if "shared" in key:
        expected = {**expected, "model.source_embed.tokens.weight": expected["model.embed.tokens.weight"]}
    if key == "3 shared":  # the converter leaves frozen parameters out
        del expected[f"model.{FROZEN['shared']}"]
    equal(actual, expected)


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize(
    ("model", "moments"), [("odd", True), ("odd", False), pytest.param("even", True, marks=pytest.mark.slow)]
)
def test_deepspeed_resumes_from_written_checkpoint(
    stage: int, model: str, moments: bool, ranks: Ranks, tmp_path: Path
) -> None:
    before, after = list(plain(model, 4))[-2:]
    if not moments:
        before = {name: tensor for name, tensor in before.items() if name.startswith("model.")}
    groups, settings = groups_of(model)
    write_deepspeed(tmp_path, InMemoryWeights(before), stage, 2, groups=groups, settings=settings, step=3)
    loaded, end = ranks.run(Run(stage, model, steps=range(3, 4), load=tmp_path))
    equal(InMemoryWeights(loaded), before)
    if moments:
        assert end.keys() == after.keys()
        for name, tensor in after.items():
            torch.testing.assert_close(end[name], tensor, rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 4])
def test_deepspeed_resumes_at_other_world_sizes(stage: int, size: int, ranks: Ranks, tmp_path: Path) -> None:
    before, after = list(plain("odd", 4))[-2:]
    groups, settings = groups_of("odd")
    write_deepspeed(tmp_path, InMemoryWeights(before), stage, size, groups=groups, settings=settings, step=3)
    loaded, end = ranks.run(Run(stage, steps=range(3, 4), load=tmp_path), size)
    equal(InMemoryWeights(loaded), before)
    for name, tensor in after.items():
        torch.testing.assert_close(end[name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("stage", [1, 3])
def test_deepspeed_loads_the_weights_alone(stage: int, ranks: Ranks, tmp_path: Path) -> None:
    before = train_plain("odd", 3)
    groups, settings = groups_of("odd")
    write_deepspeed(tmp_path, InMemoryWeights(before), stage, 2, groups=groups, settings=settings, step=3)
    loaded, _ = ranks.run(Run(stage, steps=range(0), load=tmp_path, moments=False))
    equal(InMemoryWeights(loaded), {name: tensor for name, tensor in before.items() if name.startswith("model.")})


def test_deepspeed_loads_sub_groups(ranks: Ranks, tmp_path: Path) -> None:
    before = train_plain("odd", 3)
    groups, settings = groups_of("odd")
    write_deepspeed(
        tmp_path, InMemoryWeights(before), 3, 2, groups=groups, settings=settings, step=3, sub_group_size=100
    )
    loaded, _ = ranks.run(Run(3, steps=range(0), load=tmp_path, zero={"sub_group_size": 100}))
    equal(InMemoryWeights(loaded), before)


@pytest.mark.parametrize(("stage", "moments"), [(1, True), (2, True), (3, True), (1, False)])  # stage 3 wants moments
def test_deepspeed_goes_on_from_our_universal_checkpoint(
    stage: int, moments: bool, ranks: Ranks, tmp_path: Path
) -> None:
    before, after = list(plain("odd", 4))[-2:]
    if not moments:
        before = {name: tensor for name, tensor in before.items() if name.startswith("model.")}
    write_universal(tmp_path, InMemoryWeights(before), step=3)
    universal = {"checkpoint": {"load_universal": True}}
    loaded, end = ranks.run(Run(stage, steps=range(3, 4), load=tmp_path, config=universal))
    equal(InMemoryWeights(loaded), before)
    for name, tensor in after.items() if moments else ():
        torch.testing.assert_close(end[name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_deepspeeds_converter_reads_what_we_write(tmp_path: Path) -> None:
    before = train_plain("odd", 3)
    groups, settings = groups_of("odd")
    tag = write_deepspeed(tmp_path / "zero", InMemoryWeights(before), 1, 4, groups=groups, settings=settings, step=3)
    equal(open_deepspeed(converted(tag, tmp_path / "universal")), before)


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_we_read_what_we_write(stage: int, size: int, tmp_path: Path) -> None:
    before = train_plain("odd", 2)
    groups, settings = groups_of("odd")
    write_deepspeed(
        tmp_path,
        InMemoryWeights(before),
        stage,
        size,
        groups=groups,
        settings=settings,
        step=2,
        sub_group_size=50,
        tag="mine",
    )
    equal(open_deepspeed(tmp_path), before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "mine"]


def test_we_read_the_universal_checkpoint_we_write(tmp_path: Path) -> None:
    before = train_plain("odd", 2)
    write_universal(tmp_path, InMemoryWeights(before), step=2)
    equal(open_deepspeed(tmp_path), before)


def test_a_shared_parameter_is_written_under_both_names(ranks: Ranks, saved: Any, tmp_path: Path) -> None:
    """And what is read can be written: the second name comes with it, frozen parameters have to be taken out."""
    directory, _ = saved("2 shared")
    read = open_deepspeed(directory)
    state = {name: read.read(name) for name in read.shapes}
    groups, settings = groups_of("shared")
    shared = {"source_embed.tokens.weight": "embed.tokens.weight"}
    with pytest.raises(CheckpointError, match=f"{FROZEN['shared']} is in no group"):
        write_deepspeed(tmp_path, InMemoryWeights(state), 2, 2, groups=groups, settings=settings, step=3, shared=shared)
    del state[f"model.{FROZEN['shared']}"]
    write_deepspeed(tmp_path, InMemoryWeights(state), 2, 2, groups=groups, settings=settings, step=3, shared=shared)
    equal(open_deepspeed(tmp_path), state)


def test_a_missing_rank(copy: Any) -> None:
    directory = copy("1")
    (tag_of(directory) / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(CheckpointError, match=r"saved by 2 ranks; the optim states of 1 are missing"):
        open_deepspeed(directory)


def test_a_missing_model_state_of_stage_3(copy: Any) -> None:
    directory = copy("3")
    (tag_of(directory) / "zero_pp_rank_1_mp_rank_00_model_states.pt").unlink()
    with pytest.raises(CheckpointError, match=r"saved by 2 ranks; the model states of 1 are missing"):
        open_deepspeed(directory)


def test_a_rank_too_many(copy: Any) -> None:
    tag = tag_of(copy("2"))
    shutil.copy(tag / "zero_pp_rank_1_mp_rank_00_optim_states.pt", tag / "zero_pp_rank_2_mp_rank_00_optim_states.pt")
    with pytest.raises(CheckpointError, match=r"saved by 2 ranks, but has optim states of 2"):
        open_deepspeed(tag)


@pytest.mark.parametrize("key", ["0", "1", "3"])
def test_a_file_cut_short(key: str, copy: Any) -> None:
    path = sorted(tag_of(copy(key)).glob("*_states.pt"))[-1]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(CheckpointError, match=f"{path.name}: cannot be read"):
        open_deepspeed(path.parent)


@pytest.mark.parametrize(("key", "flats"), [("1", "single_partition_of_fp32_groups"), ("3", "fp32_flat_groups")])
@pytest.mark.parametrize("change", [-1, 7])
def test_a_partition_of_a_wrong_size(key: str, flats: str, change: int, copy: Any) -> None:
    path = tag_of(copy(key)) / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    content = load_mapped(path)["optimizer_state_dict"]
    unneeded = ("param_slice_mappings", "loss_scaler", "zero_stage")  # of DeepSpeed's own classes
    trimmed = {name: value for name, value in content.items() if name not in unneeded}
    flat = trimmed[flats][1]
    trimmed[flats][1] = torch.zeros(flat.numel() + change)
    path.unlink()  # it is mapped
    torch.save({"optimizer_state_dict": trimmed}, path)
    with pytest.raises(CheckpointError, match=rf"rank_1.*weights of group 1 have {flat.numel() + change} elements"):
        open_deepspeed(path.parent)


def test_tensor_parallel_ranks_are_refused(copy: Any) -> None:
    tag = tag_of(copy("1"))
    shutil.copy(tag / "mp_rank_00_model_states.pt", tag / "mp_rank_01_model_states.pt")
    with pytest.raises(CheckpointError, match="tensor, pipeline or expert parallelism"):
        open_deepspeed(tag)


def test_directory_without_a_checkpoint_is_refused(copy: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no DeepSpeed checkpoint; give the directory"):
        open_deepspeed(tmp_path)
    directory = copy("1")
    tag_of(directory).rename(directory / "elsewhere")
    with pytest.raises(CheckpointError, match="names global_step3, which is not there"):
        open_deepspeed(directory)


def make_directory(path: str) -> None:
    os.mkdir(path)


@dataclass
class Evil:
    """Unpickled the usual way, it makes a directory."""

    function: Any
    path: Path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return self.function, (str(self.path),)


@pytest.mark.parametrize(("function", "refused"), [(make_directory, False), (os.mkdir, True)])
def test_no_code_in_a_file_is_run(function: Any, refused: bool, tmp_path: Path) -> None:
    content = {"module": {"w": torch.ones(2)}, "param_shapes": None}
    path = tmp_path / "mp_rank_00_model_states.pt"
    torch.save({**content, "client": Evil(function, tmp_path / "evil")}, path)
    if refused:
        with pytest.raises(CheckpointError, match="holds what cannot be read without running code"):
            open_deepspeed(tmp_path)
    else:
        equal(open_deepspeed(tmp_path), {"model.w": torch.ones(2)})
    assert not (tmp_path / "evil").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "evil").exists(), "the usual way does run it"


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_a_tensor_costs_its_own_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways: 1 GiB of weights, of which hardly any are there."""
    shapes = {"model.big": (2**28,), "model.small": (3,)}
    state = InMemoryWeights({"model.small": torch.arange(3.0)})
    state.shapes = shapes
    monkeypatch.setattr(
        state, "read", lambda name: torch.arange(3.0) if name == "model.small" else torch.zeros(1).expand(2**28)
    )
    monkeypatch.setattr(
        "dist_llm.convert.deepspeed_write._scatter_to_views",
        lambda tensor, views: views[-1].fill_(7) if len(tensor) == 3 else None,
    )
    before = resident_bytes()
    write_deepspeed(tmp_path, state, 3, 2, groups=[["big", "small"]], settings=[{}], step=0)
    weights = open_deepspeed(tmp_path)
    assert weights.read("model.small").tolist() == [0.0, 0.0, 7.0]
    assert resident_bytes() - before < 2**27


def test_failed_write_leaves_no_files(tmp_path: Path) -> None:
    tensors = train_plain("odd", 1)
    groups, settings = groups_of("odd")

    class Breaking(InMemoryWeights):
        def read(self, name: str) -> Tensor:
            if name == "model.head.out.weight":
                raise OSError("no space left on device")
            return super().read(name)

    for write in (
        lambda: write_deepspeed(tmp_path, Breaking(tensors), 2, 2, groups=groups, settings=settings, step=1),
        lambda: write_universal(tmp_path, Breaking(tensors), step=1),
    ):
        with pytest.raises(OSError, match="no space"):
            write()
        assert list(tmp_path.iterdir()) == []


def test_unsupported_writes_are_refused(tmp_path: Path) -> None:
    tensors = train_plain("odd", 1)
    groups, settings = groups_of("odd")
    first = groups[0][0]

    def write(tensors: Named = tensors, stage: int = 2, groups: Any = groups, settings: Any = settings) -> None:
        write_deepspeed(tmp_path, InMemoryWeights(tensors), stage, 2, groups=groups, settings=settings, step=1)

    with pytest.raises(CheckpointError, match=r"stage 0: .* universal"):
        write(stage=0)
    with pytest.raises(CheckpointError, match="2 groups, 1 settings"):
        write(settings=settings[:1])
    with pytest.raises(CheckpointError, match="twice"):
        write(groups=[groups[0], [*groups[1], first]])
    with pytest.raises(CheckpointError, match=f"{first} is in no group"):
        write(groups=[groups[0][1:], groups[1]])
    with pytest.raises(CheckpointError, match="other is not in the weights"):
        write(groups=[groups[0], [*groups[1], "other"]])
    with pytest.raises(CheckpointError, match=f"{first} lacks moments"):
        write({name: tensor for name, tensor in tensors.items() if name != f"optim.{first}.exp_avg"})
    with pytest.raises(CheckpointError, match=r"have taken \[1.0, 9.0\] steps"):
        write({**tensors, f"optim.{first}.step": torch.tensor(9.0)})
    assert list(tmp_path.iterdir()) == []
    write()
    with pytest.raises(CheckpointError, match="is there already"):
        write()


def test_partitions_by_hand() -> None:
    shapes = {"a": (3,), "b": (2, 2)}
    flat = contiguous_layout(shapes, 2)  # 7 elements, 8 with padding, 4 a rank
    assert flat.sizes == [4, 4]
    assert flat.unpadded_sizes == [4, 3]
    assert flat.slices == {"a": [slice(0, 3), slice(0, 0)], "b": [slice(3, 4), slice(0, 3)]}
    assert contiguous_layout(shapes, 2, [1, 0]).slices["b"] == [slice(4, 4), slice(0, 4)]
    third = per_param_layout(shapes, 2)  # 2 and 2 a rank, of which rank 1 has 1 and 2
    assert third.sizes == [4, 4]
    assert third.slices == {"a": [slice(0, 2), slice(0, 1)], "b": [slice(2, 4), slice(2, 4)]}
