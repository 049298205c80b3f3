"""Preflight measures each node and reports each kind of problem with the name of the node."""

import contextlib
import io
import math
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from rich.console import Console

from dist_llm.errors import ConfigError
from dist_llm.launch import node_measurements, preflight
from dist_llm.launch.node_measurements import AllReduceRates
from dist_llm.launch.node_report import NodeReport, diagnose_nodes, format_table
from dist_llm.launch.preflight import PreflightTimeout, SharedFileResult, run_preflight
from dist_llm.launch.world import World
from tests.laws.worlds import get_world

CPU = torch.device("cpu")
BYTES_8_MIB = 8 * 2**20  # LARGE_BYTES on a CPU
VERSIONS = {"torch": "2.11.0", "NCCL": "2.27.5", "driver": "570.86"}


def make_healthy_reports() -> list[NodeReport]:
    """Return reports of four healthy nodes with two ranks each: GPUs within 10 %, links within 30 %."""
    rates = [650, 640, 700, 660, 655, 648, 652, 630]
    links = [40, 40, 30, 31, 41, 42, math.nan, math.nan]
    return [
        NodeReport(
            rank,
            f"node{rank // 2}",
            versions=dict(VERSIONS),
            clock_offset_seconds=0.02 * rank,
            free_gib=900.0,
            sees_shared_file=True,
            matmul_tflops=rates[rank],
            all_reduce_us=31.5,
            all_reduce_gb_per_second=180,
            neighbour_gb_per_second=links[rank],
        )
        for rank in range(8)
    ]


def make_changed_reports(*ranks: int, **values: object) -> list[NodeReport]:
    """Return healthy reports, with other values of these fields in the reports of the ranks."""
    return [replace(report, **values) if report.rank in ranks else report for report in make_healthy_reports()]


def test_healthy_nodes_have_no_problems():
    assert diagnose_nodes(make_healthy_reports()) == []
    single_report = NodeReport(
        0,
        "alone",
        versions=VERSIONS,
        clock_offset_seconds=0.0,
        free_gib=1.0,
        sees_shared_file=True,
        matmul_tflops=0.1,
        all_reduce_us=10.0,
    )
    assert diagnose_nodes([single_report]) == []
    assert diagnose_nodes([NodeReport(rank, f"node{rank}") for rank in range(3)]) == [], (
        "reports without measurements have problems"
    )


@pytest.mark.parametrize(
    ("reports", "problems"),
    [
        (
            make_changed_reports(4, 5, versions={**VERSIONS, "NCCL": "2.21.5"}),
            ["node2: NCCL is 2.21.5, elsewhere 2.27.5"],
        ),
        (make_changed_reports(7, versions={**VERSIONS, "driver": "none"}), ["node3: driver is none, elsewhere 570.86"]),
        (
            make_changed_reports(0, 1, versions={"torch": "2.12.0", "NCCL": "2.27.5"}),
            ["node0: torch is 2.12.0, elsewhere 2.11.0", "node0: driver is unknown, elsewhere 570.86"],
        ),
        (make_changed_reports(2, 3, clock_offset_seconds=5.0), ["node1: its clock is 5.0 s ahead of rank 0's"]),
        (make_changed_reports(5, clock_offset_seconds=-1.2), ["node2: its clock is 1.2 s behind rank 0's"]),
        (
            make_changed_reports(6, matmul_tflops=500.0),
            ["node3: rank 6 reaches 500 matmul TFLOP/s, the median rank 649"],
        ),
        (
            make_changed_reports(2, 3, sees_shared_file=False),
            ["node1: does not see the file that rank 0 wrote to the shared directory"],
        ),
        (
            make_changed_reports(5, neighbour_gb_per_second=14.0),
            ["node2: all-reduce with node3 alone reaches 14 GB/s, the median pair reaches 30"],
        ),
        (
            make_changed_reports(3, failures=("CUDA out of memory",), matmul_tflops=math.nan),
            ["node1: rank 3: CUDA out of memory"],
        ),
    ],
)
def test_each_problem_is_reported_with_its_node(reports, problems):
    reported = diagnose_nodes(reports)
    assert len(reported) == len(problems), reported
    for line, start in zip(reported, problems, strict=True):
        assert line.startswith(start)


def test_each_slow_measurement_is_reported():
    reports = make_changed_reports(2, 3, matmul_tflops=300.0, clock_offset_seconds=9.0)
    assert [line.partition(":")[0] for line in diagnose_nodes(reports)] == ["node1"] * 3


