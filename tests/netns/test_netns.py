"""Nodes with a network between them: a cable pulled in the middle of a step, a node killed, both back; a slow link."""

import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from dist_llm.train.trainer import SLOW_FACTOR
from tests.e2e import commands
from tests.e2e.test_elastic import Job, kill, node, rows, said, wait
from tests.netns.network import Network, missing, network

STEPS = 150
PORT = 29400
HANG_SECONDS = 3
JOB = Job(
    3,
    STEPS,
    (f"run.hang_seconds={HANG_SECONDS}", "data.global_batch=12"),
    {"GLOO_SOCKET_IFNAME": "eth0", "TP_SOCKET_IFNAME": "eth0"},
)

pytestmark = [pytest.mark.netns, pytest.mark.skipif(bool(missing()), reason=missing() or "there are")]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_cut_link_and_a_dead_node_cost_steps_and_nothing_else(corpus: Path, tmp_path: Path) -> None:
    with network(3) as net:
        jobs = [replace(JOB, place=lambda words, number=number: net.on(number, words)) for number in (1, 2, 3)]
        with node("one", f"n1:{PORT}", corpus, tmp_path, jobs[0]) as one:
            with (
                node("two", f"n1:{PORT}", corpus, tmp_path, jobs[1]) as two,
                node("three", f"n1:{PORT}", corpus, tmp_path, jobs[2]) as three,
            ):
                wait(lambda: said(tmp_path, "ranks: 3 (dp_shard 3)") >= 1 and rows(tmp_path) >= 6, tmp_path)
                net.link(3, up=False)
                # Between two steps it may meet a checkpoint, which the watchdog gives so many times as long.
                wait(lambda: said(tmp_path, "ranks: 2 (dp_shard 2)") >= 1, tmp_path, 90 + SLOW_FACTOR * HANG_SECONDS)
                assert said(tmp_path, "does not answer: its process is stopped, or its node is gone") >= 1
                kill(three)
                after = rows(tmp_path)
                wait(lambda: rows(tmp_path) >= after + 3, tmp_path)
                kill(two)
                wait(lambda: said(tmp_path, "ranks: 1 (dp_shard 1)") >= 1, tmp_path)
            net.link(3, up=True)
            with (
                node("two_again", f"n1:{PORT}", corpus, tmp_path, jobs[1]) as two,
                node("three_again", f"n1:{PORT}", corpus, tmp_path, jobs[2]) as three,
            ):
                wait(lambda: said(tmp_path, "ranks: 3 (dp_shard 3)") >= 2, tmp_path)
                assert [each.wait(120) for each in (one, two, three)] == [0, 0, 0]
    straight = tmp_path / "straight"
    straight.mkdir()
    want = commands.metrics(commands.train(straight, corpus, f"run.steps={STEPS}", "data.global_batch=12"))
    got = commands.metrics(tmp_path / "run")
    assert commands.column(got, "step") == list(range(1, STEPS + 1))
    assert commands.column(got, "loss") == pytest.approx(commands.column(want, "loss"), rel=1e-4)


@pytest.mark.timeout(200)
def test_the_check_names_a_slow_link(tmp_path: Path) -> None:
    """100 million bits a second are 0.0125 GB/s, whatever the machine; without them, its links are alike."""
    with network(3) as net:
        net.limit(3, "100mbit")
        done = together(net, 3, ["-m", "dist_llm", "check", "--directory", str(tmp_path)], tmp_path)
    said = done[0].stderr
    (rate,) = re.findall(r"n2: all-reduce with n3 alone reaches ([\d.e-]+) GB/s, the median pair reaches", said)
    assert 0.005 < float(rate) < 0.015, said
    assert [each.returncode for each in done] == [2, 2, 2]


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_run_over_a_slow_link_takes_as_long_as_its_bytes_say(corpus: Path, tmp_path: Path) -> None:
    with network(2) as net:
        net.limit(2, "10mbit")
        begin = time.monotonic()
        arguments = ("-m", "dist_llm", *map(str, commands.train_arguments(corpus, "run.steps=8")))
        done = together(net, 2, arguments, tmp_path)
        seconds, least = time.monotonic() - begin, net.sent(2) * 8 / 10e6
    assert [each.returncode for each in done] == [0, 0], done[0].stderr
    steps = sum(commands.column(commands.metrics(tmp_path / "run"), "step_seconds"))
    assert 0.7 * least < steps < seconds, "most is sent by steps, some by the evaluation at the end"
    assert least < seconds < least + 40, "the start sends little"


def together(net: Network, count: int, words: Sequence[str], cwd: Path) -> list[subprocess.CompletedProcess[str]]:
    """One rank on each node, with nobody to start it again."""
    place = {"WORLD_SIZE": str(count), "LOCAL_RANK": "0", "MASTER_ADDR": "n1", "MASTER_PORT": str(PORT)}
    ranks = [
        subprocess.Popen(
            net.on(node, [sys.executable, *words]),
            cwd=cwd,
            env={**commands.environment(), **JOB.environment, **place, "RANK": str(node - 1)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for node in range(1, count + 1)
    ]
    try:
        said = [each.communicate(timeout=120) for each in ranks]
    finally:
        for each in ranks:
            each.kill()
            each.wait()
    return [
        subprocess.CompletedProcess(each.args, each.returncode, *texts) for each, texts in zip(ranks, said, strict=True)
    ]
