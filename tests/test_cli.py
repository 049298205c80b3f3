"""The command line has fast help, documented exit codes, and config errors that need no import of torch."""

import errno
import os
import subprocess
import sys

import pytest

from dist_llm import cli
from dist_llm.commands import train_model
from dist_llm.config.describe import describe_keys
from dist_llm.data.shard import CorpusManifest
from dist_llm.errors import ConfigError, DataError

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


@pytest.fixture(autouse=True)
def remove_rank_variables(monkeypatch):
    """Run each test as a single process, also if pytest runs under torchrun."""
    for name in RANK_VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def config(tmp_path):
    """Write a valid config and an empty corpus; return the path of the config."""
    CorpusManifest(
        "uint16", vocab_size=300, tokenizer_sha256="", source=("here",), shards={"train": (), "heldout": ()}
    ).save(tmp_path)
    path = tmp_path / "config.yaml"
    path.write_text(
        f"run: {{dir: '{tmp_path / 'run'}', steps: 20}}\nmodel: {{d_model: 32, n_layers: 2, n_heads: 4}}\n"
        f"data: {{path: '{tmp_path}', seq_len: 8, global_batch: 4}}\n"
    )
    return path


def test_help_is_fast_and_has_examples():
    """The parser imports no library that takes long to import."""
    code = (
        "import sys; from dist_llm.cli import build_parser; print(build_parser().format_help()); "
        "sys.exit(', '.join({'torch', 'numpy', 'pydantic', 'rich', 'yaml'} & sys.modules.keys()) or 0)"
    )
    completed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert completed.returncode == 0, completed.stderr
    for command in ("prepare", "train", "evaluate", "generate", "convert"):
        assert f"dist-llm {command} " in completed.stdout, "the help lacks an example of the command"


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as excinfo:
        cli.main([command, "--help"])
    assert excinfo.value.code == 0
    assert "--" in capsys.readouterr().out


def test_help_config_lists_every_key_without_torch():
    code = (
        "import sys; from dist_llm.cli import main; main(['train', '--help-config']); sys.exit('torch' in sys.modules)"
    )
    completed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert completed.returncode == 0, "torch was imported"
    config_keys = [line.strip() for line in completed.stdout.splitlines() if line.startswith("  ") and line[2] != " "]
    assert config_keys == [row.name for row in describe_keys()]
    output = " ".join(completed.stdout.split())
    for row in describe_keys():
        assert f"{row.name} {row.type}; default: {row.default} {' '.join(row.description.split())}" in output


def test_help_config_searches_names_and_descriptions(capsys):
    assert cli.main(["train", "--help-config", "Nesterov"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("optim: optimizer\n  optim.muon_momentum\n      float; default: 0.95\n      muon: Nesterov")
    assert "optim.lr" not in out
    assert cli.main(["train", "--help-config", "sources"]) == 0
    assert "  data.sources.*.weight\n" in capsys.readouterr().out, "the keys of the entries of a list must be listed"
    assert cli.main(["train", "--help-config", "no such key"]) == 2
    assert "no key contains 'no such key'" in capsys.readouterr().err


def test_a_config_error_exits_with_2_and_imports_no_torch(config):
    code = (
        "import sys; from dist_llm.cli import main; "
        f"code = main(['train', {str(config)!r}, 'model.n_heads=5', 'run.stpes=3']); "
        "sys.exit(99 if 'torch' in sys.modules else code)"
    )
    completed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert completed.returncode == 2
    assert completed.stdout == ""
    assert completed.stderr.startswith("error: 2 problems in the config:\n")
    assert "run.stpes: unknown key; did you mean run.steps?" in completed.stderr
    assert "model.n_heads: 5 heads do not divide d_model 32" in completed.stderr
    assert "Traceback" not in completed.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "give exactly one config file, not 0; for example: dist-llm train --config"),
        (["train", "a.yaml", "b.yaml"], "give exactly one config file, not 2"),
        (["train", "--config", "a.yaml", "b.yaml"], "give exactly one config file, not 2"),
        (["train", "nowhere.yaml"], "nowhere.yaml: cannot be read: No such file"),
        (["train", "--debug", "nowhere.yaml"], "nowhere.yaml: cannot be read: No such file"),
        (["evaluate", "--checkpoint", "nowhere"], "nowhere: has no complete checkpoint"),
        (["generate", "--checkpoint", "nowhere"], "nowhere: has no complete checkpoint"),
        (["prepare"], "--source, --tokenizer, --out: must be given"),
        (["prepare", "--source", "x", "--out", "y"], "--tokenizer: must be given"),
        (["prepare", "--merge", "nowhere"], "nowhere: has no parts. Make them with: dist-llm prepare"),
        (["generate", "--checkpoint", "nowhere", "--top-p", "2"], "--top-p 2.0: must be above 0"),
    ],
    ids=" ".join,
)
def test_an_input_error_exits_with_2(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    "arguments",
    [[], ["fly"], ["evaluate"], ["train", "--nonsense"], ["generate", "--top-k", "x"]],
    ids=["no command", "unknown command", "missing option", "unknown option", "wrong value"],
)
def test_a_wrong_option_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as excinfo:
        cli.main(arguments)
    assert excinfo.value.code == 2
    assert "usage: dist-llm" in capsys.readouterr().err