def test_a_slow_rank_is_found_among_missing_measurements():
    reports = make_changed_reports(0, 1, 2, 3, matmul_tflops=math.nan)
    reports[6] = replace(reports[6], matmul_tflops=400.0)
    assert diagnose_nodes(reports) == ["node3: rank 6 reaches 400 matmul TFLOP/s, the median rank 639"]


def test_rank_0_is_the_reference_of_two_nodes():
    reports = make_changed_reports(2, 3, versions={**VERSIONS, "torch": "2.12.0"})[:4]
    assert diagnose_nodes(reports) == ["node1: torch is 2.12.0, elsewhere 2.11.0"]


def test_the_table_has_one_row_per_node():
    console = Console(file=io.StringIO(), width=120)
    reports = make_changed_reports(2, 3, versions={**VERSIONS, "torch": "2.12.0"})
    reports[1] = replace(reports[1], clock_offset_seconds=-3.25, free_gib=12.5, all_reduce_us=77.0)
    console.print(format_table(reports))
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in console.file.getvalue().splitlines()[3:-1]]
    assert [row[:2] for row in rows] == [["node0", "0-1"], ["node1", "2-3"], ["node2", "4-5"], ["node3", "6-7"]]
    assert rows[0][2:] == ["same", "-3,250", "12.50", "640", "77.00", "180", "40.00"]
    assert rows[1][2] != "same"
    assert rows[3][-1] == "-"


def test_interleaved_ranks_are_listed_individually():
    console = Console(file=io.StringIO(), width=120)
    console.print(format_table([NodeReport(rank, "ab"[rank % 2]) for rank in range(4)]))
    assert "0, 2" in console.file.getvalue()
    assert "1, 3" in console.file.getvalue()


def measure_as_two_nodes(directory: Path) -> list[NodeReport]:
    """Measure both ranks of a world as if each ran on a node of its own."""
    rank = dist.get_rank()
    own_world = World(rank=rank, world_size=2, local_rank=0, host=f"node{rank}")
    return preflight.measure_ranks(own_world, directory, PreflightTimeout(own_world, seconds=60))


def test_two_ranks_measure_the_same_reports(tmp_path):
    reports, reports_of_rank_1 = get_world(2).run(measure_as_two_nodes, tmp_path)
    assert list(map(repr, reports)) == list(map(repr, reports_of_rank_1))
    assert [(report.rank, report.host) for report in reports] == [(0, "node0"), (1, "node1")]
    assert [line for line in diagnose_nodes(reports) if "TFLOP/s" not in line] == [], (
        "a node has a problem other than the speed of its core"
    )
    assert reports[0].clock_offset_seconds == 0
    assert 0 < abs(reports[1].clock_offset_seconds) < 0.5
    assert reports[0].versions["torch"] == torch.__version__
    assert {"Python", "CUDA", "NCCL", "driver", "GPU", "dist_llm", "deepspeed", "accelerate"} < set(reports[0].versions)
    for report in reports:
        assert report.sees_shared_file is True
        assert min(report.free_gib, report.matmul_tflops, report.all_reduce_us, report.all_reduce_gb_per_second) > 0
    assert reports[0].neighbour_gb_per_second > 0
    assert math.isnan(reports[1].neighbour_gb_per_second), "the last node has a rate to a neighbour"
    assert list(tmp_path.iterdir()) == []


class FakeGpuMeasurement(NamedTuple):
    """The reports of all ranks, and which devices and backends the collectives used, such as cuda and nccl."""

    reports: list[NodeReport]
    devices_and_backends: set[str]


def measure_with_fake_gpus(directory: Path, gpus: list[str]) -> FakeGpuMeasurement:
    """Measure on this rank, with a fake GPU named `gpus[rank]`; "none" is a rank without a GPU."""
    gpu, devices_and_backends, new_group = gpus[dist.get_rank()], set(), dist.new_group
    device = CPU if gpu == "none" else torch.device("cuda", 0)

    def record_device(device, group):
        devices_and_backends.add(device.type)
        return AllReduceRates(latency_us=1.0, gb_per_second=1.0)

    def create_gloo_group(ranks=None, backend=""):
        devices_and_backends.add(backend)
        return new_group(ranks, backend="gloo")

    with (
        mock.patch.object(preflight, "select_device", return_value=device),
        mock.patch.object(torch.cuda, "set_device"),
        mock.patch.object(preflight, "measure_matmul_tflops", return_value=650.0),
        mock.patch.object(preflight, "collect_versions", return_value={"GPU": gpu}),
        mock.patch.object(preflight, "measure_all_reduce", record_device),
        mock.patch.object(dist, "new_group", create_gloo_group),
    ):
        return FakeGpuMeasurement(measure_as_two_nodes(directory), devices_and_backends)


