"""The functions of the public Python API do the same as the commands."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import dist_llm

STEPS = 4


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus that the Python API has prepared."""
    directory = tmp_path_factory.mktemp("api")
    text = directory / "text.txt"
    text.write_text("\n\n".join(f"The number {number} is one less than {number + 1}." for number in range(500)))
    options: dict[str, Any] = {"separator": "blank-lines", "heldout_fraction": 0.2, "workers": 1}
    manifest = dist_llm.prepare(text, directory / "corpus", tokenizer="bpe:300", **options)
    assert manifest.vocab_size == 300
    return directory / "corpus"


def make_config(corpus: Path, run: Path) -> dict[str, Any]:
    """Return the config of a tiny run as a nested dict."""
    return {
        "run": {"dir": str(run), "steps": STEPS},
        "model": {"d_model": 16, "n_layers": 1, "n_heads": 2},
        "data": {"path": str(corpus), "seq_len": 32, "global_batch": 4},
        "log": {"peak_tflops": 1.0},
    }


def test_the_commands_work_as_functions(corpus: Path, tmp_path: Path) -> None:
    config = make_config(corpus=corpus, run=tmp_path / "run")
    assert dist_llm.read_config(config, "optim.lr=0.1").optim.lr == 0.1
    run = dist_llm.train(config, "optim.lr=0.1")
    assert run == tmp_path / "run"
    assert config["run"]["steps"] == STEPS, "the mapping was changed"
    first = dist_llm.evaluate(run)
    assert 0 < first.loss < 6
    text = dist_llm.generate(run, "The number ", max_tokens=5, temperature=0)
    assert text == dist_llm.generate(run, "The number ", max_tokens=5, temperature=0)
    model, tokenizer, loaded = dist_llm.load_model(run)
    with torch.no_grad():
        logits_BSV = model(torch.tensor([tokenizer.encode("The number 7").tolist()]))
    assert logits_BSV.shape[-1] >= loaded.model.vocab_size == 300

    assert dist_llm.train(config, "optim.lr=0.1", f"run.steps={2 * STEPS}") == run, (
        "a second run in the process did not resume"
    )
    assert dist_llm.evaluate(run, split="train").tokens > first.tokens


def test_functions_raise_the_errors_of_the_commands(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(dist_llm.UserError, match=r"optim\.leerning_rate: unknown key"):
        dist_llm.train(make_config(corpus=corpus, run=tmp_path / "run") | {"optim": {"leerning_rate": 1.0}})
    with pytest.raises(dist_llm.UserError, match="is neither a file nor a config of the package"):
        dist_llm.train("dmeo")
    with pytest.raises(dist_llm.UserError, match="vocabulary: unknown option"):
        dist_llm.prepare("python-stdlib", tmp_path / "corpus", tokenizer="byte", vocabulary=300)


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import sys, dist_llm; sys.exit(', '.join({'torch', 'numpy', 'pydantic'} & sys.modules.keys()) or 0)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
    assert all(callable(getattr(dist_llm, name)) for name in dist_llm.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        _ = dist_llm.trian
