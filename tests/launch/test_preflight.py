"""What `check` measures, and that each thing that can be wrong with a node is found and named, and nothing else."""

import contextlib
import io
import math
import threading
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from rich.console import Console

from dist_llm.errors import ConfigError
from dist_llm.launch import preflight
from dist_llm.launch.node_report import NodeReport, diagnose_nodes, format_table
from dist_llm.launch.preflight import PreflightTimeout, check
from dist_llm.launch.world import World
from tests.laws.worlds import world

CPU = torch.device("cpu")
VERSIONS = {"torch": "2.11.0", "NCCL": "2.27.5", "driver": "570.86"}


def sound() -> list[NodeReport]:
    """Four nodes of two ranks, as alike as machines are: GPUs within 10 %, links within 30 %."""
    rates = [650, 640, 700, 660, 655, 648, 652, 630]
    links = [40, 40, 30, 31, 41, 42, math.nan, math.nan]
    return [
        NodeReport(
            rank, f"node{rank // 2}", dict(VERSIONS), 0.02 * rank, 900.0, True, rates[rank], 31.5, 180, links[rank]
        )
        for rank in range(8)
    ]


def changed(*ranks: int, **values: object) -> list[NodeReport]:
    return [replace(each, **values) if each.rank in ranks else each for each in sound()]


def test_sound_facts_have_no_problems():
    assert diagnose_nodes(sound()) == []
    assert diagnose_nodes([NodeReport(0, "alone", VERSIONS, 0.0, 1.0, True, 0.1, 10.0)]) == []
    assert diagnose_nodes([NodeReport(rank, f"node{rank}") for rank in range(3)]) == [], "nothing was measured"


@pytest.mark.parametrize(
    ("reports", "problems"),
    [
        (changed(4, 5, versions={**VERSIONS, "NCCL": "2.21.5"}), ["node2: NCCL is 2.21.5, elsewhere 2.27.5"]),
        (changed(7, versions={**VERSIONS, "driver": "none"}), ["node3: driver is none, elsewhere 570.86"]),
        (
            changed(0, 1, versions={"torch": "2.12.0", "NCCL": "2.27.5"}),
            ["node0: torch is 2.12.0, elsewhere 2.11.0", "node0: driver is unknown, elsewhere 570.86"],
        ),
        (changed(2, 3, clock_seconds=5.0), ["node1: its clock is 5.0 s ahead of rank 0's"]),
        (changed(5, clock_seconds=-1.2), ["node2: its clock is 1.2 s behind rank 0's"]),
        (changed(6, matmul_tflops=500.0), ["node3: rank 6 reaches 500 matmul TFLOP/s, the median rank 649"]),
        (changed(2, 3, sees_shared_file=False), ["node1: does not see the file that rank 0 wrote to --directory"]),
        (
            changed(5, neighbour_gb_per_second=14.0),
            ["node2: all-reduce with node3 alone reaches 14 GB/s, the median pair reaches 30"],
        ),
        (
            changed(3, failures=("CUDA out of memory",), matmul_tflops=math.nan),
            ["node1: rank 3: CUDA out of memory"],
        ),
    ],
)
def test_each_problem_is_found_and_its_node_named(reports, problems):
    found = diagnose_nodes(reports)
    assert len(found) == len(problems), found
    for line, start in zip(found, problems, strict=True):
        assert line.startswith(start)


def test_two_slow_things_are_two_lines():
    reports = changed(2, 3, matmul_tflops=300.0, clock_seconds=9.0)
    assert [line.partition(":")[0] for line in diagnose_nodes(reports)] == ["node1"] * 3


def test_a_slow_rank_is_found_where_half_of_the_others_have_no_rate():
    reports = changed(0, 1, 2, 3, matmul_tflops=math.nan)
    reports[6] = replace(reports[6], matmul_tflops=400.0)
    assert diagnose_nodes(reports) == ["node3: rank 6 reaches 400 matmul TFLOP/s, the median rank 639"]


def test_of_two_nodes_that_differ_rank_0_is_the_norm():
    reports = changed(2, 3, versions={**VERSIONS, "torch": "2.12.0"})[:4]
    assert diagnose_nodes(reports) == ["node1: torch is 2.12.0, elsewhere 2.11.0"]


def test_the_table_has_a_row_per_node_with_the_worst_of_its_ranks():
    console = Console(file=io.StringIO(), width=120)
    reports = changed(2, 3, versions={**VERSIONS, "torch": "2.12.0"})
    reports[1] = replace(reports[1], clock_seconds=-3.25, free_gib=12.5, all_reduce_us=77.0)
    console.print(format_table(reports))
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in console.file.getvalue().splitlines()[3:-1]]
    assert [row[:2] for row in rows] == [["node0", "0-1"], ["node1", "2-3"], ["node2", "4-5"], ["node3", "6-7"]]
    assert rows[0][2:] == ["same", "-3,250", "12.50", "640", "77.00", "180", "40.00"]
    assert rows[1][2] != "same"
    assert rows[3][-1] == "-"


