"""Our reader returns exactly the state of DeepSpeed, and DeepSpeed resumes from checkpoints that our writer wrote."""

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from dist_llm.convert import deepspeed_zero
from dist_llm.convert.deepspeed_files import load_mapped
from dist_llm.convert.deepspeed_layout import PartitionLayout, Shapes, contiguous_layout, per_param_layout
from dist_llm.convert.deepspeed_read import open_deepspeed
from dist_llm.convert.deepspeed_write import write_deepspeed, write_universal
from dist_llm.errors import CheckpointError
from tests.convert.deepspeed_runs import (
    FROZEN,
    DeepSpeedStates,
    NamedTensors,
    Run,
    build_trained_model,
    run_deepspeed,
    run_plain_torch,
)
from tests.laws.worlds import GlooWorld

if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("deepspeed is not installed", allow_module_level=True)

BF16 = {"bf16": {"enabled": True}}
# By name: the ZeRO stage, and what differs from the default run.
RUNS = {
    "0": Run(stage=0),
    "1": Run(stage=1),
    "2": Run(stage=2),
    "3": Run(stage=3),
    "1 even": Run(stage=1, model="even"),
    "1 shared": Run(stage=1, model="shared"),
    "2 shared": Run(stage=2, model="shared"),
    "3 shared": Run(stage=3, model="shared"),
    "2 aligned": Run(stage=2, zero={"parameter_alignment": True}),
    "3 sub-groups": Run(stage=3, zero={"sub_group_size": 100}),
    "1 elastic": Run(stage=1, zero={"elastic_checkpoint": True}),
    "1 bf16": Run(stage=1, config=BF16),
    "1 bf16, fp32 gradients": Run(stage=1, config={**BF16, "data_types": {"grad_accum_dtype": "fp32"}}),
    "2 bf16": Run(stage=2, config=BF16),
    "3 bf16": Run(stage=3, config=BF16),
}


class InMemoryWeights:
    """The `Weights` interface for tensors in memory."""

    def __init__(self, tensors: NamedTensors) -> None:
        self.tensors = tensors
        self.shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}

    def read(self, name: str) -> Tensor:
        return self.tensors[name]


class SavedRun(NamedTuple):
    """A run of DeepSpeed that saved a checkpoint."""

    directory: Path
    state: NamedTensors  # of DeepSpeed, when it saved


class DeepSpeedWorlds:
    """Processes for DeepSpeed, by world size. Only this module uses them, because DeepSpeed changes torch in them."""

    def __init__(self) -> None:
        self.worlds: dict[int, GlooWorld] = {}

    def run(self, run: Run, world_size: int = 2) -> DeepSpeedStates:
        """Return what `run_deepspeed` returns on rank 0 of a world."""
        for other_world_size, world in self.worlds.items():
            world.set_paused(other_world_size != world_size)
        if world_size not in self.worlds or not self.worlds[world_size].is_alive:
            self.worlds[world_size] = GlooWorld(world_size)
        return self.worlds[world_size].run(run_deepspeed, run)[0]


@pytest.fixture(scope="module")
def deepspeed_worlds() -> Iterator[DeepSpeedWorlds]:
    """The worlds in which DeepSpeed runs; stopped after the module."""
    worlds = DeepSpeedWorlds()
    yield worlds
    for world in worlds.worlds.values():
        world.stop()


