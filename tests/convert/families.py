"""Small models of each Hugging Face family, with random weights."""

from typing import Any

import torch

from dist_llm.convert.hf_config import parse_hf_config
from dist_llm.convert.hf_convert import from_huggingface
from dist_llm.convert.weights import DictWeights
from dist_llm.models.build_model import build_model

VOCAB, S, T = 61, 12, 16
SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 32}),
    "llama": ("LlamaConfig", "LlamaForCausalLM", {**SMALL, "num_key_value_heads": 2}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {**SMALL, "num_key_value_heads": 2, "sliding_window": None}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {**SMALL, "num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**SMALL, "num_key_value_heads": 2, "head_dim": 16}),
    "bert": ("BertConfig", "BertForMaskedLM", {**SMALL, "max_position_embeddings": 32}),
    "t5": (
        "T5Config",
        "T5ForConditionalGeneration",
        {
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_decoder_layers": 3,
            "num_heads": 6,
            "relative_attention_num_buckets": 8,
            "relative_attention_max_distance": 12,
            "feed_forward_proj": "gated-gelu",
            "tie_word_embeddings": False,
        },
    ),
    "bart": (
        "BartConfig",
        "BartForConditionalGeneration",
        {
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 3,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "max_position_embeddings": 32,
        },
    ),
}
SINGLE_STACKS = ["gpt2", "llama", "mistral", "qwen2", "qwen3", "bert"]
ENCODER_DECODERS = ["t5", "bart"]


def build_hf_model(family: str) -> Any:
    """Build a Hugging Face model with random weights, biases and norms, so that each of them affects the logits."""
    import transformers

    config_name, model_name, sizes = FAMILIES[family]
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = getattr(transformers, config_name)(vocab_size=VOCAB, attn_implementation="eager", **sizes, **special)
    torch.manual_seed(0)
    hf_model = getattr(transformers, model_name)(config).eval()
    if family == "t5":  # the head of v1.1 is not tied
        hf_model.lm_head.weight = torch.nn.Parameter(hf_model.lm_head.weight.detach().clone())
    with torch.no_grad():
        for parameter in hf_model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return hf_model


def build_models(family: str) -> tuple[Any, Any, Any]:
    """Return (Hugging Face model with random weights, native model with the same weights, native config)."""
    hf_model = build_hf_model(family)
    config = parse_hf_config(hf_model.config.to_dict())
    native_model = build_model(config).eval()
    view = from_huggingface(DictWeights(hf_model.state_dict()), config, family)
    with torch.no_grad():
        for name, parameter in native_model.named_parameters():
            parameter.copy_(view.read(f"model.{name}"))
    return hf_model, native_model, config
