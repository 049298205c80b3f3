"""`train --debug`: shows what the model is fed, passes on what can learn and fails on what cannot."""

import itertools
import re
from pathlib import Path

from dist_llm.text.tokenizer import Tokenizer

from . import commands


def test_debug_shows_the_batch_and_passes_whatever_the_layout(corpus: Path, tmp_path: Path) -> None:
    done = commands.run("train", "--debug", *arguments(corpus, "parallel.dp_shard=8"), cwd=tmp_path)
    rows = re.findall(r"│ (\d+) +│ (\d+) ('.*?'|\".*?\") +│ (\S+) +│ (\d+) ('.*?'|\".*?\") +│ (yes|no) +│", done.stdout)
    assert len(rows) > 10, done.stdout
    tokenizer = Tokenizer.load(corpus)
    for place, (position, token, text, sees, target, target_text, scored) in enumerate(rows):
        assert (int(position), sees, scored) == (place, f"0..{place}", "yes")
        assert (text, target_text) == tuple(repr(tokenizer.decode([int(each)])) for each in (token, target))
    for row, following in itertools.pairwise(rows):
        assert row[4] == following[1], "the target is the next input"
    assert re.search(r"one batch, 30 steps at lr 0\.003: loss \d+\.\d+ -> \d+\.\d+", done.stdout)
    assert "debug run passed" in done.stdout
    assert list(tmp_path.iterdir()) == [], "a debug run leaves nothing"


def test_debug_fails_where_the_loss_does_not_fall(corpus: Path, tmp_path: Path) -> None:
    done = commands.run("train", "--debug", *arguments(corpus, "optim.lr=1e-9"), cwd=tmp_path, succeed=False)
    assert done.returncode == 1
    assert "debug run passed" not in done.stdout
    assert re.search(r"DebugError: the loss on one repeated batch went from \S+ to \S+ in 30 steps", done.stderr)
    assert "optim.lr (1e-09)" in done.stderr


def arguments(corpus: Path, *overrides: str) -> tuple[object, ...]:
    return (commands.DEBUG_CONFIG, "run.dir=run", f"data.path={corpus}", *commands.TINY, *overrides)
