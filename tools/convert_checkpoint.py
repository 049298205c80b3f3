"""Convert checkpoints, and look into them.

  to-hf           a run or checkpoint -> a directory for Hugging Face's `from_pretrained`, tokenizer included
  from-hf         such a directory, or one with pytorch_model.bin -> a checkpoint (Llama, GPT-2, Mistral, Qwen2, Qwen3,
                  BERT, T5 v1.1, BART)
  to-torch        a run or checkpoint -> one file of `torch.save`
  from-torch      such a file -> a checkpoint
  from-nanogpt    nanoGPT's ckpt.pt -> a checkpoint
  to-nanogpt      a run or checkpoint -> nanoGPT's ckpt.pt
  to-deepspeed    a run or checkpoint -> a ZeRO 1, 2 or 3 directory, or a universal checkpoint
  from-deepspeed  such a directory -> a checkpoint
  average         the mean of the weights of several checkpoints
  diff            where two checkpoints differ; exit code 1 if they do
  inspect         names, shapes, types, norms, and values that are not finite
  verify          every byte of a checkpoint against its manifest, and its weights against its probe

examples:
  python tools/convert_checkpoint.py to-hf runs/demo hf/demo --check
  python tools/convert_checkpoint.py from-hf hf/demo checkpoints/demo --check
  python tools/convert_checkpoint.py inspect runs/demo

A run stands for its newest checkpoint. What is written appears whole or not at all, and is read again and compared
before it does. The probe's loss (docs/checkpoints.md) is computed again, and compared. One tensor at a time is held in
memory; for the probe embedding, head and one block; for to-torch and --check all. No GPU, no process group.
A checkpoint that was converted can be evaluated, sampled from, and trained on with init_from.
Exit code 1: diff found a difference; 2: the command cannot be run, or what it found is wrong.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress as Bar
from rich.progress import track
from rich.table import Table
from torch import Tensor

from dist_llm.checkpoint import manifest
from dist_llm.checkpoint.checkpoint_state import Progress
from dist_llm.checkpoint.compatibility import read_config
from dist_llm.checkpoint.folder import Folder
from dist_llm.checkpoint.native_weights import NativeWeights
from dist_llm.checkpoint.probe import PROBE, Probe, compare_probes, parse_probe
from dist_llm.checkpoint.store import PROGRESS, open_checkpoint, read_progress, resolve_checkpoint
from dist_llm.config.compare import function_differences
from dist_llm.config.lengths import extra_ids
from dist_llm.config.load import dump, load_saved, parse_saved
from dist_llm.config.schema import Config, ModelConfig
from dist_llm.convert import hf_convert
from dist_llm.convert.deepspeed_read import open_deepspeed
from dist_llm.convert.deepspeed_write import write_deepspeed, write_universal
from dist_llm.convert.export_tokenizers import import_tokenizer
from dist_llm.convert.hf_parity import compare_logits
from dist_llm.convert.nanogpt import from_nanogpt as read_nanogpt
from dist_llm.convert.nanogpt import to_nanogpt as nanogpt_content
from dist_llm.convert.stream_probe import stream_probe
from dist_llm.convert.weights import (
    TORCH_FILE,
    TORCH_INDEX,
    DictWeights,
    LazyWeights,
    SafetensorsWeights,
    Weights,
    check_only_tensors,
    load_torch,
    open_huggingface,
)
from dist_llm.convert.write_weights import DTYPES, verify_written, write_atomically, write_native
from dist_llm.errors import CheckpointError, UserError
from dist_llm.models.build_model import build_model
from dist_llm.optim.build_optimizer import build_optimizer
from dist_llm.text.hf_folder import GENERATION_FILE
from dist_llm.text.tokenizer import TOKENIZER_FILE, Tokenizer
from dist_llm.text.vocabulary import build_tokenizer

console = Console(highlight=False, markup=False, soft_wrap=True)
CONFIG = "config.yaml"
TOKEN_IDS = "token_ids.json"  # of a checkpoint that came from Hugging Face: for the way back


def main() -> int:
    """Run the command of the arguments."""
    options = parser().parse_args()
    try:
        return int(options.run(options) or 0)
    except UserError as error:
        print(f"convert_checkpoint: {error}", file=sys.stderr)
        return 2


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top.add_subparsers(dest="command", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], int | None], *places: str) -> argparse.ArgumentParser:
        one = commands.add_parser(name, help=(run.__doc__ or "").split("\n")[0])
        for place in places:
            one.add_argument(place, metavar=place.upper(), nargs="+" if place == "checkpoints" else None)
        one.set_defaults(run=run)
        return one

    one = command("to-hf", to_hf, "checkpoint", "out")
    one.add_argument("--family", default="", help="default: the first that can express the model")
    one.add_argument("--dtype", choices=DTYPES, default="fp32", help="default: fp32, as trained")
    one.add_argument("--no-tokenizer", action="store_true", help="weights and config.json alone")
    one.add_argument("--shard-gb", type=float, default=5.0, metavar="GB", help="largest file; default: 5")
    one.add_argument("--check", action="store_true", help="compare logits with `transformers`")
    one = command("from-hf", from_hf, "directory", "out")
    one.add_argument("--check", action="store_true", help="compare logits with `transformers`")
    one.add_argument(
        "--ignore-field",
        action="append",
        default=[],
        metavar="NAME",
        help="a field of config.json that is not known, and does not change what the model computes; may be repeated",
    )
    command("to-torch", to_torch, "checkpoint", "out")
    command("from-torch", from_torch, "file", "out")
    one = command("from-nanogpt", from_nanogpt, "file", "out")
    one.add_argument(
        "--tokenizer",
        metavar="CORPUS",
        help="whose tokenizer it was: a prepared corpus, meta.pkl, or any other that prepare takes",
    )
    command("to-nanogpt", to_nanogpt, "checkpoint", "out")
    one = command("to-deepspeed", to_deepspeed, "checkpoint", "out")
    one.add_argument("--stage", type=int, choices=(1, 2, 3), help="a ZeRO directory of this stage ...")
    one.add_argument("--world", type=int, default=1, metavar="N", help="... for so many ranks; default: 1")
    one.add_argument("--universal", action="store_true", help="or a universal checkpoint, for any")
    one = command("from-deepspeed", from_deepspeed, "directory", "out")
    one.add_argument("--like", required=True, metavar="DIR", help="run or checkpoint whose config and tokenizer hold")
    command("average", average, "out", "checkpoints")
    one = command("diff", diff, "a", "b")
    one.add_argument("--all", action="store_true", help="show equal tensors too")
    command("inspect", inspect, "checkpoint")
    command("verify", verify, "checkpoint")
    return top


def to_hf(options: argparse.Namespace) -> None:
    """Write a directory for Hugging Face's `from_pretrained`."""
    path, dtype = open_checkpoint(options.checkpoint), DTYPES[options.dtype]
    config, tokenizer = load_saved(path), None
    if options.no_tokenizer or not (path / TOKENIZER_FILE).exists():
        console.print(f"without a tokenizer: {'--no-tokenizer' if options.no_tokenizer else f'{path} has none'}")
    else:
        tokenizer = Tokenizer.load(path)
    ids = json.loads((path / TOKEN_IDS).read_text(encoding="utf-8")) if (path / TOKEN_IDS).exists() else None
    generation = (path / GENERATION_FILE).read_bytes() if (path / GENERATION_FILE).exists() else None
    with write_atomically(Path(options.out)) as aside:
        shard_bytes = int(options.shard_gb * 1e9)
        with shown(NativeWeights(path), "converting") as weights:
            view = hf_convert.export_hf(
                weights, config, tokenizer, aside, options.family, dtype, shard_bytes, ids, generation
            )
        with shown(view, "checking") as seen:
            verify_written(SafetensorsWeights(aside), seen, dtype)
        family = hf_convert.read_config(aside)[0]
        probe = stream_probe(NativeWeights(path), config.model)
        show_probe(stored_probe(path), probe, path)
        written = hf_convert.from_huggingface(SafetensorsWeights(aside), config.model, family)
        exported = replace(stream_probe(written, config.model), weights=options.dtype)
        show_probe(probe, exported, aside)
        (aside / PROBE).write_bytes(exported.dump())
        if options.check:
            console.print(compare_logits(path, aside, dtype))
    console.print(f"wrote {options.out}: {len(view.shapes)} tensors, {options.dtype}")
    if tokenizer is not None and (names := sorted(tokenizer.original_files())):
        console.print(f"tokenizer: the original files, unchanged: {', '.join(names)}")
        if extra := extra_ids(config):
            console.print(f"the {extra} ids that the objective adds, from {tokenizer.vocab_size}, have no names there")
    elif tokenizer is not None and hf_convert.read_config(Path(options.out))[0] == "qwen2":
        console.print(
            "load its tokenizer with PreTrainedTokenizerFast; AutoTokenizer takes Qwen2's own: docs/checkpoints.md"
        )