def raise_in_train(monkeypatch, error):
    """Replace `train` by a function that raises this error."""

    def train(options):
        raise error

    monkeypatch.setattr(train_model, "run", train)


def test_an_internal_error_keeps_its_traceback(monkeypatch):
    raise_in_train(monkeypatch, ZeroDivisionError("a bug"))
    with pytest.raises(ZeroDivisionError, match="a bug"):
        cli.main(["train"])


def test_an_interrupt_exits_with_130(monkeypatch, capsys):
    raise_in_train(monkeypatch, KeyboardInterrupt())
    assert cli.main(["train"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_rank_0_prints_an_error_before_other_ranks(monkeypatch, capsys):
    """Ranks usually fail with the same error. Other ranks pause, so torchrun ends them before they print."""
    pauses = []
    monkeypatch.setattr(cli.time, "sleep", pauses.append)
    for rank, error in ((0, ConfigError("bad config")), (3, DataError("bad shard"))):
        raise_in_train(monkeypatch, error)
        for name, value in zip(RANK_VARIABLES, (rank, 4, rank), strict=True):
            monkeypatch.setenv(name, str(value))
        assert cli.main(["train"]) == 2
        errors = capsys.readouterr().err
        if rank == 0:
            assert (errors, pauses) == ("error: bad config\n", [])
        else:
            assert errors.startswith("rank 3 on ")
            assert errors.endswith(":\nerror: bad shard\n")
            assert pauses[0] >= 1


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "0"}, "environment: not set: WORLD_SIZE, LOCAL_RANK"),
        ({"RANK": "x", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "environment: RANK=x, "),
    ],
    ids=["missing", "not a number"],
)
def test_wrong_rank_variables_are_a_user_error(variables, message, config, monkeypatch, capsys):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["train", "--config", str(config)]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith(f"error: {message}")
    assert errors.count("error: ") == 1


def test_a_closed_pipe_is_no_error():
    """The reader of the pipe has exited, as in `dist-llm train --help-config | head -1`."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "dist_llm", "train", "--help-config"]
    completed = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(writer)
    assert (completed.returncode, completed.stderr) == (0, "")


def test_overrides_and_the_config_may_come_in_any_order(config, monkeypatch):
    import dist_llm.training.settings as settings

    calls = []

    def record_and_stop(path, overrides, world_size):
        calls.append((path, overrides, world_size))
        raise ConfigError("far enough")

    monkeypatch.setattr(settings, "read_config", record_and_stop)
    for arguments in (
        ["--config", str(config), "a.b=1", "c=2"],
        ["a.b=1", str(config), "c=2"],
        ["a.b=1", "c=2", "--config", str(config)],
    ):
        assert cli.main(["train", *arguments]) == 2
    assert calls == [(config, ["a.b=1", "c=2"], 1)] * 3


def test_debug_replaces_the_layout_by_one_rank(config, monkeypatch):
    import dist_llm.training.debug as debug

    configs = []
    monkeypatch.setattr(debug, "debug", configs.append)
    assert cli.main(["train", "--debug", str(config), "parallel.dp_replicate=4", "data.prefetch=5"]) == 0
    (resolved,) = configs
    assert (resolved.parallel.dp_replicate, resolved.parallel.dp_shard, resolved.data.prefetch) == (1, 1, 0)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device"),
            "a file of this command: No space left on device; free disk",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "data/x"), "data/x: Permission denied; change its perm"),
        (OSError(errno.EROFS, "Read-only file system", "x"), "x: Read-only file system; change its permissions"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "x/y"), "x/y: Not a directory; there is a file where"),
        (OSError(errno.EMFILE, "Too many open files", b"x"), "x: Too many open files; raise the limit"),
        ("\u00e9".encode, r"standard output uses ascii and cannot show '\xe9'; set PYTHONUTF8=1"),
    ],
    ids=["full disk", "permission", "read-only", "not a directory", "open files", "ascii"],
)
def test_a_system_error_that_the_user_can_fix_exits_with_2(error, message, monkeypatch, capsys):
    def fail(options):
        if isinstance(error, OSError):
            raise error
        error("ascii")

    monkeypatch.setattr(train_model, "run", fail)
    assert cli.main(["train"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [OSError(errno.EBADF, "Bad file descriptor"), OSError("without errno"), "\ud800".encode],
    ids=["bad descriptor", "no errno", "surrogate"],
)
def test_a_system_error_that_may_be_a_bug_keeps_its_traceback(error, monkeypatch):
    def fail(options):
        if isinstance(error, OSError):
            raise error
        error("utf-8")

    monkeypatch.setattr(train_model, "run", fail)
    with pytest.raises((OSError, UnicodeEncodeError)):
        cli.main(["train"])
