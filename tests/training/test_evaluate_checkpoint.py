"""`dist-llm evaluate` selects the window length, and its errors name the option to change."""

import re
from pathlib import Path

import pytest

from dist_llm import cli
from dist_llm.config.objective_sections import MaskedSpec
from dist_llm.config.schema import Config
from dist_llm.convert.hf_export import export_hf
from dist_llm.convert.weights import LazyWeights
from dist_llm.errors import ConfigError, DataError
from dist_llm.launch.world import World
from dist_llm.training.evaluate_checkpoint import EvaluationOptions, _resolve_seq_len, evaluate_checkpoint
from tests.cli_runner import make_cli_runner
from tests.fuzz.checkpoint_files import make_config, make_weights
from tests.fuzz.corpus_files import BYTE_TOKENIZER, write_corpus


def make_long_config(seq_len: int) -> Config:
    """Return a config with this sequence length, whose model allows 131,072 positions."""
    config = make_config(max_seq_len=131_072)
    return config.model_copy(update={"data": config.data.model_copy(update={"seq_len": seq_len})})


@pytest.mark.parametrize(
    ("trained", "in_run", "option", "seq_len", "reason"),
    [
        (False, 131_072, 0, 2048, "the default; the model takes up to 131072, see --seq-len"),
        (False, 1024, 0, 1024, "data.seq_len of the checkpoint"),
        (True, 8192, 0, 8192, "data.seq_len of the checkpoint"),
        (True, 8192, 512, 512, "--seq-len"),
        (False, 131_072, 131_072, 131_072, "--seq-len"),
    ],
)
def test_the_default_window_length_is_bounded(
    trained: bool, in_run: int, option: int, seq_len: int, reason: str
) -> None:
    config, actual_reason = _resolve_seq_len(make_long_config(in_run), seq_len=option, is_trained=trained)
    assert (config.data.seq_len, actual_reason) == (seq_len, reason)
    assert config.model.max_seq_len == 131_072


def test_a_window_longer_than_the_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="--seq-len 131073: the model takes at most 131072 tokens"):
        _resolve_seq_len(make_long_config(64), seq_len=131_073, is_trained=True)
    masked_config = make_long_config(64).model_copy(update={"objective": MaskedSpec()})
    with pytest.raises(ConfigError, match=r"windows of 1 tokens \(--seq-len\): .* give a longer --seq-len"):
        _resolve_seq_len(masked_config, seq_len=1, is_trained=True)
    assert cli.main(["evaluate", "--checkpoint", "x", "--seq-len", "-1"]) == 2


@pytest.fixture(scope="module")
def imported_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An imported model without a tokenizer."""
    directory = tmp_path_factory.mktemp("imported")
    config = make_config(vocab_size=257)
    weights = make_weights(config)
    export_hf(
        LazyWeights(weights.shapes, weights.read), config, tokenizer=None, directory=directory / "hf", family="llama"
    )
    assert make_cli_runner("convert")("from-hf", directory / "hf", directory / "ours") == 0
    return directory / "ours"


def test_errors_name_the_option_to_change(
    imported_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def error_of(data: str | None) -> str:
        with pytest.raises((ConfigError, DataError)) as error:
            evaluate_checkpoint(
                str(imported_model), data=data, split="heldout", options=EvaluationOptions(), world=World()
            )
        assert "data.path" not in str(error.value)
        return str(error.value)

    assert error_of(data=None).startswith("--data: this model was imported and has no corpus of its own")
    assert re.match(r"--data .*nowhere: .* not a prepared corpus", error_of(data=str(tmp_path / "nowhere")))
    (tmp_path / "corpus").mkdir()
    write_corpus(tmp_path / "corpus")
    result = evaluate_checkpoint(
        str(imported_model),
        data=str(tmp_path / "corpus"),
        split="heldout",
        options=EvaluationOptions(micro_batch=3),
        world=World(),
    )
    assert result.tokens == 111
    out = capsys.readouterr().out
    assert f"{imported_model} has no tokenizer: using the tokenizer of the corpus" in out
    (imported_model / "tokenizer.json").write_bytes(BYTE_TOKENIZER.to_json_bytes().replace(b": 256", b": 300"))
    try:
        message = error_of(data=str(tmp_path / "corpus"))
        assert re.match(r"--data .*/corpus: .* was prepared with a different tokenizer", message)
    finally:
        (imported_model / "tokenizer.json").unlink()


def test_generate_reports_the_missing_tokenizer(imported_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", "--checkpoint", str(imported_model), "--prompt", "x"]) == 2
    assert "has no tokenizer" in capsys.readouterr().err


def test_a_checkpoint_without_a_tokenizer_is_exported(
    imported_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tool = make_cli_runner("convert")
    assert tool("to-hf", imported_model, tmp_path / "hf") == 0
    assert f"without a tokenizer: {imported_model} has none" in capsys.readouterr().out
    assert sorted(file.name for file in (tmp_path / "hf").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "probe.json",
    ]