def from_hf(options: argparse.Namespace) -> None:
    """Write a checkpoint of a directory that `from_pretrained` reads."""
    directory = Path(options.directory)
    family, model = hf_convert.read_config(directory, options.ignore_field)
    theirs = open_huggingface(directory)
    view = hf_convert.from_huggingface(theirs, model, family)
    if unused := hf_convert.find_unused_heads(theirs):
        console.print(f"left out: {', '.join(unused)}: heads for sentence pairs, which masked tokens do not use")
    tokenizer = None
    try:
        tokenizer = import_tokenizer(directory)
    except CheckpointError as error:
        console.print(f"without a tokenizer: {error}")
    files = files_of(model, tokenizer, directory) | {
        TOKEN_IDS: json.dumps(hf_convert.read_token_ids(directory)).encode()
    }
    if (directory / GENERATION_FILE).exists():
        files[GENERATION_FILE] = (directory / GENERATION_FILE).read_bytes()
    write(Path(options.out), view, files, directory if options.check else None, stored_probe(directory))


def to_torch(options: argparse.Namespace) -> None:
    """Write one file of `torch.save`: {"model": ..., "optim": ..., "files": ...}."""
    path = open_checkpoint(options.checkpoint)
    weights = NativeWeights(path)
    content: dict[str, dict[str, Tensor | str]] = {"model": {}, "optim": {}}
    for name in track(weights.shapes, "reading"):
        kind, _, rest = name.partition(".")
        content.setdefault(kind, {})[rest] = weights.read(name)
    content["files"] = {name: text.decode() for name, text in small_files(path).items()}
    with write_atomically(Path(options.out)) as aside:
        torch.save(content, aside)
        written = _of_torch(load_torch(aside))
        verify_written(written, weights, torch.float32)
        show_probe(stored_probe(path), stream_probe(written, load_saved(path).model), path)
    console.print(f"wrote {options.out}: {len(weights.shapes)} tensors")


