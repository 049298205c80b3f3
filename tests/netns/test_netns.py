"""A job on several nodes survives a cut link and a killed node, and the preflight reports a slow link."""

import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from dist_llm.training.callback import LONG_ACTIVITY_TIMEOUT_FACTOR
from tests.e2e import commands
from tests.e2e.elastic_job import Job, count_in_output, count_rows, kill_node, run_node, wait_until
from tests.netns.network import Network, find_obstacle, running_network

STEPS = 150
PORT = 29400
HANG_SECONDS = 3
JOB = Job(
    max_nodes=3,
    steps=STEPS,
    overrides=(f"run.hang_seconds={HANG_SECONDS}", "data.global_batch=12"),
    environment={"GLOO_SOCKET_IFNAME": "eth0", "TP_SOCKET_IFNAME": "eth0"},
)

pytestmark = [pytest.mark.netns, pytest.mark.skipif(bool(find_obstacle()), reason=find_obstacle() or "no obstacle")]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_cut_link_and_a_dead_node_change_no_loss(corpus: Path, tmp_path: Path) -> None:
    with running_network(num_nodes=3) as net:
        jobs = [
            replace(JOB, wrap_command=lambda arguments, node=node: net.wrap_command(node, arguments))
            for node in (1, 2, 3)
        ]
        with run_node("one", f"n1:{PORT}", corpus, tmp_path, jobs[0]) as one:
            with (
                run_node("two", f"n1:{PORT}", corpus, tmp_path, jobs[1]) as two,
                run_node("three", f"n1:{PORT}", corpus, tmp_path, jobs[2]) as three,
            ):
                wait_until(
                    lambda: count_in_output(tmp_path, "ranks: 3 (dp_shard 3)") >= 1 and count_rows(tmp_path) >= 6,
                    tmp_path,
                )
                net.set_link(3, up=False)
                # While the run writes a checkpoint, LONG_ACTIVITY_TIMEOUT_FACTOR multiplies the watchdog's timeout.
                wait_until(
                    lambda: count_in_output(tmp_path, "ranks: 2 (dp_shard 2)") >= 1,
                    tmp_path,
                    timeout_seconds=90 + LONG_ACTIVITY_TIMEOUT_FACTOR * HANG_SECONDS,
                )
                assert count_in_output(tmp_path, "does not answer: its process is stopped, or its node is gone") >= 1
                kill_node(three)
                rows_before = count_rows(tmp_path)
                wait_until(lambda: count_rows(tmp_path) >= rows_before + 3, tmp_path)
                kill_node(two)
                wait_until(lambda: count_in_output(tmp_path, "ranks: 1 (dp_shard 1)") >= 1, tmp_path)
            net.set_link(3, up=True)
            with (
                run_node("two_again", f"n1:{PORT}", corpus, tmp_path, jobs[1]) as two,
                run_node("three_again", f"n1:{PORT}", corpus, tmp_path, jobs[2]) as three,
            ):
                wait_until(lambda: count_in_output(tmp_path, "ranks: 3 (dp_shard 3)") >= 2, tmp_path)
                assert [torchrun.wait(timeout=120) for torchrun in (one, two, three)] == [0, 0, 0]
    reference = tmp_path / "reference"
    reference.mkdir()
    expected = commands.read_step_rows(commands.train(reference, corpus, f"run.steps={STEPS}", "data.global_batch=12"))
    actual = commands.read_step_rows(tmp_path / "run")
    assert commands.get_column(actual, "step") == list(range(1, STEPS + 1))
    assert commands.get_column(actual, "loss") == pytest.approx(commands.get_column(expected, "loss"), rel=1e-4)


@pytest.mark.timeout(200)
def test_preflight_reports_a_slow_link(tmp_path: Path) -> None:
    """The limit of 100 Mbit/s is 0.0125 GB/s; the other links have no limit."""
    with running_network(num_nodes=3) as net:
        net.limit_bandwidth(3, "100mbit")
        completed = run_on_nodes(
            net, num_nodes=3, arguments=["-m", "dist_llm", "check", "--directory", str(tmp_path)], cwd=tmp_path
        )
    errors = completed[0].stderr
    (rate,) = re.findall(r"n2: all-reduce with n3 alone reaches ([\d.e-]+) GB/s, the median pair reaches", errors)
    assert 0.005 < float(rate) < 0.015, errors
    assert [process.returncode for process in completed] == [2, 2, 2]


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_run_over_a_slow_link_is_bound_by_its_bandwidth(corpus: Path, tmp_path: Path) -> None:
    with running_network(num_nodes=2) as net:
        net.limit_bandwidth(2, "10mbit")
        start_time = time.monotonic()
        arguments = ("-m", "dist_llm", *map(str, commands.make_train_arguments(corpus, "run.steps=8")))
        completed = run_on_nodes(net, num_nodes=2, arguments=arguments, cwd=tmp_path)
        run_seconds, min_seconds = time.monotonic() - start_time, net.read_sent_bytes(2) * 8 / 10e6
    assert [process.returncode for process in completed] == [0, 0], completed[0].stderr
    step_seconds = sum(commands.get_column(commands.read_step_rows(tmp_path / "run"), "step_seconds"))
    assert 0.7 * min_seconds < step_seconds < run_seconds, (
        "the steps do not send most bytes and the final evaluation the others"
    )
    assert min_seconds < run_seconds < min_seconds + 40, "the run took less time than its bytes need, or over 40 s more"


def run_on_nodes(
    net: Network, *, num_nodes: int, arguments: Sequence[str], cwd: Path
) -> list[subprocess.CompletedProcess[str]]:
    """Run `python ARGUMENTS` as one rank on each node, without torchrun; return the results by rank."""
    variables = {"WORLD_SIZE": str(num_nodes), "LOCAL_RANK": "0", "MASTER_ADDR": "n1", "MASTER_PORT": str(PORT)}
    ranks = [
        subprocess.Popen(
            net.wrap_command(node, [sys.executable, *arguments]),
            cwd=cwd,
            env={**commands.make_environment(), **JOB.environment, **variables, "RANK": str(node - 1)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for node in range(1, num_nodes + 1)
    ]
    try:
        outputs = [process.communicate(timeout=120) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    return [
        subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)
        for process, (stdout, stderr) in zip(ranks, outputs, strict=True)
    ]