@pytest.fixture(scope="module")
def saved_run(deepspeed_worlds: DeepSpeedWorlds, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function `save(key of RUNS, world_size=2)` that trains, saves and returns a SavedRun. It caches runs."""
    runs_by_key: dict[tuple[str, int], SavedRun] = {}

    def save(key: str, world_size: int = 2) -> SavedRun:
        if (key, world_size) not in runs_by_key:
            path = tmp_path_factory.mktemp("saved")
            states = deepspeed_worlds.run(replace(RUNS[key], save=path), world_size)
            runs_by_key[key, world_size] = SavedRun(path, states.final)
        return runs_by_key[key, world_size]

    return save


@pytest.fixture
def copy_run(saved_run: Any, tmp_path: Path) -> Any:
    """Return a function (key of RUNS) -> a copy of the directory of that run, which the test may damage."""
    return lambda key: Path(shutil.copytree(saved_run(key).directory, tmp_path / "copy"))


def assert_equal_state(actual: Any, expected: NamedTensors) -> None:
    """Assert that `actual`, an object with the interface `Weights`, has the expected names, shapes and bits."""
    assert sorted(actual.shapes) == sorted(expected)
    for name, tensor in expected.items():
        assert actual.shapes[name] == tuple(tensor.shape), name
        assert torch.equal(actual.read(name), tensor.float()), name


def get_param_groups(model: str) -> list[list[str]]:
    """Return the parameter names of each parameter group; `model` is a key of MODELS."""
    return build_trained_model(model).param_groups


def get_group_settings(model: str) -> list[dict[str, Any]]:
    """Return the settings of each parameter group, such as lr; `model` is a key of MODELS."""
    param_groups = build_trained_model(model).optimizer.param_groups
    return [{key: value for key, value in group.items() if key != "params"} for group in param_groups]


def write_zero(
    directory: Path, tensors: NamedTensors, *, model: str = "odd", stage: int, world_size: int = 2, **options: Any
) -> Path:
    """Write a checkpoint of a ZeRO stage with our writer, and return the directory with its files.

    `model` is a key of MODELS. `options` are further arguments of `write_deepspeed`, at least `step`.
    """
    groups = {"param_groups": get_param_groups(model), "group_settings": get_group_settings(model)}
    return write_deepspeed(
        directory, InMemoryWeights(tensors), stage=stage, world_size=world_size, **{**groups, **options}
    )


def train_with_plain_torch(model: str, num_steps: int) -> NamedTensors:
    """Return the state after `num_steps` steps of plain torch."""
    return list(run_plain_torch(model, num_steps))[-1]


def resolve_tag_directory(directory: Path) -> Path:
    """Return the directory of the newest checkpoint, which the file `latest` names."""
    return directory / (directory / "latest").read_text()


@pytest.mark.parametrize("key", RUNS)
def test_reader_matches_deepspeed_state(key: str, saved_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    directory, expected = saved_run(key)
    monkeypatch.setitem(sys.modules, "deepspeed", None)  # an import of deepspeed would fail
    model = RUNS[key].model
    actual = open_deepspeed(directory, get_param_groups(model) if RUNS[key].stage == 0 else ())
    if model == "shared":
        expected = {**expected, "model.source_embed.tokens.weight": expected["model.embed.tokens.weight"]}
    assert_equal_state(actual, expected)
    assert_equal_state(open_deepspeed(resolve_tag_directory(directory), get_param_groups(model)), expected)


@pytest.mark.slow
def test_reader_handles_round_robin_gradients(deepspeed_worlds: DeepSpeedWorlds, tmp_path: Path) -> None:
    """The moments of plain torch are the reference, because DeepSpeed cannot look up its moments here."""
    _, state = deepspeed_worlds.run(Run(stage=2, save=tmp_path, zero={"round_robin_gradients": True}))
    actual = open_deepspeed(tmp_path)
    for name, tensor in train_with_plain_torch("odd", 3).items():
        torch.testing.assert_close(actual.read(name), tensor, rtol=1e-4, atol=1e-6)
        assert name not in state or torch.equal(actual.read(name), state[name])


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 4])
@pytest.mark.parametrize("key", ["1", "2", "3", "3 shared", "2 aligned"])
def test_reader_handles_other_world_sizes(key: str, world_size: int, saved_run: Any) -> None:
    directory, expected = saved_run(key, world_size)
    if "shared" in key:
        expected = {**expected, "model.source_embed.tokens.weight": expected["model.embed.tokens.weight"]}
    assert_equal_state(open_deepspeed(directory), expected)


def test_some_runs_have_partition_padding() -> None:
    """Without padded partitions, the tests above could not detect wrong padding."""
    model, _, groups = build_trained_model("odd")
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for group in groups:
        layout = contiguous_layout({name: shapes[name] for name in group}, world_size=2)
        assert layout.unpadded_sizes[-1] < layout.sizes[-1]
    assert any(parameter.numel() % 2 for parameter in model.parameters())


def make_layout_without_padding(shapes: Shapes, world_size: int, gaps: Sequence[int] = ()) -> PartitionLayout:
    """Planted bug for stages 1 and 2: partitions without padding."""
    full = contiguous_layout(shapes, world_size=1, gaps=gaps)
    partition_size = -(-full.unpadded_sizes[0] // world_size)
    slices = {
        name: [
            slice(
                max(elements.start - rank * partition_size, 0),
                max(min(elements.stop - rank * partition_size, partition_size), 0),
            )
            for rank in range(world_size)
        ]
        for name, (elements,) in full.slices.items()
    }
    return PartitionLayout(
        slices, [partition_size] * world_size, contiguous_layout(shapes, world_size, gaps).unpadded_sizes
    )


def make_layout_in_reversed_order(layout: Any) -> Any:
    """Planted bug: the partitions contain the parameters in reverse order."""
    return lambda shapes, *rest: layout(dict(reversed(shapes.items())), *rest)


def make_layout_with_padding(shapes: Shapes, world_size: int) -> PartitionLayout:
    """Planted bug for stage 3: the padding of the last shards is read as elements."""
    correct = per_param_layout(shapes, world_size)
    return replace(correct, slices={name: [slices[0]] * world_size for name, slices in correct.slices.items()})


@pytest.mark.parametrize(
    ("key", "function", "faulty"),
    [
        ("1", "contiguous_layout", make_layout_without_padding),
        ("1", "contiguous_layout", make_layout_in_reversed_order(contiguous_layout)),
        ("2 aligned", "contiguous_layout", lambda shapes, world_size, gaps: contiguous_layout(shapes, world_size)),
        ("3", "per_param_layout", make_layout_with_padding),
        ("3", "per_param_layout", make_layout_in_reversed_order(per_param_layout)),
    ],
    ids=["no padding", "order", "no gaps", "shards with padding", "order of shards"],
)
def test_a_planted_bug_is_detected(
    key: str, function: str, faulty: Any, saved_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, expected = saved_run(key)
    assert_equal_state(open_deepspeed(directory), expected)
    monkeypatch.setattr(deepspeed_zero, function, faulty)
    with pytest.raises((AssertionError, RuntimeError, CheckpointError)):
        assert_equal_state(open_deepspeed(directory), expected)


def test_stage_0_without_groups_has_only_weights(saved_run: Any) -> None:
    directory, expected = saved_run("0")
    assert_equal_state(
        open_deepspeed(directory), {name: tensor for name, tensor in expected.items() if name.startswith("model.")}
    )
    param_groups = get_param_groups("odd")
    with pytest.raises(CheckpointError, match="give the parameter groups of this optimizer"):
        open_deepspeed(directory, param_groups[:1])
    with pytest.raises(CheckpointError, match="in the order of the optimizer"):
        open_deepspeed(directory, param_groups[::-1])


def convert_to_universal(tag: Path, output: Path) -> Path:
    """Return a universal checkpoint written by DeepSpeed's converter."""
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    command += ["--input_folder", str(tag), "--output_folder", str(output / tag.name)]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    completed = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)
    assert completed.returncode == 0, completed.stderr
    return output