def from_torch(options: argparse.Namespace) -> None:
    """Write a checkpoint of a file that to-torch wrote."""
    content = load_torch(Path(options.file))
    texts = content.get("files")
    if not isinstance(texts, dict) or not all(isinstance(each, str) for pair in texts.items() for each in pair):
        raise CheckpointError(f"{options.file}: has no files; it was not written by to-torch")
    if outside := [name for name in texts if "/" in name or name in ("", ".", "..")]:
        raise CheckpointError(f"{options.file}: names a file outside the checkpoint: {outside[0]!r}")
    files = {name: text.encode() for name, text in texts.items()}
    if CONFIG not in files:
        raise CheckpointError(f"{options.file}: has no config; it was not written by to-torch")
    probe = parse_probe(files[PROBE], f"{options.file}: {PROBE}") if PROBE in files else None
    write(Path(options.out), _of_torch(content), files, probe=probe)


def _of_torch(content: Mapping[str, Mapping[str, Tensor]]) -> Weights:
    kinds = {
        kind: check_only_tensors(tensors, f"a file of torch.save: {kind}")
        for kind, tensors in content.items()
        if kind != "files"
    }
    return DictWeights({f"{kind}.{name}": tensor for kind, each in kinds.items() for name, tensor in each.items()})


def from_nanogpt(options: argparse.Namespace) -> None:
    """Write a checkpoint of nanoGPT's ckpt.pt."""
    model, theirs = read_nanogpt(load_torch(Path(options.file)), options.file)
    tokenizer = build_tokenizer(options.tokenizer, None, lambda: ()) if options.tokenizer else None
    view = hf_convert.from_huggingface(theirs, model, "nanogpt")
    write(Path(options.out), view, files_of(model, tokenizer, Path(options.file)))