def test_interleaved_ranks_are_shown_one_by_one():
    console = Console(file=io.StringIO(), width=120)
    console.print(format_table([NodeReport(rank, "ab"[rank % 2]) for rank in range(4)]))
    assert "0, 2" in console.file.getvalue()
    assert "1, 3" in console.file.getvalue()


def of_two_nodes(directory: Path) -> list[NodeReport]:
    rank = dist.get_rank()
    here = World(rank, 2, 0, f"node{rank}")
    return preflight.measure(here, directory, PreflightTimeout(here, 60))


def test_two_ranks_measure_and_agree(tmp_path):
    reports, others = world(2).run(of_two_nodes, tmp_path)
    assert [repr(each) for each in reports] == [repr(each) for each in others]
    assert [(each.rank, each.host) for each in reports] == [(0, "node0"), (1, "node1")]
    assert [line for line in diagnose_nodes(reports) if "TFLOP/s" not in line] == [], (
        "two cores may be of different speed now"
    )
    assert reports[0].clock_seconds == 0
    assert 0 < abs(reports[1].clock_seconds) < 0.5
    assert reports[0].versions["torch"] == torch.__version__
    assert {"Python", "CUDA", "NCCL", "driver", "GPU", "dist_llm", "deepspeed", "accelerate"} < set(reports[0].versions)
    for each in reports:
        assert each.sees_shared_file is True
        assert min(each.free_gib, each.matmul_tflops, each.all_reduce_us, each.all_reduce_gb_per_second) > 0
    assert reports[0].neighbour_gb_per_second > 0
    assert math.isnan(reports[1].neighbour_gb_per_second), "the last node has no next"
    assert list(tmp_path.iterdir()) == []


def devices_used(directory: Path, gpus: list[str]) -> tuple[list[NodeReport], set[str]]:
    """With GPUs that are made up, by rank: the reports, and what was to be reduced where."""
    gpu, used, new_group = gpus[dist.get_rank()], set(), dist.new_group
    device = CPU if gpu == "none" else torch.device("cuda", 0)

    def all_reduce(device, group):
        used.add(device.type)
        return 1.0, 1.0

    def group_of(ranks=None, backend=""):
        used.add(backend)
        return new_group(ranks, backend="gloo")

    with (
        mock.patch.object(preflight, "device_of", return_value=device),
        mock.patch.object(torch.cuda, "set_device"),
        mock.patch.object(preflight, "matmul_tflops", return_value=650.0),
        mock.patch.object(preflight, "versions", return_value={"GPU": gpu}),
        mock.patch.object(preflight, "all_reduce", all_reduce),
        mock.patch.object(dist, "new_group", group_of),
    ):
        return of_two_nodes(directory), used


def test_nccl_is_asked_only_where_all_nodes_have_gpus(tmp_path):
    for reports, used in world(2).run(devices_used, tmp_path, ["H100", "H100"]):
        assert used == {"cuda", "nccl"}
        assert diagnose_nodes(reports) == []
    for reports, used in world(2).run(devices_used, tmp_path, ["H100", "none"]):
        assert used == {"cpu", "gloo"}
        assert diagnose_nodes(reports) == ["node1: GPU is none, elsewhere H100"]


def clock_of_a_late_node(seconds: float) -> float:
    real = time.time
    if dist.get_rank() == 1:
        time.time = lambda: real() + seconds
    try:
        return preflight.clock_seconds()
    finally:
        time.time = real


def test_a_clock_that_is_off_is_measured():
    assert world(2).run(clock_of_a_late_node, 5.0) == [0, pytest.approx(5, abs=0.5)]
    assert world(2).run(clock_of_a_late_node, -5.0) == [0, pytest.approx(-5, abs=0.5)]


def sight(directories: list[Path]) -> tuple[bool | None, list[str]]:
    rank = dist.get_rank()
    return preflight.check_shared_file(directories[rank], PreflightTimeout(World(rank, 2), 60), wait_seconds=0.5)


