"""`make gpu` runs all cases, keeps the results of a killed run, and reports a wrong value, here without a GPU."""

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.e2e import commands

REPOSITORY = Path(__file__).parents[2]
BENCHMARKS = REPOSITORY / "benchmarks"
sys.path.append(str(BENCHMARKS))  # its programs import each other by bare names

import gpu  # noqa: E402
import gpu_report  # noqa: E402
import gpu_start  # noqa: E402
import gpu_workers  # noqa: E402
from dist_llm.losses import fused_linear_cross_entropy  # noqa: E402
from gpu_cases import CASES, BenchmarkCase  # noqa: E402
from gpu_context import CaseContext  # noqa: E402

CPU = CaseContext("cpu", tiny=True, folder=Path("unused"))
# Packages that a machine with a GPU may lack; no case may need them.
ABSENT_PACKAGES = ("datasets", "datasketch", "hypothesis", "deepspeed", "zstandard")
HIDE_ABSENT_PACKAGES = f"import sys; sys.modules.update(dict.fromkeys({ABSENT_PACKAGES})); "
without_cuda = pytest.mark.skipif(torch.version.cuda is not None, reason="the fake GPU needs torch's CPU build")


def start_program(*arguments: str, code: str = "", program: Path = BENCHMARKS / "gpu.py") -> subprocess.Popen[str]:
    """Start a program, or with `code` this Python code, with these arguments."""
    program_args = ["-c", code] if code else [str(program)]
    return subprocess.Popen(
        [sys.executable, *program_args, *arguments],
        env=commands.make_environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def read_rows(path: Path) -> dict[str, dict[str, Any]]:
    """Return the rows of a result file by name."""
    return {row["row"]: row for row in json.loads(path.read_text())["rows"]}


def case_name_of(name: str) -> str:
    """Return the name of the case that produced a row: a case with several rows adds a name to its own."""
    return max((case.name for case in CASES if name == case.name or name.startswith(f"{case.name}, ")), key=len)


@without_cuda
def test_every_case_runs_on_a_fake_gpu(tmp_path: Path) -> None:
    """The sizes are tiny. A case fails if a tensor is not on the fake GPU, or if a step reads a value."""
    code = f"{HIDE_ABSENT_PACKAGES} sys.path.insert(0, {str(BENCHMARKS)!r}); import gpu; sys.exit(gpu.main())"
    process = start_program("--device", "fake", "--tiny", "--write", str(tmp_path), code=code)
    output, errors = process.communicate(timeout=280)
    rows = read_rows(tmp_path / "gpu-fake.json")
    assert {name: row["error"] for name, row in rows.items() if row["outcome"] == "failed"} == {}
    assert process.returncode == 0, errors
    assert [json.loads(line)["row"] for line in output.splitlines()] == list(rows)
    assert {case_name_of(name) for name in rows} == {case.name for case in CASES}
    assert [name for name, row in rows.items() if row["outcome"] != "ok"] == ["experts", "pytest -m gpu"]
    assert all(rows[case.name]["traced_peak"] > 0 for case in CASES if case.kind == "train")
    assert rows["environment"]["missing"].keys() >= {"datasets", "datasketch"}
    assert "traced GiB" in errors


def test_results_survive_hangs_crashes_and_sigkill(tmp_path: Path) -> None:
    """One case hangs, one crashes, and the next succeeds. Then SIGKILL leaves a complete file and no child process."""
    path = tmp_path / "gpu-cpu.json"
    program = Path(__file__).parent / "failing_cases.py"
    with start_program("--device", "cpu", "--write", str(tmp_path), program=program) as process:
        deadline = time.monotonic() + 250
        while not path.exists() or len(read_rows(path)) < 4:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        children = commands.list_process_tree(process.pid)[1:]
        assert children
        os.kill(process.pid, signal.SIGKILL)
    rows = read_rows(path)
    outcomes = {name: row["outcome"] for name, row in rows.items()}
    assert outcomes == {"environment": "ok", "hangs": "failed", "crashes": "failed", "loss": "ok"}
    assert "cut off after 3 s" in rows["hangs"]["error"], (
        "the time limit is not 10 times that of a GPU, as it is on any CPU"
    )
    assert "failing_cases.py" in rows["hangs"]["error"], "the error lacks the stack"
    assert "exit code 3" in rows["crashes"]["error"]
    while any("spawn_main" in read_command_line(child) for child in children):
        assert time.monotonic() < deadline, "a child still runs"
        time.sleep(0.05)


class InProcessRunner:
    """Runs cases in this process instead of in child processes."""

    def __init__(self, context: CaseContext) -> None:
        self.context = context

    def run(self, case: BenchmarkCase, timeout_seconds: float) -> list[dict[str, Any]]:
        return gpu_workers.run_case(case, self.context)

    def close(self) -> None: ...


def run_out_of_memory(context: CaseContext) -> None:
    """Fail as torch does without free GPU memory."""
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80.00 GiB.")


def interrupt(context: CaseContext) -> None:
    """Fail as on Ctrl-C."""
    raise KeyboardInterrupt


SHORT_CASES = ("environment", "loss", "generation", "llama-1b, 4k x 4", "profile, eager")


@pytest.fixture
def run_gpu_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., int]]:
    """Return a function that runs gpu.py on the CPU in this process, with these cases and then SHORT_CASES."""
    handler = signal.getsignal(signal.SIGTERM)

    def run(*cases: BenchmarkCase) -> int:
        monkeypatch.setattr(gpu, "CASES", [*cases, *(case for case in CASES if case.name in SHORT_CASES)])
        monkeypatch.setattr(gpu, "CaseProcesses", InProcessRunner)
        monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--write", str(tmp_path), "--commit=abc"])
        return gpu.main()

    yield run
    signal.signal(signal.SIGTERM, handler)