def to_nanogpt(options: argparse.Namespace) -> None:
    """Write nanoGPT's ckpt.pt."""
    path = open_checkpoint(options.checkpoint)
    config, weights = load_saved(path), NativeWeights(path)
    with write_atomically(Path(options.out)) as aside:
        with shown(weights, "converting") as seen:
            torch.save(nanogpt_content(seen, config, read_progress(Folder(path)).step), aside)
        probe = stream_probe(weights, config.model)
        show_probe(stored_probe(path), probe, path)
        model, theirs = read_nanogpt(load_torch(aside), str(aside))
        show_probe(probe, stream_probe(hf_convert.from_huggingface(theirs, model, "nanogpt"), model), aside)
    console.print(f"wrote {options.out}: {len(theirs.shapes)} tensors; its optimizer starts anew")


def to_deepspeed(options: argparse.Namespace) -> None:
    """Write a ZeRO 1, 2 or 3 directory, or a universal checkpoint."""
    if bool(options.stage) == options.universal:
        raise CheckpointError("give either --stage 1, 2 or 3 (and --world), or --universal")
    path = open_checkpoint(options.checkpoint)
    config, step = load_saved(path), read_progress(Folder(path)).step
    groups, settings, shared = groups_of(config)
    show_probe(stored_probe(path), stream_probe(NativeWeights(path), config.model), path)
    with shown(NativeWeights(path), "converting") as weights:
        if options.universal:
            made = write_universal(Path(options.out), weights, step=step)
        else:
            how = {"groups": groups, "settings": settings, "step": step, "shared": shared}
            made = write_deepspeed(Path(options.out), weights, options.stage, options.world, **how)
    with shown(weights, "checking") as seen:
        written = open_deepspeed(made)
        verify_written(
            LazyWeights({name: written.shapes[name] for name in seen.shapes}, written.read), seen, torch.float32
        )
    console.print(f"wrote {made}: {len(weights.shapes)} tensors")


def from_deepspeed(options: argparse.Namespace) -> None:
    """Write a checkpoint of a DeepSpeed directory, moments included."""
    like = open_checkpoint(options.like)
    config = load_saved(like)
    groups, _, shared = groups_of(config)
    found = open_deepspeed(Path(options.directory), groups)
    wanted = {f"model.{name}": shape for name, shape in hf_convert.model_shapes(config.model).items()}
    for name, shape in wanted.items():
        if found.shapes.get(name) != shape:
            there = f"has shape {list(found.shapes[name])}" if name in found.shapes else "is missing"
            raise CheckpointError(f"{options.directory}: {name} {there}; --like {like} has {list(shape)}")
    other = {name for name in found.shapes if name.startswith("model.")} - wanted.keys()
    if unknown := sorted(other - {f"model.{name}" for name in shared}):
        raise CheckpointError(f"{options.directory}: {unknown[0]} is no parameter of the model of --like {like}")
    shapes = {name: shape for name, shape in found.shapes.items() if name not in other}
    write(Path(options.out), LazyWeights(shapes, found.read), small_files(like) | fresh_progress())


