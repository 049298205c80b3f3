"""Short training runs whose metrics are compared digit by digit before and after a change that must not alter them.

    python -m tests.reference_runs --out before.json          # train, and write the metrics of every run
    python -m tests.reference_runs --compare before.json after.json   # exit code 1 if a digit differs

The program depends on the command line, the config keys and metrics.jsonl alone, so it runs unchanged on older commits.
The corpus is built from generated text and does not depend on the machine's files.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LIMIT_SECONDS = 400
COMPARED = ("step", "loss", "grad_norm", "lr", "heldout_loss", "loss_scale", "tokens")

BASE: dict[str, Any] = {
    "run": {"dir": "run", "steps": 6, "seed": 3},
    "model": {"d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2},
    "data": {"seq_len": 64, "global_batch": 8, "micro_batch": 2},
    "optim": {"lr": 3e-3},
    "schedule": {"warmup_steps": 2},
    "eval": {"windows": 8},
    "log": {"every": 1, "tensorboard": False},
    "checkpoint": {"every": 100},
}


@dataclass(frozen=True)
class Run:
    """One run, or two where a second set of overrides resumes it."""

    overrides: tuple[str, ...]
    ranks: int = 0
    resume: tuple[str, ...] | None = None
    resume_ranks: int = 0


UL2 = (
    "objective.mixture=[{name: causal, weight: 1.0}, {name: span, mode: R, weight: 1.0},"
    " {name: prefix, mode: S, weight: 1.0}, {name: fim, weight: 1.0}]"
)
ENCODER = (
    "model.architecture=encoder",
    "objective.name=masked",
    "objective.whole_words=true",
    "model.positions=learned",
    "model.norm=layernorm",
    "model.norm_order=post",
    "model.norm_embedding=true",
    "model.activation=gelu",
    "model.bias=true",
    "model.head=mlm",
    "model.dropout=0.1",
)
T5 = (
    "model.architecture=encoder_decoder",
    "model.n_encoder_layers=2",
    "model.positions=relative",
    "model.activation=geglu_tanh",
    "objective.name=span",
    "model.attention_scale=1.0",
)
RUNS: dict[str, Run] = {
    "causal": Run(
        ("model.qk_norm=true", "model.stochastic_depth=0.2", "loss.z_loss=0.001", "loss.label_smoothing=0.1"),
    ),
    "mixture_fp16": Run((UL2, "precision=fp16", "model.logit_cap=20.0")),
    "masked_encoder_sharded": Run((*ENCODER, "parallel.dp_shard=2"), ranks=2),
    "encoder_decoder_tp": Run((*T5, "parallel.tp=2", "model.dropout=0.1"), ranks=2),
    "encoder_decoder_pipeline": Run((*T5[:2], "model.positions=sinusoidal", *T5[4:], "parallel.pp=2"), ranks=2),
    "resume_on_another_layout": Run(
        ("parallel.dp_replicate=2", "optim.moments=bf16", "checkpoint.every=4", "run.steps=4"),
        ranks=2,
        resume=("run.steps=8", "schedule.on_extend=replan", "optim.moments=bf16"),
    ),
    "sgd_document_mask": Run(
        ("optim.name=sgd", "optim.momentum=0.9", "optim.lr=0.1", "data.windows=packed", "data.document_mask=true"),
    ),
    "muon_dp_tp_bf16": Run(
        ("optim.name=muon", "precision=bf16", "parallel.dp_shard=2", "parallel.tp=2", "parallel.recompute=full"),
        ranks=4,
    ),
    "context_tp_without_sp": Run(
        ("parallel.cp=2", "parallel.tp=2", "parallel.sequence_parallel=false", "model.dropout=0.1"), ranks=4
    ),
    "pipeline_interleaved_budget": Run(
        (
            "parallel.pp=2",
            "parallel.dp_shard=2",
            "parallel.pp_schedule=interleaved_1f1b",
            "model.n_layers=4",
            "model.tie_embeddings=true",
            "parallel.activations_gib=0.0012",
        ),
        ranks=4,
    ),
    "pipeline_zbv_tp": Run(
        ("parallel.pp=2", "parallel.tp=2", "parallel.pp_schedule=zbv", "model.n_layers=4", "model.positions=learned"),
        ranks=4,
    ),
    "fp8_compiled_replay": Run(
        (
            "precision=bf16",
            "fp8=true",
            "parallel.dp_replicate=2",
            "parallel.recompute=selective",
            "guard.replay_every=2",
            "guard.digest_every=2",
        ),
        ranks=2,
    ),
    "deepspeed_zero2": Run(("engine=deepspeed", "deepspeed.stage=2", "parallel.dp_shard=2"), ranks=2),
    "deepspeed_pipeline": Run(
        ("engine=deepspeed", "deepspeed.stage=1", "parallel.pp=2", "precision=bf16", "model.dropout=0.1"), ranks=2
    ),
    "accelerate_ddp": Run(("engine=accelerate", "parallel.recompute=full"), ranks=2),
    "accelerate_zero2": Run(
        ("engine=accelerate", "accelerate.plugin=deepspeed", "deepspeed.stage=2", "precision=bf16"), ranks=2
    ),
}


def main() -> int:
    """Train or compare, depending on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="train the runs and write their metrics to this JSON file")
    parser.add_argument("--only", nargs="*", help="train only the runs with these names")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("OLD", "NEW"), help="compare two JSON files")
    arguments = parser.parse_args()
    if arguments.compare:
        old, new = (json.loads(path.read_text(encoding="utf-8")) for path in arguments.compare)
        differences = compare_metrics(old, new)
        print("\n".join(differences) or f"{len(old)} runs: all metrics are identical")
        return int(bool(differences))
    if not arguments.out:
        parser.error("give --out or --compare")
    metrics = train_all(arguments.only or list(RUNS))
    arguments.out.write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
    return 0


