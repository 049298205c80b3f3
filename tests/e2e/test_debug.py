"""`train --debug` shows the first batch; it passes if the model can learn and fails otherwise."""

import itertools
import re
from pathlib import Path

from dist_llm.text.tokenizer import Tokenizer

from . import commands


def test_debug_shows_the_batch_and_passes_for_any_layout(corpus: Path, tmp_path: Path) -> None:
    completed = commands.run("train", "--debug", *make_arguments(corpus, "parallel.dp_shard=8"), cwd=tmp_path)
    rows = re.findall(
        r"│ (\d+) +│ (\d+) ('.*?'|\".*?\") +│ (\S+) +│ (\d+) ('.*?'|\".*?\") +│ (yes|no) +│", completed.stdout
    )
    assert len(rows) > 10, completed.stdout
    assert re.search("position .* input .* attends to .* target .* has loss", completed.stdout)
    tokenizer = Tokenizer.load(corpus)
    for index, (position, token, text, attended_range, target, target_text, has_loss) in enumerate(rows):
        assert (int(position), attended_range, has_loss) == (index, f"0..{index}", "yes")
        assert (text, target_text) == tuple(repr(tokenizer.decode([int(token_id)])) for token_id in (token, target))
    for row, next_row in itertools.pairwise(rows):
        assert row[4] == next_row[1], "a target is not the next input"
    assert re.search(r"one batch, 30 steps at lr 0\.003: loss \d+\.\d+ -> \d+\.\d+", completed.stdout)
    assert "debug run passed" in completed.stdout
    assert list(tmp_path.iterdir()) == [], "a debug run wrote files"


def test_debug_fails_if_the_loss_does_not_fall(corpus: Path, tmp_path: Path) -> None:
    completed = commands.run("train", "--debug", *make_arguments(corpus, "optim.lr=1e-9"), cwd=tmp_path, succeed=False)
    assert completed.returncode == 1
    assert "debug run passed" not in completed.stdout
    assert re.search(r"DebugError: the loss on one repeated batch went from \S+ to \S+ in 30 steps", completed.stderr)
    assert "optim.lr (1e-09)" in completed.stderr


def make_arguments(corpus: Path, *overrides: str) -> tuple[object, ...]:
    """Return the arguments of the debug command for the tiny model."""
    return (commands.DEBUG_CONFIG, "run.dir=run", f"data.path={corpus}", *commands.TINY, *overrides)