def test_nccl_is_used_only_if_all_nodes_have_gpus(tmp_path):
    for measurement in get_world(2).run(measure_with_fake_gpus, tmp_path, ["H100", "H100"]):
        assert measurement.devices_and_backends == {"cuda", "nccl"}
        assert diagnose_nodes(measurement.reports) == []
    for measurement in get_world(2).run(measure_with_fake_gpus, tmp_path, ["H100", "none"]):
        assert measurement.devices_and_backends == {"cpu", "gloo"}
        assert diagnose_nodes(measurement.reports) == ["node1: GPU is none, elsewhere H100"]


def measure_shifted_clock(seconds: float) -> float:
    """Measure the clock offset while the clock of rank 1 is `seconds` ahead."""
    original = time.time
    if dist.get_rank() == 1:
        time.time = lambda: original() + seconds
    try:
        return node_measurements.measure_clock_offset()
    finally:
        time.time = original


def test_a_clock_offset_is_measured():
    assert get_world(2).run(measure_shifted_clock, 5.0) == [0, pytest.approx(5, abs=0.5)]
    assert get_world(2).run(measure_shifted_clock, -5.0) == [0, pytest.approx(-5, abs=0.5)]


def try_shared_file_of_rank(directories: list[Path]) -> SharedFileResult:
    """Test whether the ranks share files; rank i uses the directory `directories[i]`."""
    rank = dist.get_rank()
    return preflight.try_shared_file(
        directories[rank], PreflightTimeout(World(rank=rank, world_size=2), seconds=60), wait_seconds=0.5
    )