def test_the_table_shows_the_results_of_all_cases(
    run_gpu_command: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_gpu_command(BenchmarkCase("train", "memory", run_out_of_memory)) == 0
    output, errors = capsys.readouterr()
    report = json.loads((tmp_path / "gpu-cpu.json").read_text())
    rows = {row["row"]: row for row in report["rows"]}
    assert list(rows) == [json.loads(line)["row"] for line in output.splitlines()] == ["memory", *SHORT_CASES]
    assert rows["memory"]["outcome"] == "out of memory"
    assert rows["llama-1b, 4k x 4"]["tokens_per_second"] > 0
    assert 0 < len(rows["profile, eager"]["gaps"]) <= 10
    assert (tmp_path / rows["profile, eager"]["trace"]).stat().st_size > 0
    assert {"cpu", "torch", "git_commit", "device"} <= report["machine"].keys()
    assert "the largest gaps" in errors
    assert "rows: 5 ok, 1 out of memory" in errors


def test_a_wrong_value_is_reported_and_fails_the_command(
    run_gpu_command: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = fused_linear_cross_entropy._losses_and_logit_grads_
    monkeypatch.setattr(
        fused_linear_cross_entropy, "_losses_and_logit_grads_", lambda *arguments: original(*arguments) * 1.001
    )
    assert run_gpu_command() == 1
    errors = capsys.readouterr().err
    assert "float32 cap 0 losses: error 0.001, at most 0.0001 is allowed" in errors
    assert "rows: 1 failed, 4 ok" in errors


def test_an_interrupted_run_prints_the_finished_cases(run_gpu_command: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        run_gpu_command(
            BenchmarkCase("check", "finished", lambda context: {}), BenchmarkCase("check", "stopped", interrupt)
        )
        == 130
    )
    assert "rows: 1 ok" in capsys.readouterr().err


def read_command_line(pid: int) -> str:
    """Return the command line of a process; empty if it does not exist."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_complete_command_runs_on_the_cpu(tmp_path: Path) -> None:
    """`DEVICE=cpu make gpu` from start to end, through make."""
    completed = subprocess.run(
        ["make", "gpu", "DEVICE=cpu", f"RESULTS={tmp_path}", f"GPU_PYTHON={sys.executable}"],
        cwd=REPOSITORY,
        env=commands.make_environment(),
        capture_output=True,
        text=True,
        timeout=1100,
    )
    assert completed.returncode == 0, completed.stderr
    rows = read_rows(tmp_path / "gpu-cpu.json")
    assert {case_name_of(name) for name in rows} == {case.name for case in CASES}
    skipped_names = {name for name, row in rows.items() if row["outcome"] != "ok"}
    gpu_only_names = {name for name in rows if name.startswith(("host syncs", "attention flex", "pytest"))}
    assert skipped_names == gpu_only_names | {"attention efficient", "attention cudnn"}


@pytest.mark.slow
@without_cuda
@pytest.mark.timeout(1200)
def test_committed_memory_peaks_are_current(tmp_path: Path) -> None:
    """Trace one training case at its full size and compare its peak with the peak in the committed file."""
    peaks = gpu_report.read_traced_peaks()
    names = [case.name for case in CASES if case.kind == "train"]
    assert peaks.keys() >= set(names)
    process = start_program("--device", "fake", "--write", str(tmp_path), "--cases", names[0])
    process.communicate(timeout=1100)
    traced = read_rows(tmp_path / "gpu-fake.json")[names[0]]["traced_peak"]
    assert traced == pytest.approx(peaks[names[0]], rel=0.01)


def test_the_first_training_case_runs_within_two_minutes() -> None:
    """The most important checks run before it."""
    first_train_index = next(index for index, case in enumerate(CASES) if case.kind == "train")
    assert CASES[first_train_index].name == "llama-1b, 4k x 4"
    assert sum(case.expected_seconds for case in CASES[: first_train_index + 1]) <= 120
    earlier_names = {case.name for case in CASES[:first_train_index]}
    assert earlier_names >= {
        "step fp32",
        "step bf16",
        "loss",
        "attention chosen",
        "generation",
        "checkpoint",
        "one rank",
    }


class FakeRunner:
    """A runner whose cases take exactly `expected_seconds` of a simulated time budget."""

    def __init__(self, budget_seconds: float) -> None:
        self.seconds_left = budget_seconds

    def run(self, case: BenchmarkCase, timeout_seconds: float) -> list[dict[str, Any]]:
        self.seconds_left -= case.expected_seconds
        return [{"outcome": "ok", "limit_seconds": timeout_seconds}]


def test_a_case_starts_only_if_enough_time_is_left() -> None:
    rows: list[dict[str, Any]] = []
    results: Any = SimpleNamespace(add=rows.append, context=SimpleNamespace(device_kind="cuda"))
    cases = [BenchmarkCase("check", f"case {index}", len, expected_seconds=10, limit_seconds=25) for index in range(4)]
    runner = FakeRunner(budget_seconds=32)
    gpu.run_cases(cases, results, runner.run, lambda: runner.seconds_left)
    assert [row["outcome"] for row in rows] == ["ok", "ok", "ok", "skipped"]
    assert [row.get("limit_seconds") for row in rows[:3]] == [25, 22, 12]
    assert "needs about 10 s, but 2 s of the time budget are left" in rows[3]["error"]


def test_compatible_wheels_are_unpacked_once(tmp_path: Path) -> None:
    python_tag = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    for tag in (
        "py3-none-any",
        f"{python_tag}-{python_tag}-manylinux_2_17_x86_64",
        "cp399-cp399-manylinux_2_17_x86_64",
    ):
        with zipfile.ZipFile(tmp_path / f"example_{tag.partition('-')[0]}-1.0-{tag}.whl", "w") as wheel:
            wheel.writestr(f"example_{tag.partition('-')[0]}.py", "")
    target = gpu_start.unpack_wheels(tmp_path)
    assert {path.name for path in target.glob("*.py")} == {"example_py3.py", f"example_{python_tag}.py"}
    (target / "example_py3.py").unlink()
    gpu_start.unpack_wheels(tmp_path)
    assert not (target / "example_py3.py").exists(), "the wheels were unpacked again"
    assert gpu_start.is_compatible_wheel(Path("x-1-cp38-abi3-manylinux_2_17_x86_64.whl"))
    assert not gpu_start.is_compatible_wheel(Path("x-1-cp38-cp38-manylinux_2_17_x86_64.whl"))


def test_a_missing_package_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_start, "REQUIRED_PACKAGES", ("torch", "no_such_package"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert gpu_start.main([]) == 2
    error = capsys.readouterr().err
    assert "no_such_package" in error
    assert "make gpu-wheels" in error
    assert "torch," not in error
