"""Train short reference runs and compare their metrics digit by digit, before and after a refactoring.

    python -m tests.reference_runs --out before.json          # train all runs and write their metrics
    python -m tests.reference_runs --compare before.json after.json   # exit code 1 if a digit differs

The program uses only the command line, the config keys and metrics.jsonl, so it also runs on older commits. The corpus
is generated text, which is the same on each machine.
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

TIMEOUT_SECONDS = 400  # for a run
COMPARED_METRICS = ("step", "loss", "grad_norm", "lr", "heldout_loss", "loss_scale", "tokens")

BASE_CONFIG: dict[str, Any] = {
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
    """A training run with overrides of BASE_CONFIG. 0 ranks are one process without torchrun.

    With `resume_overrides`, the run is then resumed once with these overrides on `resume_ranks` ranks.
    """

    overrides: tuple[str, ...]
    ranks: int = 0
    resume_overrides: tuple[str, ...] | None = None
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
        resume_overrides=("run.steps=8", "schedule.on_extend=replan", "optim.moments=bf16"),
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
    """Return one line per run, number of rows or metric that differs."""
    lines = [f"{name}: only in one of the files" for name in sorted(set(old) ^ set(new))]
    for name in sorted(set(old) & set(new)):
        if len(old[name]) != len(new[name]):
            lines.append(f"{name}: {len(old[name])} rows before, {len(new[name])} after")
        for old_row, new_row in zip(old[name], new[name], strict=False):
            for key in sorted(set(old_row) | set(new_row)):
                if old_row.get(key) != new_row.get(key):
                    lines.append(f"{name}: step {old_row['step']}: {key}: {old_row.get(key)} -> {new_row.get(key)}")
    return lines


def train_all(names: list[str]) -> dict[str, list[dict[str, Any]]]:
    """Train the named runs and return the rows of metrics of each."""
    metrics = {}
    with tempfile.TemporaryDirectory() as directory:
        corpus = build_corpus(Path(directory))
        for name in names:
            start_time = time.monotonic()
            metrics[name] = train_run(RUNS[name], corpus, Path(directory, name))
            print(f"{name}: {len(metrics[name])} rows, {time.monotonic() - start_time:.0f} s", flush=True)
    return metrics


def build_corpus(directory: Path) -> Path:
    """Prepare a corpus of generated sentences."""
    rng = random.Random(5)
    vocabulary = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 7))) for _ in range(300)]
    text_folder = directory / "text"
    text_folder.mkdir()
    for document_index in range(60):
        sentences = (" ".join(rng.choices(vocabulary, k=rng.randint(4, 14))) for _ in range(rng.randint(5, 40)))
        (text_folder / f"{document_index:03}.txt").write_text(".\n".join(sentences) + ".\n", encoding="utf-8")
    options = ["--source", "text", "--tokenizer", "bpe:400", "--heldout-fraction", "0.2", "--out", "corpus"]
    run_command(["-m", "dist_llm", "prepare", *options], directory)
    return directory / "corpus"


def train_run(run: Run, corpus: Path, directory: Path) -> list[dict[str, Any]]:
    """Train in a new directory; return the compared metrics of all rows."""
    directory.mkdir()
    config = {**BASE_CONFIG, "data": {**BASE_CONFIG["data"], "path": str(corpus)}}
    (directory / "config.yaml").write_text(json.dumps(config), encoding="utf-8")  # JSON is a subset of YAML
    train = ("train", "--config", "config.yaml")
    run_command([*make_launcher_arguments(run.ranks), *train, *run.overrides], directory)
    if run.resume_overrides is not None:
        run_command([*make_launcher_arguments(run.resume_ranks), *train, *run.resume_overrides], directory)
    rows = [json.loads(line) for line in (directory / "run" / "metrics.jsonl").read_text().splitlines()]
    return [{key: row[key] for key in COMPARED_METRICS if key in row} for row in rows]


def make_launcher_arguments(ranks: int) -> list[str]:
    """Return the arguments of Python before the subcommand; torchrun starts the ranks unless `ranks` is 0."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks else []
    return [*torchrun, "-m", "dist_llm"]


def run_command(arguments: list[str], directory: Path) -> None:
    """Run Python with these arguments; if it fails, raise RuntimeError with its output."""
    path = f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": path}
    completed = subprocess.run(
        [sys.executable, *arguments],
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
    )
    if completed.returncode:
        raise RuntimeError(f"{arguments} exited with {completed.returncode}\n{completed.stdout}\n{completed.stderr}")


if __name__ == "__main__":
    sys.exit(main())