def test_a_directory_that_is_not_shared_is_detected(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    assert get_world(2).run(try_shared_file_of_rank, [first, first]) == [(True, []), (True, [])]
    assert get_world(2).run(try_shared_file_of_rank, [first, second]) == [(True, []), (False, [])]
    assert get_world(2).run(try_shared_file_of_rank, [first, tmp_path / "nowhere"]) == [(True, []), (False, [])]
    nowhere = tmp_path / "nowhere"
    message = f"--directory {nowhere} cannot be written to: No such file or directory"
    assert get_world(2).run(try_shared_file_of_rank, [nowhere, first]) == [(None, [message]), (None, [])]
    assert [*first.iterdir(), *second.iterdir()] == []


def test_the_shared_file_is_removed_after_a_failure(tmp_path, monkeypatch):
    def raise_error(file: Path, content: str) -> bool:
        assert file.exists()
        raise RuntimeError("the network went away")

    monkeypatch.setattr(preflight, "_has_content", raise_error)
    with pytest.raises(ConfigError, match=r"rank 0 failed in --directory: the network went away"):
        run_preflight(tmp_path, seconds=60, world=World())
    assert list(tmp_path.iterdir()) == []


def test_a_hanging_rank_reports_its_phase(tmp_path, monkeypatch, capsys):
    exit_codes = []
    monkeypatch.setattr(preflight.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(preflight.os, "_exit", exit_codes.append)
    timeout = PreflightTimeout(World(rank=3, world_size=8, local_rank=1, host="node1"), seconds=0.05)
    timeout.phase = "the all-reduce of node1 and node2"
    timeout.problems = ["node2: NCCL is old"]
    timeout.file = tmp_path / "file"
    timeout.file.touch()
    with timeout.running():
        pass
    threading.Event().wait(0.2)
    assert exit_codes == [], "a phase that ended in time aborted the process"
    with timeout.running():
        threading.Event().wait(0.5)
    assert exit_codes == [2]
    assert capsys.readouterr().err.splitlines() == [
        "error: 2 problems found:",
        "  node2: NCCL is old",
        "  node1: rank 3 is still in the all-reduce of node1 and node2 after 0.05 s",
    ]
    assert list(tmp_path.iterdir()) == []


def measure_all_reduce_at_fixed_rate() -> AllReduceRates:
    """Measure latency and rate of an all-reduce that takes 1 s per 8 MiB."""

    def compute_seconds(num_bytes: int, *rest: object) -> float:
        return num_bytes / BYTES_8_MIB

    with mock.patch.object(node_measurements, "_measure_all_reduce_seconds", compute_seconds):
        return node_measurements.measure_all_reduce(CPU, dist.group.WORLD)


@pytest.mark.parametrize(("ranks", "traffic_factor"), [(2, 1.0), (4, 1.5)])
def test_the_bandwidth_is_the_traffic_of_one_link(ranks, traffic_factor):
    """8 MiB in a second: with two ranks each link carries the tensor once, with four ranks 1.5 times."""
    for rates in get_world(ranks).run(measure_all_reduce_at_fixed_rate):
        assert rates.latency_us == pytest.approx(node_measurements.SMALL_BYTES / BYTES_8_MIB * 1e6)
        assert rates.gb_per_second == pytest.approx(traffic_factor * BYTES_8_MIB / 1e9)


def measure_neighbour_with_slow_link(hosts: list[str], slow_ranks: list[int], delay_seconds: float) -> float:
    """Measure the bandwidth between neighbours. All-reduces of the group `slow_ranks` take `delay_seconds` longer."""
    rank, original = dist.get_rank(), dist.all_reduce

    def slow_all_reduce(tensor, group):
        if tensor.numel() > 1 and dist.get_process_group_ranks(group) == slow_ranks:
            time.sleep(delay_seconds)
        return original(tensor, group=group)

    dist.all_reduce = slow_all_reduce
    try:
        own_world = World(rank=rank, world_size=len(hosts), local_rank=0, host=hosts[rank])
        return preflight.measure_neighbour_bandwidth(own_world, hosts, CPU, PreflightTimeout(own_world, seconds=60))
    finally:
        dist.all_reduce = original


def test_neighbor_nodes_are_measured_in_pairs():
    """Three nodes; the last has two ranks and a slow link."""
    first, second, *last = get_world(4).run(
        measure_neighbour_with_slow_link, ["a", "b", "c", "c"], slow_ranks=[1, 2, 3], delay_seconds=0.2
    )
    assert second < BYTES_8_MIB * 4 / 3 / 0.2 / 1e9  # 8 MiB over 3 ranks in at least 0.2 s
    assert first > 0
    assert all(map(math.isnan, last))


def test_a_rank_without_a_matmul_still_reports(tmp_path, monkeypatch, capsys):
    def raise_error(device: torch.device) -> float:
        raise torch.OutOfMemoryError("CUDA out of memory:\n  tried to")

    monkeypatch.setattr(preflight, "measure_matmul_tflops", raise_error)
    with pytest.raises(ConfigError, match=r"1 problem .*\n  here: rank 0: CUDA out of memory: tried to$"):
        run_preflight(tmp_path, seconds=60, world=World(host="here"))
    assert "here" in capsys.readouterr().out, "the table is not printed after an error"


def test_problems_before_a_failed_collective_are_reported(tmp_path, monkeypatch):
    def raise_error(device: torch.device, group: object) -> AllReduceRates:
        raise RuntimeError("NCCL error:\nunhandled system error")

    monkeypatch.setattr(preflight, "measure_all_reduce", raise_error)
    monkeypatch.setattr(preflight, "select_device", lambda world: (_ for _ in ()).throw(ConfigError("no GPU 3")))
    with pytest.raises(ConfigError) as excinfo:
        run_preflight(tmp_path, seconds=60, world=World(host="here"))
    assert str(excinfo.value).splitlines() == [
        "2 problems found:",
        "  here: rank 0: no GPU 3",
        "  here: rank 0 failed in the all-reduce of all ranks: NCCL error: unhandled system error",
    ]


def test_only_rank_0_reports_problems(tmp_path, monkeypatch, capsys):
    pauses = []
    monkeypatch.setattr(preflight.time, "sleep", pauses.append)
    monkeypatch.setattr(preflight, "process_group", lambda *rest, **kwargs: contextlib.nullcontext())
    monkeypatch.setattr(preflight, "measure_ranks", lambda *rest: make_changed_reports(2, 3, clock_offset_seconds=5.0))
    with pytest.raises(ConfigError, match=r"1 problem found:\n  node1: its clock is 5.0 s ahead"):
        run_preflight(tmp_path, seconds=60, world=World(rank=0, world_size=8, local_rank=0, host="node0"))
    assert "node3" in capsys.readouterr().out
    with pytest.raises(SystemExit) as excinfo:
        run_preflight(tmp_path, seconds=60, world=World(rank=5, world_size=8, local_rank=1, host="node2"))
    assert (excinfo.value.code, pauses) == (2, [3])
    printed = capsys.readouterr()
    assert printed.out + printed.err == ""