@pytest.mark.parametrize(
    "key", ["2 shared", *(pytest.param(key, marks=pytest.mark.slow) for key in ("1", "3", "3 shared"))]
)
def test_reader_handles_universal_checkpoints(key: str, saved_run: Any, tmp_path: Path) -> None:
    directory, expected = saved_run(key)
    actual = open_deepspeed(convert_to_universal(resolve_tag_directory(directory), tmp_path))
    if "shared" in key:
        expected = {**expected, "model.source_embed.tokens.weight": expected["model.embed.tokens.weight"]}
    if key == "3 shared":  # the converter omits frozen parameters
        del expected[f"model.{FROZEN['shared']}"]
    assert_equal_state(actual, expected)


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize(
    ("model", "moments"), [("odd", True), ("odd", False), pytest.param("even", True, marks=pytest.mark.slow)]
)
def test_deepspeed_resumes_from_written_checkpoint(
    stage: int, model: str, moments: bool, deepspeed_worlds: DeepSpeedWorlds, tmp_path: Path
) -> None:
    before, after = list(run_plain_torch(model, 4))[-2:]
    if not moments:
        before = {name: tensor for name, tensor in before.items() if name.startswith("model.")}
    write_zero(tmp_path, before, model=model, stage=stage, step=3)
    loaded, end = deepspeed_worlds.run(Run(stage=stage, model=model, steps=range(3, 4), load=tmp_path))
    assert_equal_state(InMemoryWeights(loaded), before)
    if moments:
        assert end.keys() == after.keys()
        for name, tensor in after.items():
            torch.testing.assert_close(end[name], tensor, rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("world_size", [1, 4])
def test_deepspeed_resumes_at_other_world_sizes(
    stage: int, world_size: int, deepspeed_worlds: DeepSpeedWorlds, tmp_path: Path
) -> None:
    before, after = list(run_plain_torch("odd", 4))[-2:]
    write_zero(tmp_path, before, stage=stage, world_size=world_size, step=3)
    loaded, end = deepspeed_worlds.run(Run(stage=stage, steps=range(3, 4), load=tmp_path), world_size)
    assert_equal_state(InMemoryWeights(loaded), before)
    for name, tensor in after.items():
        torch.testing.assert_close(end[name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("stage", [1, 3])
def test_deepspeed_loads_only_weights(stage: int, deepspeed_worlds: DeepSpeedWorlds, tmp_path: Path) -> None:
    before = train_with_plain_torch("odd", 3)
    write_zero(tmp_path, before, stage=stage, step=3)
    loaded, _ = deepspeed_worlds.run(Run(stage=stage, steps=range(0), load=tmp_path, moments=False))
    assert_equal_state(
        InMemoryWeights(loaded), {name: tensor for name, tensor in before.items() if name.startswith("model.")}
    )


def test_deepspeed_loads_sub_groups(deepspeed_worlds: DeepSpeedWorlds, tmp_path: Path) -> None:
    before = train_with_plain_torch("odd", 3)
    write_zero(tmp_path, before, stage=3, step=3, sub_group_size=100)
    loaded, _ = deepspeed_worlds.run(Run(stage=3, steps=range(0), load=tmp_path, zero={"sub_group_size": 100}))
    assert_equal_state(InMemoryWeights(loaded), before)


@pytest.mark.parametrize(("stage", "moments"), [(1, True), (2, True), (3, True), (1, False)])  # stage 3 needs moments
def test_deepspeed_resumes_from_written_universal_checkpoint(
    stage: int, moments: bool, deepspeed_worlds: DeepSpeedWorlds, tmp_path: Path
) -> None:
    before, after = list(run_plain_torch("odd", 4))[-2:]
    if not moments:
        before = {name: tensor for name, tensor in before.items() if name.startswith("model.")}
    write_universal(tmp_path, InMemoryWeights(before), step=3)
    universal = {"checkpoint": {"load_universal": True}}
    loaded, end = deepspeed_worlds.run(Run(stage=stage, steps=range(3, 4), load=tmp_path, config=universal))
    assert_equal_state(InMemoryWeights(loaded), before)
    for name, tensor in after.items() if moments else ():
        torch.testing.assert_close(end[name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_the_deepspeed_converter_reads_written_checkpoints(tmp_path: Path) -> None:
    before = train_with_plain_torch("odd", 3)
    tag = write_zero(tmp_path / "zero", before, stage=1, world_size=4, step=3)
    assert_equal_state(open_deepspeed(convert_to_universal(tag, tmp_path / "universal")), before)


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_reader_reads_written_checkpoints(stage: int, world_size: int, tmp_path: Path) -> None:
    before = train_with_plain_torch("odd", 2)
    write_zero(tmp_path, before, stage=stage, world_size=world_size, step=2, sub_group_size=50, tag="named")
    assert_equal_state(open_deepspeed(tmp_path), before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "named"]


def test_reader_reads_written_universal_checkpoints(tmp_path: Path) -> None:
    before = train_with_plain_torch("odd", 2)
    write_universal(tmp_path, InMemoryWeights(before), step=2)
    assert_equal_state(open_deepspeed(tmp_path), before)


def test_a_shared_parameter_is_written_under_both_names(
    deepspeed_worlds: DeepSpeedWorlds, saved_run: Any, tmp_path: Path
) -> None:
    """A state is written again without its frozen parameters: our writer needs each one in an optimizer group."""
    directory, _ = saved_run("2 shared")
    weights = open_deepspeed(directory)
    state = {name: weights.read(name) for name in weights.shapes}
    shared_params = {"source_embed.tokens.weight": "embed.tokens.weight"}
    with pytest.raises(CheckpointError, match=f"{FROZEN['shared']} is in no parameter group"):
        write_zero(tmp_path, state, model="shared", stage=2, step=3, shared_params=shared_params)
    del state[f"model.{FROZEN['shared']}"]
    write_zero(tmp_path, state, model="shared", stage=2, step=3, shared_params=shared_params)
    assert_equal_state(open_deepspeed(tmp_path), state)


def test_a_missing_rank_is_reported(copy_run: Any) -> None:
    directory = copy_run("1")
    (resolve_tag_directory(directory) / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(CheckpointError, match=r"saved by 2 ranks; the optim states of 1 are missing"):
        open_deepspeed(directory)


def test_a_missing_model_state_of_stage_3_is_reported(copy_run: Any) -> None:
    directory = copy_run("3")
    (resolve_tag_directory(directory) / "zero_pp_rank_1_mp_rank_00_model_states.pt").unlink()
    with pytest.raises(CheckpointError, match=r"saved by 2 ranks; the model states of 1 are missing"):
        open_deepspeed(directory)


def test_an_additional_rank_is_reported(copy_run: Any) -> None:
    tag = resolve_tag_directory(copy_run("2"))
    shutil.copy(tag / "zero_pp_rank_1_mp_rank_00_optim_states.pt", tag / "zero_pp_rank_2_mp_rank_00_optim_states.pt")
    with pytest.raises(CheckpointError, match=r"saved by 2 ranks, but has optim states of 2"):
        open_deepspeed(tag)


@pytest.mark.parametrize("key", ["0", "1", "3"])
def test_a_truncated_file_is_reported(key: str, copy_run: Any) -> None:
    path = sorted(resolve_tag_directory(copy_run(key)).glob("*_states.pt"))[-1]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(CheckpointError, match=f"{path.name}: cannot be read"):
        open_deepspeed(path.parent)


@pytest.mark.parametrize(
    ("key", "partitions_key"), [("1", "single_partition_of_fp32_groups"), ("3", "fp32_flat_groups")]
)
@pytest.mark.parametrize("change", [-1, 7])
def test_a_partition_of_a_wrong_size_is_reported(key: str, partitions_key: str, change: int, copy_run: Any) -> None:
    path = resolve_tag_directory(copy_run(key)) / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    content = load_mapped(path)["optimizer_state_dict"]
    unneeded = ("param_slice_mappings", "loss_scaler", "zero_stage")  # instances of DeepSpeed's classes
    trimmed = {name: value for name, value in content.items() if name not in unneeded}
    partition = trimmed[partitions_key][1]
    trimmed[partitions_key][1] = torch.zeros(partition.numel() + change)
    path.unlink()  # the file is memory-mapped
    torch.save({"optimizer_state_dict": trimmed}, path)
    with pytest.raises(
        CheckpointError, match=rf"rank_1.*weights of parameter group 1 have {partition.numel() + change} elements"
    ):
        open_deepspeed(path.parent)


def test_tensor_parallel_ranks_are_refused(copy_run: Any) -> None:
    tag = resolve_tag_directory(copy_run("1"))
    shutil.copy(tag / "mp_rank_00_model_states.pt", tag / "mp_rank_01_model_states.pt")
    with pytest.raises(CheckpointError, match="tensor, pipeline or expert parallelism"):
        open_deepspeed(tag)


def test_directory_without_a_checkpoint_is_refused(copy_run: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a DeepSpeed checkpoint; give the directory"):
        open_deepspeed(tmp_path)
    directory = copy_run("1")
    resolve_tag_directory(directory).rename(directory / "elsewhere")
    with pytest.raises(CheckpointError, match="names global_step3, which is missing"):
        open_deepspeed(directory)


def make_directory(path: str) -> None:
    """Create a directory; MaliciousObject calls this function."""
    os.mkdir(path)


@dataclass
class MaliciousObject:
    """An object that creates a directory when it is unpickled."""

    function: Any
    path: Path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return self.function, (str(self.path),)


@pytest.mark.parametrize(("function", "is_refused"), [(make_directory, False), (os.mkdir, True)])
def test_reading_a_file_runs_no_code(function: Any, is_refused: bool, tmp_path: Path) -> None:
    content = {"module": {"w": torch.ones(2)}, "param_shapes": None}
    path = tmp_path / "mp_rank_00_model_states.pt"
    torch.save({**content, "client": MaliciousObject(function, tmp_path / "evil")}, path)
    if is_refused:
        with pytest.raises(CheckpointError, match="contains objects that cannot be read without running code"):
            open_deepspeed(tmp_path)
    else:
        assert_equal_state(open_deepspeed(tmp_path), {"model.w": torch.ones(2)})
    assert not (tmp_path / "evil").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "evil").exists(), "plain torch.load does not run the code, so the test cannot detect a failure"


def read_resident_bytes() -> int:
    """Return the resident memory of this process in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_memory_does_not_depend_on_the_checkpoint_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test reads and writes 1 GiB of weights, almost all of which are virtual."""
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
    before = read_resident_bytes()
    write_deepspeed(
        tmp_path, state, stage=3, world_size=2, param_groups=[["big", "small"]], group_settings=[{}], step=0
    )
    weights = open_deepspeed(tmp_path)
    assert weights.read("model.small").tolist() == [0.0, 0.0, 7.0]
    assert read_resident_bytes() - before < 2**27


def test_failed_write_leaves_no_files(tmp_path: Path) -> None:
    tensors = train_with_plain_torch("odd", 1)

    class FailingWeights(InMemoryWeights):
        def read(self, name: str) -> Tensor:
            if name == "model.head.out.weight":
                raise OSError("no space left on device")
            return super().read(name)

    for write in (
        lambda: write_deepspeed(
            tmp_path,
            FailingWeights(tensors),
            stage=2,
            world_size=2,
            param_groups=get_param_groups("odd"),
            group_settings=get_group_settings("odd"),
            step=1,
        ),
        lambda: write_universal(tmp_path, FailingWeights(tensors), step=1),
    ):
        with pytest.raises(OSError, match="no space"):
            write()
        assert list(tmp_path.iterdir()) == []


def test_unsupported_writes_are_refused(tmp_path: Path) -> None:
    tensors = train_with_plain_torch("odd", 1)
    decayed, not_decayed = get_param_groups("odd")
    first = decayed[0]

    def write(tensors: NamedTensors = tensors, stage: int = 2, **options: Any) -> None:
        write_zero(tmp_path, tensors, stage=stage, step=1, **options)

    with pytest.raises(CheckpointError, match=r"stage 0: .* universal"):
        write(stage=0)
    with pytest.raises(CheckpointError, match="2 parameter groups, 1 settings"):
        write(group_settings=get_group_settings("odd")[:1])
    with pytest.raises(CheckpointError, match="twice"):
        write(param_groups=[decayed, [*not_decayed, first]])
    with pytest.raises(CheckpointError, match=f"{first} is in no parameter group"):
        write(param_groups=[decayed[1:], not_decayed])
    with pytest.raises(CheckpointError, match="other is not in the weights"):
        write(param_groups=[decayed, [*not_decayed, "other"]])
    with pytest.raises(CheckpointError, match=f"{first} lacks moments"):
        write({name: tensor for name, tensor in tensors.items() if name != f"optim.{first}.exp_avg"})
    with pytest.raises(CheckpointError, match=r"have taken \[1.0, 9.0\] steps"):
        write({**tensors, f"optim.{first}.step": torch.tensor(9.0)})
    assert list(tmp_path.iterdir()) == []
    write()
    with pytest.raises(CheckpointError, match="exists; give another tag"):
        write()


def test_layouts_match_manual_examples() -> None:
    shapes = {"a": (3,), "b": (2, 2)}
    stage_1 = contiguous_layout(shapes, world_size=2)  # 7 elements, 8 with padding, 4 per rank
    assert stage_1.sizes == [4, 4]
    assert stage_1.unpadded_sizes == [4, 3]
    assert stage_1.slices == {"a": [slice(0, 3), slice(0, 0)], "b": [slice(3, 4), slice(0, 3)]}
    assert contiguous_layout(shapes, world_size=2, gaps=[1, 0]).slices["b"] == [slice(4, 4), slice(0, 4)]
    stage_3 = per_param_layout(shapes, world_size=2)  # 2 and 2 elements per rank; rank 1 has 1 and 2 without padding
    assert stage_3.sizes == [4, 4]
    assert stage_3.slices == {"a": [slice(0, 2), slice(0, 1)], "b": [slice(2, 4), slice(2, 4)]}
