"""`dist-llm convert to-hf` and `from-hf` convert a checkpoint to a directory of Hugging Face, and back."""

import json
from dataclasses import replace
from pathlib import Path

from dist_llm.checkpoint.find_checkpoint import fetch_verified_checkpoint
from dist_llm.checkpoint.native_weights import NativeWeights
from dist_llm.checkpoint.probe import PROBE_FILE
from dist_llm.commands.conversion import (
    build_checkpoint_files,
    check_probe,
    console,
    read_probe,
    show_progress,
    write_checkpoint,
)
from dist_llm.config.load import load_saved_config
from dist_llm.config.schema import Config
from dist_llm.config.sequence_lengths import count_objective_ids
from dist_llm.convert import hf_import
from dist_llm.convert.export_tokenizers import import_tokenizer
from dist_llm.convert.hf_export import export_hf
from dist_llm.convert.hf_parity import compare_logits
from dist_llm.convert.layerwise_probe import compute_probe_layerwise
from dist_llm.convert.weights import SafetensorsWeights, open_huggingface
from dist_llm.convert.write_weights import DTYPES, verify_written, write_atomically
from dist_llm.errors import CheckpointError
from dist_llm.launch.host_memory import return_freed_memory
from dist_llm.text.hf_folder import GENERATION_FILE
from dist_llm.text.tokenizer import TOKENIZER_FILE, Tokenizer

TOKEN_IDS_FILE = "token_ids.json"  # special ids of an imported checkpoint, for its export


def to_hf(
    checkpoint: str,
    out: str,
    family: str = "",
    dtype: str = "fp32",
    no_tokenizer: bool = False,
    shard_gb: float = 5.0,
    check: bool = False,
) -> None:
    """Write a directory for `from_pretrained`, with the tokenizer. With `check`, compare logits with transformers.

    Raises CheckpointError if no family can express the model, or the written weights or logits differ.
    """
    return_freed_memory()
    path, torch_dtype = fetch_verified_checkpoint(checkpoint), DTYPES[dtype]
    config, tokenizer = load_saved_config(path), _load_tokenizer(path, no_tokenizer)
    token_ids = _read_if_exists(path / TOKEN_IDS_FILE)
    with write_atomically(Path(out)) as temporary:
        shard_bytes = int(shard_gb * 1e9)
        with show_progress(NativeWeights(path), "converting") as weights:
            exported = export_hf(
                weights,
                config,
                tokenizer,
                temporary,
                family=family,
                dtype=torch_dtype,
                shard_bytes=shard_bytes,
                token_ids=None if token_ids is None else json.loads(token_ids),
                generation_config=_read_if_exists(path / GENERATION_FILE),
            )
        with show_progress(exported, "checking") as tracked:
            verify_written(SafetensorsWeights(temporary), tracked, torch_dtype)
        family = hf_import.read_hf_config(temporary).family
        probe = compute_probe_layerwise(NativeWeights(path), config.model)
        check_probe(read_probe(path), probe, path)
        written = hf_import.from_huggingface(SafetensorsWeights(temporary), config.model, family)
        written_probe = replace(compute_probe_layerwise(written, config.model), weights=dtype)
        check_probe(probe, written_probe, temporary)
        (temporary / PROBE_FILE).write_bytes(written_probe.dump())
        if check:
            console.print(compare_logits(path, temporary, torch_dtype))
    console.print(f"wrote {out}: {len(exported.shapes)} tensors, {dtype}")
    _report_tokenizer(tokenizer, config, family)


def _read_if_exists(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


def _load_tokenizer(checkpoint: Path, no_tokenizer: bool) -> Tokenizer | None:
    if no_tokenizer or not (checkpoint / TOKENIZER_FILE).exists():
        reason = "--no-tokenizer" if no_tokenizer else f"{checkpoint} has none"
        console.print(f"without a tokenizer: {reason}")
        return None
    return Tokenizer.load(checkpoint)


def _report_tokenizer(tokenizer: Tokenizer | None, config: Config, family: str) -> None:
    if tokenizer is None:
        return
    if names := sorted(tokenizer.get_original_files()):
        console.print(f"tokenizer: the original files, unchanged: {', '.join(names)}")
        if count := count_objective_ids(config):
            console.print(f"the {count} ids of the objective, from {tokenizer.vocab_size} on, have no names there")
    elif family == "qwen2":
        console.print(
            "load the tokenizer with PreTrainedTokenizerFast; AutoTokenizer uses Qwen2's own: docs/checkpoints.md"
        )


def from_hf(directory: str, out: str, check: bool = False, ignore_field: list[str] | None = None) -> None:
    """Convert a directory that `from_pretrained` reads to a checkpoint.

    Raises CheckpointError if the family or a field of config.json is unknown, or the written weights or logits differ.
    """
    return_freed_memory()
    source = Path(directory)
    family, model = hf_import.read_hf_config(source, ignore_field or [])
    hf_weights = open_huggingface(source)
    weights = hf_import.from_huggingface(hf_weights, model, family)
    if heads := hf_import.find_unused_heads(hf_weights):
        console.print(f"not converted: {', '.join(heads)}: heads for sentence pairs, unused by masked prediction")
    if layer := hf_import.find_prediction_layer(hf_weights, model, family):
        console.print(f"not converted: {layer}*: a layer that predicts further tokens, unused by causal prediction")
    tokenizer = None
    try:
        tokenizer = import_tokenizer(source)
    except CheckpointError as error:
        console.print(f"without a tokenizer: {error}")
    files = build_checkpoint_files(model, tokenizer, source)
    files[TOKEN_IDS_FILE] = json.dumps(hf_import.read_token_ids(source)).encode()
    if (source / GENERATION_FILE).exists():
        files[GENERATION_FILE] = (source / GENERATION_FILE).read_bytes()
    write_checkpoint(Path(out), weights, files, source if check else None, read_probe(source))