def test_a_directory_that_is_not_shared_is_seen_and_left_as_it_was(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    assert world(2).run(sight, [one, one]) == [(True, []), (True, [])]
    assert world(2).run(sight, [one, two]) == [(True, []), (False, [])]
    assert world(2).run(sight, [one, tmp_path / "nowhere"]) == [(True, []), (False, [])]
    nowhere = tmp_path / "nowhere"
    cannot = f"--directory {nowhere} cannot be written to: No such file or directory"
    assert world(2).run(sight, [nowhere, one]) == [(None, [cannot]), (None, [])]
    assert [*one.iterdir(), *two.iterdir()] == []


def test_the_file_is_removed_when_something_fails(tmp_path, monkeypatch):
    def broken(file: Path, content: str) -> bool:
        assert file.exists()
        raise RuntimeError("the network went away")

    monkeypatch.setattr(preflight, "_has_content", broken)
    with pytest.raises(ConfigError, match=r"rank 0 failed in --directory: the network went away"):
        check(tmp_path, 60, World())
    assert list(tmp_path.iterdir()) == []


def test_a_hanging_rank_says_where_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    ends = []
    monkeypatch.setattr(preflight.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(preflight.os, "_exit", ends.append)
    timeout = PreflightTimeout(World(3, 8, 1, "node1"), 0.05)
    timeout.phase, timeout.problems, timeout.file = (
        "the all-reduce of node1 and node2",
        ["node2: NCCL is old"],
        tmp_path / "file",
    )
    timeout.file.touch()
    with timeout.running():
        pass
    threading.Event().wait(0.2)
    assert ends == [], "it was done in time"
    with timeout.running():
        threading.Event().wait(0.5)
    assert ends == [2]
    assert capsys.readouterr().err.splitlines() == [
        "error: 2 problems found:",
        "  node2: NCCL is old",
        "  node1: rank 3 is still in the all-reduce of node1 and node2 after 0.05 s",
    ]
    assert list(tmp_path.iterdir()) == []


def rate_of_a_second() -> tuple[float, float]:
    preflight._all_reduce_seconds, real = (lambda size, *rest: size / 2**23), preflight._all_reduce_seconds
    try:
        return preflight.all_reduce(CPU, dist.group.WORLD)
    finally:
        preflight._all_reduce_seconds = real


@pytest.mark.parametrize(("ranks", "share"), [(2, 1.0), (4, 1.5)])
def test_the_rate_is_what_a_link_carries(ranks, share):
    """8 MiB in a second: over two ranks each link carries the tensor once, over four 1.5 times."""
    for latency, rate in world(ranks).run(rate_of_a_second):
        assert latency == pytest.approx(4 / 2**23 * 1e6)
        assert rate == pytest.approx(share * 2**23 / 1e9)


def rates_with_a_slow_link(hosts: list[str], slow: list[int], seconds: float) -> float:
    rank, real = dist.get_rank(), dist.all_reduce

    def all_reduce(tensor, group):
        if tensor.numel() > 1 and dist.get_process_group_ranks(group) == slow:
            time.sleep(seconds)
        return real(tensor, group=group)

    dist.all_reduce = all_reduce
    try:
        here = World(rank, len(hosts), 0, hosts[rank])
        return preflight.neighbour_bandwidth(here, hosts, CPU, PreflightTimeout(here, 60))
    finally:
        dist.all_reduce = real


def test_neighbours_are_measured_alone():
    """Three nodes, the last of two ranks, whose link is slow."""
    first, second, *last = world(4).run(rates_with_a_slow_link, ["a", "b", "c", "c"], [1, 2, 3], 0.2)
    assert second < 2**23 * 4 / 3 / 0.2 / 1e9
    assert first > 0
    assert all(map(math.isnan, last))


def test_a_rank_that_cannot_multiply_still_reports(tmp_path, monkeypatch, capsys):
    def broken(device: torch.device) -> float:
        raise torch.OutOfMemoryError("CUDA out of memory:\n  tried to")

    monkeypatch.setattr(preflight, "matmul_tflops", broken)
    with pytest.raises(ConfigError, match=r"1 problem .*\n  here: rank 0: CUDA out of memory: tried to$"):
        check(tmp_path, 60, World(host="here"))
    assert "here" in capsys.readouterr().out, "the table comes all the same"


def test_what_was_found_before_a_collective_failed_is_said_too(tmp_path, monkeypatch):
    def broken(device: torch.device, group: object) -> tuple[float, float]:
        raise RuntimeError("NCCL error:\nunhandled system error")

    monkeypatch.setattr(preflight, "all_reduce", broken)
    monkeypatch.setattr(preflight, "device_of", lambda world: (_ for _ in ()).throw(ConfigError("no GPU 3")))
    with pytest.raises(ConfigError) as caught:
        check(tmp_path, 60, World(host="here"))
    assert str(caught.value).splitlines() == [
        "2 problems found:",
        "  here: rank 0: no GPU 3",
        "  here: rank 0 failed in the all-reduce of all ranks: NCCL error: unhandled system error",
    ]


def test_rank_0_speaks_and_the_others_end_with_its_exit_code(tmp_path, monkeypatch, capsys):
    pauses = []
    monkeypatch.setattr(preflight.time, "sleep", pauses.append)
    monkeypatch.setattr(preflight, "process_group", lambda *rest, **more: contextlib.nullcontext())
    monkeypatch.setattr(preflight, "measure", lambda *rest: changed(2, 3, clock_seconds=5.0))
    with pytest.raises(ConfigError, match=r"1 problem found:\n  node1: its clock is 5.0 s ahead"):
        check(tmp_path, 60, World(0, 8, 0, "node0"))
    assert "node3" in capsys.readouterr().out
    with pytest.raises(SystemExit) as caught:
        check(tmp_path, 60, World(5, 8, 1, "node2"))
    assert (caught.value.code, pauses) == (2, [3])
    printed = capsys.readouterr()
    assert printed.out + printed.err == ""