def compare_metrics(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return one line per run or number that differs."""
    lines = [f"{name}: only in one of the files" for name in sorted(set(old) ^ set(new))]
    for name in sorted(set(old) & set(new)):
        if len(old[name]) != len(new[name]):
            lines.append(f"{name}: {len(old[name])} rows before, {len(new[name])} after")
        for before, after in zip(old[name], new[name], strict=False):
            for key in sorted(set(before) | set(after)):
                if before.get(key) != after.get(key):
                    lines.append(f"{name}: step {before['step']}: {key}: {before.get(key)} -> {after.get(key)}")
    return lines


def train_all(names: list[str]) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of each named run."""
    metrics = {}
    with tempfile.TemporaryDirectory() as directory:
        corpus = build_corpus(Path(directory))
        for name in names:
            start = time.monotonic()
            metrics[name] = train_run(RUNS[name], corpus, Path(directory, name))
            print(f"{name}: {len(metrics[name])} rows, {time.monotonic() - start:.0f} s", flush=True)
    return metrics


def build_corpus(directory: Path) -> Path:
    """Prepare a corpus of generated sentences."""
    draw = random.Random(5)
    vocabulary = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 7))) for _ in range(300)]
    text = directory / "text"
    text.mkdir()
    for number in range(60):
        sentences = (" ".join(draw.choices(vocabulary, k=draw.randint(4, 14))) for _ in range(draw.randint(5, 40)))
        (text / f"{number:03}.txt").write_text(".\n".join(sentences) + ".\n", encoding="utf-8")
    options = ["--source", "text", "--tokenizer", "bpe:400", "--heldout-fraction", "0.2", "--out", "corpus"]
    run_command(["-m", "dist_llm", "prepare", *options], directory)
    return directory / "corpus"


def train_run(run: Run, corpus: Path, directory: Path) -> list[dict[str, Any]]:
    """Train in a new directory; return the compared metrics of all rows."""
    directory.mkdir()
    base = {**BASE, "data": {**BASE["data"], "path": str(corpus)}}
    (directory / "config.yaml").write_text(json.dumps(base), encoding="utf-8")  # JSON is YAML
    run_command([*launcher_arguments(run.ranks), "train", "--config", "config.yaml", *run.overrides], directory)
    if run.resume is not None:
        run_command([*launcher_arguments(run.resume_ranks), "train", "--config", "config.yaml", *run.resume], directory)
    rows = [json.loads(line) for line in (directory / "run" / "metrics.jsonl").read_text().splitlines()]
    return [{key: row[key] for key in COMPARED if key in row} for row in rows]


def launcher_arguments(ranks: int) -> list[str]:
    """The interpreter's arguments before the subcommand."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks else []
    return [*torchrun, "-m", "dist_llm"]


def run_command(arguments: list[str], directory: Path) -> None:
    """Run the interpreter with these arguments; raise with its output if it fails."""
    path = f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": path}
    completed = subprocess.run(
        [sys.executable, *arguments],
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
    )
    if completed.returncode:
        raise RuntimeError(f"{arguments} exited with {completed.returncode}\n{completed.stdout}\n{completed.stderr}")


if __name__ == "__main__":
    sys.exit(main())
