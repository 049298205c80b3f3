"""If a node dies and comes back, torchrun continues with the remaining nodes, and the run reads the same batches."""

from pathlib import Path

import pytest

from . import commands
from .elastic_job import Job, count_in_output, count_rows, is_listening, run_node, wait_until

STEPS = 80
TOLERANCE = 1e-4  # relative; the reference run has another number of ranks


JOB = Job(max_nodes=2, steps=STEPS, overrides=("run.hang_seconds=20",))


@pytest.mark.slow  # tests/netns has the same test with separate network namespaces
@pytest.mark.timeout(400)
def test_a_job_survives_a_node_that_dies_and_comes_back(corpus: Path, tmp_path: Path) -> None:
    port = commands.find_free_port()
    with run_node("first", f"localhost:{port}", corpus, tmp_path, JOB) as first:
        wait_until(lambda: is_listening(port), tmp_path)  # the node of the rendezvous must outlive the other
        with run_node("second", f"localhost:{port}", corpus, tmp_path, JOB):
            wait_until(lambda: count_rows(tmp_path) >= 4, tmp_path)
            assert count_in_output(tmp_path, "ranks: 2 (dp_shard 2)") == 1
        # All processes of the second node are killed.
        rows_before = count_rows(tmp_path)
        wait_until(
            lambda: count_rows(tmp_path) >= rows_before + 2 and count_in_output(tmp_path, "ranks: 1 (dp_shard 1)") >= 1,
            tmp_path,
        )
        with run_node("again", f"localhost:{port}", corpus, tmp_path, JOB) as again:
            wait_until(lambda: count_in_output(tmp_path, "ranks: 2 (dp_shard 2)") >= 2, tmp_path)
            assert first.wait(timeout=120) == 0
            assert again.wait(timeout=30) == 0
    reference = tmp_path / "reference"
    reference.mkdir()
    actual = commands.read_step_rows(tmp_path / "run")
    expected = commands.read_step_rows(commands.train(reference, corpus, f"run.steps={STEPS}"))
    assert commands.get_column(actual, "step") == list(range(1, STEPS + 1))
    assert commands.get_column(actual, "loss") == pytest.approx(commands.get_column(expected, "loss"), rel=TOLERANCE)
    assert commands.find_latest_checkpoint(tmp_path / "run").name == f"step_{STEPS:08d}"