def groups_of(config: Config) -> tuple[list[list[str]], list[dict[str, Any]], dict[str, str]]:
    """(names of each of the optimizer's groups, the rest of its settings, {second name: first} of shared ones)."""
    with torch.device("meta"):
        model = build_model(config.model)
    name_of = {parameter: name for name, parameter in model.named_parameters()}
    optimizer = build_optimizer(config.optim, model.named_parameters())
    groups = [[name_of[parameter] for parameter in group["params"]] for group in optimizer.param_groups]
    settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    every = model.named_parameters(remove_duplicate=False)
    return groups, settings, {name: name_of[p] for name, p in every if name != name_of[p]}


def average(options: argparse.Namespace) -> None:
    """Write the mean of the weights of several checkpoints, without moments."""
    paths = [open_checkpoint(each) for each in options.checkpoints]
    every = [NativeWeights(path) for path in paths]
    shapes = {name: shape for name, shape in every[0].shapes.items() if name.startswith("model.")}
    for path, other in zip(paths, every, strict=True):
        if {name: shape for name, shape in other.shapes.items() if name.startswith("model.")} != shapes:
            raise CheckpointError(f"{path}: is of another model than {paths[0]}")
        odd = function_differences(read_config(paths[0]), read_config(path))
        if odd := [each for each in odd if each.key != "objective"]:
            values = f"{odd[0].key} {odd[0].now}, {odd[0].before} there"
            raise CheckpointError(f"{path}: is of another model than {paths[0]}: {values}")

    def mean(name: str) -> Tensor:
        return torch.stack([each.read(name).double() for each in every]).mean(0).float()

    write(Path(options.out), LazyWeights(shapes, mean), small_files(paths[-1]))


def diff(options: argparse.Namespace) -> int:
    """Say where two checkpoints differ."""
    a, b = open_weights(options.a), open_weights(options.b)
    table = Table("tensor", "shape", "largest difference", "relative to the norm")
    differ = 0
    for name in track(sorted(a.shapes.keys() | b.shapes.keys()), "comparing"):
        if a.shapes.get(name) != b.shapes.get(name):
            differ += 1
            table.add_row(name, f"{_shape(a, name)} and {_shape(b, name)}", "", "")
            continue
        first, second = a.read(name).double(), b.read(name).double()
        equal = torch.equal(first, second)
        differ += not equal
        if not equal or options.all:
            off = first - second
            relative = float(off.norm() / first.norm()) if first.norm() else float(off.norm())
            table.add_row(name, _shape(a, name), f"{float(off.abs().max()):.3e}", f"{relative:.3e}")
    if table.row_count:
        console.print(table)
    console.print(f"{differ} of {len(a.shapes.keys() | b.shapes.keys())} tensors differ")
    return 1 if differ else 0


def inspect(options: argparse.Namespace) -> int:
    """List the tensors of a checkpoint."""
    weights = open_weights(options.checkpoint)
    table = Table("tensor", "shape", "type", "norm", "largest", "not finite")
    bad = elements = 0
    for name in track(sorted(weights.shapes), "reading"):
        tensor = weights.read(name)
        finite = torch.isfinite(tensor)
        wrong, values = int((~finite).sum()), tensor[finite].double()
        bad, elements = bad + wrong, elements + tensor.numel()
        largest = float(values.abs().max()) if values.numel() else 0.0
        kind = str(tensor.dtype).removeprefix("torch.")
        table.add_row(name, _shape(weights, name), kind, f"{float(values.norm()):.4g}", f"{largest:.4g}", str(wrong))
    console.print(table)
    console.print(f"{len(weights.shapes)} tensors, {elements:,} elements, {bad:,} of them not finite")
    return 2 if bad else 0


def verify(options: argparse.Namespace) -> None:
    """Check every byte of a checkpoint against its manifest, and its weights against its probe."""
    folder = resolve_checkpoint(options.checkpoint)
    manifest.verify(folder)
    console.print(f"{folder}: every byte is as it was saved")
    path = folder.local or open_checkpoint(options.checkpoint)
    stored = stored_probe(path)
    show_probe(stored, stream_probe(NativeWeights(path), load_saved(path).model) if stored else None, path)


