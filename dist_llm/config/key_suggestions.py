"""Suggest the config key that a user probably means by an unknown key."""

import difflib
from collections.abc import Sequence

# Name of a key in other trainers -> our key.
ALIASES = {
    "adam_epsilon": "optim.eps",
    "batch_size": "data.global_batch",
    "block_size": "data.seq_len",
    "context_length": "data.seq_len",
    "data_parallel_size": "parallel.dp_shard",
    "dtype": "precision",
    "embed_dim": "model.d_model",
    "epsilon": "optim.eps",
    "eval_interval": "eval.every",
    "evaluation": "eval",
    "ffn_hidden_size": "model.d_ff",
    "global_batch_size": "data.global_batch",
    "grad_clip": "optim.clip",
    "hidden_dim": "model.d_model",
    "hidden_size": "model.d_model",
    "intermediate_size": "model.d_ff",
    "learning_rate": "optim.lr",
    "log_interval": "log.every",
    "logging": "log",
    "max_grad_norm": "optim.clip",
    "max_iters": "run.steps",
    "max_length": "data.seq_len",
    "max_position_embeddings": "model.max_seq_len",
    "max_steps": "run.steps",
    "micro_batch_size": "data.micro_batch",
    "min_lr": "schedule.min_ratio",
    "mixed_precision": "precision",
    "n_embd": "model.d_model",
    "num_attention_heads": "model.n_heads",
    "num_heads": "model.n_heads",
    "num_hidden_layers": "model.n_layers",
    "num_key_value_heads": "model.n_kv_heads",
    "num_kv_heads": "model.n_kv_heads",
    "num_layers": "model.n_layers",
    "num_steps": "run.steps",
    "optimizer": "optim",
    "out_dir": "run.dir",
    "output_dir": "run.dir",
    "per_device_train_batch_size": "data.micro_batch",
    "pipeline_parallel_size": "parallel.pp",
    "rms_norm_eps": "model.norm_eps",
    "save_interval": "checkpoint.every",
    "save_steps": "checkpoint.every",
    "scheduler": "schedule",
    "sequence_length": "data.seq_len",
    "tensor_parallel_size": "parallel.tp",
    "tie_word_embeddings": "model.tie_embeddings",
    "torch_compile": "compile",
    "train": "run",
    "training": "run",
    "train_steps": "run.steps",
    "warmup": "schedule.warmup_steps",
    "warmup_iters": "schedule.warmup_steps",
}


def suggest_keys(unknown_key: str, valid_keys: Sequence[str]) -> str:
    """Return the end of a message `unknown key`: keys that the user may mean, or else the valid keys of the section.

    Only the last component of each dotted key is compared, because full keys of one section look alike.
    """
    section, _, name = unknown_key.rpartition(".")
    section_keys = [key for key in valid_keys if key.rpartition(".")[0] == section]
    # In this order: the same name in another section, an alias, a similar name in the section, any similar name.
    suggestions = [key for key in valid_keys if _last_component(key) == name]
    suggestions = suggestions or [key for alias, key in ALIASES.items() if alias == name]
    suggestions = suggestions or _find_similar(name, section_keys) or _find_similar(name, valid_keys)
    if suggestions:
        return f"; did you mean {' or '.join(suggestions)}?"
    return f"; valid here: {', '.join(map(_last_component, section_keys))}" if section_keys else ""


def _find_similar(name: str, keys: Sequence[str]) -> list[str]:
    """Return the keys whose last component is the closest match of `name`."""
    closest = difflib.get_close_matches(name, map(_last_component, keys), n=1, cutoff=0.6)
    return [key for key in keys if _last_component(key) in closest]


def _last_component(key: str) -> str:
    return key.rpartition(".")[2]
