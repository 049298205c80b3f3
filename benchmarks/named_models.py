"""The models that benchmarks know by name, each with a batch size and a sequence length."""

from collections.abc import Sequence

from dist_llm.config.check import check
from dist_llm.config.derive import resolve_config
from dist_llm.config.load import load_config, raise_violations
from dist_llm.config.schema import Config

GPT2 = "positions=learned norm=layernorm activation=gelu bias=true tie_embeddings=true"
LLAMA = "positions=rope norm=rmsnorm activation=swiglu"
# Each name has keys of the section `model`, then of `data`. The vocabulary of GPT-2 is padded, as in nanoGPT.
NAMED_MODELS = {
    "gpt2-cpu": (f"{GPT2} d_model=384 n_layers=6 n_heads=6 vocab_size=8192", "global_batch=8 seq_len=256"),
    "llama-cpu": (
        f"{LLAMA} d_model=512 n_layers=8 n_heads=8 n_kv_heads=4 vocab_size=32000",
        "global_batch=4 seq_len=512",
    ),
    "gpt2-124m": (f"{GPT2} d_model=768 n_layers=12 n_heads=12 vocab_size=50304", "global_batch=16 seq_len=1024"),
    "llama-160m": (
        f"{LLAMA} d_model=768 n_layers=12 n_heads=12 d_ff=3072 vocab_size=32000",
        "global_batch=8 seq_len=2048",
    ),
    # Llama 3.2 1B
    "llama-1b": (
        f"{LLAMA} d_model=2048 n_layers=16 n_heads=32 n_kv_heads=8 d_ff=8192 vocab_size=128256 rope_theta=5e5 "
        "tie_embeddings=true",
        "global_batch=4 seq_len=2048",
    ),
    # Four layers of Llama 3 8B, with a smaller vocabulary
    "llama-8b": (
        f"{LLAMA} d_model=4096 n_layers=4 n_heads=32 n_kv_heads=8 d_ff=14336 vocab_size=32000 rope_theta=5e5",
        "global_batch=2 seq_len=4096",
    ),
}


def make_named_config(name: str, overrides: Sequence[str] = (), ranks: int = 1) -> Config:
    """Resolve the config of a named model for `ranks` ranks; raises ConfigError if the overrides do not fit."""
    model_keys, data_keys = NAMED_MODELS[name]
    keys = [f"model.{key}" for key in model_keys.split()] + [f"data.{key}" for key in data_keys.split()]
    config, problems = load_config(None, ["run.dir=unused", "run.steps=1000", "data.path=unused", *keys, *overrides])
    raise_violations(problems)
    assert config is not None
    raise_violations(check(config, ranks, tokenizer_size=0))
    return resolve_config(config, ranks, tokenizer_size=0)