def open_weights(place: str) -> Weights:
    """Of a run, a checkpoint, a directory of Hugging Face's, or a file of to-torch."""
    path = Path(place)
    if path.is_file():
        return _of_torch(load_torch(path))
    if any(path.glob("*.safetensors")) or (path / TORCH_FILE).exists() or (path / TORCH_INDEX).exists():
        return open_huggingface(path)
    return NativeWeights(open_checkpoint(place))


def write(
    out: Path, view: Weights, files: Mapping[str, bytes], theirs: Path | None = None, probe: Probe | None = None
) -> None:
    """A checkpoint at `out`, read again before it is there, and compared with `theirs` if that is given.

    It gets a probe of its own, which is compared with the `probe` of what it was made of if there is one.
    """
    model = parse_saved(files[CONFIG].decode(), CONFIG).model
    found = stream_probe(view, model)
    if probe is not None:
        show_probe(probe, replace(found, weights=probe.weights), out)
    with write_atomically(out) as aside:
        with shown(view, "converting") as seen:
            write_native(aside, seen, {**files, PROBE: found.dump()})
        with shown(view, "checking") as seen:
            verify_written(NativeWeights(aside), seen, torch.float32)
        if theirs is not None:
            console.print(compare_logits(aside, theirs))
    console.print(f"wrote {out}: {len(view.shapes)} tensors, {found}; go on with it: init_from={out}")


def stored_probe(path: Path) -> Probe | None:
    """The probe beside a checkpoint or an export; None where there is none that this version can compare."""
    return parse_probe((path / PROBE).read_bytes(), str(path / PROBE)) if (path / PROBE).exists() else None


def show_probe(before: Probe | None, now: Probe | None, place: Path) -> None:
    """Print how close two probes are. Raises CheckpointError where they differ by more than rounding."""
    if before is None or now is None:
        console.print(f"{place}: has no probe that this version can compare; the weights are taken as they are")
    else:
        console.print(compare_probes(before, now, str(place)))


def files_of(model: ModelConfig, tokenizer: Tokenizer | None, source: Path) -> dict[str, bytes]:
    """The small files of a checkpoint that comes from elsewhere."""
    objective = {"encoder": "masked", "encoder_decoder": "span"}.get(model.architecture, "causal")
    config = Config.model_validate(
        {
            "run": {"dir": str(source), "steps": 1},
            "model": model.model_dump(),
            "data": {"seq_len": model.max_seq_len, "global_batch": 1, "micro_batch": 1},
            "objective": {"name": objective},
        }
    )
    files = {
        CONFIG: dump(config).encode(),
        "environment.json": json.dumps({"converted_from": str(source), "dist-llm": version("dist-llm")}).encode(),
    }
    return files | fresh_progress() | ({TOKENIZER_FILE: tokenizer.file_bytes()} if tokenizer is not None else {})


def fresh_progress() -> dict[str, bytes]:
    """That of a run which begins."""
    return {PROGRESS: json.dumps(Progress().as_dict()).encode()}


def small_files(path: Path) -> dict[str, bytes]:
    """Those beside the tensors of a checkpoint."""
    return {
        file.name: file.read_bytes()
        for file in path.iterdir()
        if file.suffix in (".json", ".yaml") and file.name != "manifest.json"
    }


@contextmanager
def shown(weights: Weights, what: str) -> Iterator[Weights]:
    """The same, with a bar that shows how many tensors have been read."""
    with Bar() as bar:
        task = bar.add_task(what, total=len(weights.shapes))

        def read(name: str) -> Tensor:
            bar.advance(task)
            return weights.read(name)

        yield LazyWeights(weights.shapes, read)


def _shape(weights: Weights, name: str) -> str:
    return "×".join(map(str, weights.shapes[name])) if name in weights.shapes else "none"


if __name__ == "__main__":
    sys.exit(main())
