"""Three nodes, a cable pulled in the middle of a step, a node killed, both back: the run ends, with its losses."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.e2e import commands
from tests.e2e.test_elastic import Job, kill, node, rows, said, wait
from tests.netns.network import missing, network

STEPS = 150
PORT = 29400
JOB = Job(
    3, STEPS, ("run.hang_seconds=3", "data.global_batch=12"), {"GLOO_SOCKET_IFNAME": "eth0", "TP_SOCKET_IFNAME": "eth0"}
)

pytestmark = [pytest.mark.netns, pytest.mark.skipif(bool(missing()), reason=missing() or "there are")]


@pytest.mark.timeout(500)
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
                wait(lambda: said(tmp_path, "ranks: 2 (dp_shard 2)") >= 1, tmp_path)
                assert said(tmp_path, "does not answer: its process is stopped, or its node gone") >= 1
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
