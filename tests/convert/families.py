"""Small models of each Hugging Face family, with random weights.

    hf_model, native_model, config = build_models("llama", tie_word_embeddings=True)
    assert_close(native_model(tokens_BS), hf_model(tokens_BS).logits)

FAMILIES has the sizes of each family. VARIANTS has models of a family with other fields, such as other RoPE scaling.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from dist_llm.convert.hf_config import parse_hf_config
from dist_llm.convert.hf_families import DECODER_FAMILIES
from dist_llm.convert.hf_import import from_huggingface
from dist_llm.convert.hf_moe_families import MOE_FAMILIES
from dist_llm.convert.weights import DictWeights
from dist_llm.models.build_model import build_model
from dist_llm.param_spec import iter_weights

VOCAB = 61
S, T = 12, 16  # sequence lengths of the decoder and the encoder
SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
SMALL = {**SIZES, "intermediate_size": 48}
GROUPED = {**SMALL, "num_key_value_heads": 2}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 32}),
    "llama": ("LlamaConfig", "LlamaForCausalLM", {**SMALL, "num_key_value_heads": 2}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {**SMALL, "num_key_value_heads": 2, "sliding_window": None}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {**SMALL, "num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**SMALL, "num_key_value_heads": 2, "head_dim": 16}),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", {**GROUPED, "head_dim": 8}),
    "gemma2": (
        "Gemma2Config",
        "Gemma2ForCausalLM",
        {
            **GROUPED,
            "head_dim": 8,
            "sliding_window": 3,
            "query_pre_attn_scalar": 4,
            "attn_logit_softcapping": 1.0,
            "final_logit_softcapping": 2.0,
        },
    ),
    "gemma3_text": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {
            **GROUPED,
            "num_hidden_layers": 7,
            "head_dim": 8,
            "sliding_window": 3,
            "query_pre_attn_scalar": 4,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                "full_attention": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 4.0},
            },
        },
    ),
    "olmo": ("OlmoConfig", "OlmoForCausalLM", GROUPED),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", GROUPED),
    "olmo3": (
        "Olmo3Config",
        "Olmo3ForCausalLM",
        {
            **GROUPED,
            "num_hidden_layers": 5,
            "sliding_window": 3,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                "full_attention": {**YARN, "rope_theta": 100.0},
            },
        },
    ),
    "smollm3": ("SmolLM3Config", "SmolLM3ForCausalLM", {**GROUPED, "num_hidden_layers": 5}),
    "granite": (
        "GraniteConfig",
        "GraniteForCausalLM",
        {
            **GROUPED,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.2,
            "logits_scaling": 4.0,
        },
    ),
    "glm": ("GlmConfig", "GlmForCausalLM", {**GROUPED, "head_dim": 8}),
    "glm4": ("Glm4Config", "Glm4ForCausalLM", {**GROUPED, "head_dim": 8}),
    "phi": ("PhiConfig", "PhiForCausalLM", GROUPED),
    "phi3": (
        "Phi3Config",
        "Phi3ForCausalLM",
        {
            **GROUPED,
            "max_position_embeddings": 64,
            "original_max_position_embeddings": 32,
            "sliding_window": 5,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 100.0,
                "partial_rotary_factor": 0.5,
                "short_factor": [1.5, 2.0],
                "long_factor": [3.0, 4.0],
                "original_max_position_embeddings": 32,
            },
        },
    ),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", SMALL),
    "falcon": (
        "FalconConfig",
        "FalconForCausalLM",
        {
            **SIZES,
            "new_decoder_architecture": True,
            "num_kv_heads": 2,
            "ffn_hidden_size": 48,
            "bias": True,
        },
    ),
    "cohere": ("CohereConfig", "CohereForCausalLM", {**GROUPED, "logit_scale": 0.5}),
    "cohere2": (
        "Cohere2Config",
        "Cohere2ForCausalLM",
        {**GROUPED, "num_hidden_layers": 5, "head_dim": 8, "sliding_window": 3, "logit_scale": 0.5},
    ),
    "nemotron": ("NemotronConfig", "NemotronForCausalLM", {**GROUPED, "head_dim": 8}),
    "stablelm": (
        "StableLmConfig",
        "StableLmForCausalLM",
        {**GROUPED, "use_qkv_bias": True, "rope_parameters": {"rope_theta": 100.0, "partial_rotary_factor": 0.5}},
    ),
    "starcoder2": ("Starcoder2Config", "Starcoder2ForCausalLM", {**GROUPED, "sliding_window": 3}),
    "opt": (
        "OPTConfig",
        "OPTForCausalLM",
        {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 32},
    ),
    "bloom": ("BloomConfig", "BloomForCausalLM", {"hidden_size": 36, "n_layer": 3, "n_head": 6}),
    "mixtral": (
        "MixtralConfig",
        "MixtralForCausalLM",
        {**GROUPED, "num_local_experts": 6, "num_experts_per_tok": 3, "sliding_window": 5},
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        {
            **GROUPED,
            "head_dim": 16,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 24,
            "mlp_only_layers": [1],
        },
    ),
    "olmoe": ("OlmoeConfig", "OlmoeForCausalLM", {**GROUPED, "num_experts": 8, "num_experts_per_tok": 3}),
    "glm4_moe": (
        "Glm4MoeConfig",
        "Glm4MoeForCausalLM",
        {
            **GROUPED,
            "head_dim": 8,
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 24,
            "n_shared_experts": 2,
            "routed_scaling_factor": 2.5,
            "n_group": 4,
            "topk_group": 2,
            "attention_bias": True,
            "use_qk_norm": True,
        },
    ),
    "granitemoe": (
        "GraniteMoeConfig",
        "GraniteMoeForCausalLM",
        {
            **GROUPED,
            "num_local_experts": 6,
            "num_experts_per_tok": 3,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.2,
            "logits_scaling": 4.0,
        },
    ),
    "gpt_oss": (
        "GptOssConfig",
        "GptOssForCausalLM",
        {
            **GROUPED,
            "head_dim": 8,
            "num_local_experts": 6,
            "num_experts_per_tok": 3,
            "sliding_window": 3,
            "rope_parameters": {**YARN, "rope_theta": 100.0, "truncate": False},
        },
    ),
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
FULL, SLIDING = "full_attention", "sliding_attention"
# Names of models: (family, changes of the fields of its small model).
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in DECODER_FAMILIES},
    "llama 3.1": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 100.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
    ),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0}}),
    "mistral 0.1": ("mistral", {"sliding_window": 4}),
    "qwen2 with windows": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 4, "layer_types": [FULL, SLIDING, SLIDING]},
    ),
    "qwen3 yarn": (
        "qwen3",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 100.0,
                "factor": 4.0,
                "original_max_position_embeddings": 8,
            }
        },
    ),
    "smollm3 with windows": (
        "smollm3",
        {
            "use_sliding_window": True,
            "sliding_window": 4,
            "layer_types": [SLIDING, FULL, SLIDING, SLIDING, FULL],
            "no_rope_layers": [1, 0, 0, 1, 1],
        },
    ),
    "gpt_neox sequential": ("gpt_neox", {"use_parallel_residual": False}),
    "falcon 7b": ("falcon", {"new_decoder_architecture": False, "multi_query": True, "bias": False}),
    "falcon 11b": ("falcon", {"num_ln_in_parallel_attn": 1}),
    "stablelm parallel": ("stablelm", {"use_parallel_residual": True}),
    "cohere with biases": ("cohere", {"attention_bias": True}),
    "starcoder2 without biases": ("starcoder2", {"use_bias": False}),
    "qwen3_moe each second layer": (
        "qwen3_moe",
        {"mlp_only_layers": [], "decoder_sparse_step": 2, "norm_topk_prob": True, "attention_bias": True},
    ),
    "qwen3_moe with a window": ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 4}),
    "olmoe normalized": ("olmoe", {"norm_topk_prob": True, "attention_bias": True}),
    "glm4_moe air": ("glm4_moe", {"n_group": 1, "topk_group": 1, "norm_topk_prob": False, "use_qk_norm": False}),
    "gpt_oss without biases of attention": ("gpt_oss", {"attention_bias": False, "layer_types": [FULL, SLIDING, FULL]}),
    "granitemoe with biases": ("granitemoe", {"attention_bias": True}),
    "nemotron with biases": ("nemotron", {"attention_bias": True, "mlp_bias": True}),
}
SINGLE_STACKS = [family for family in FAMILIES if family not in ("t5", "bart")]
ENCODER_DECODERS = ["t5", "bart"]


def build_hf_model(family: str, **changes: Any) -> Any:
    """Build a Hugging Face model with random weights, biases and norms, so that each of them affects the logits.

    `changes` are fields of its config.
    """
    import transformers

    config_name, model_name, sizes = FAMILIES[family]
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    fields = {"vocab_size": VOCAB, "attn_implementation": "eager", **sizes, **special, **changes}
    config = getattr(transformers, config_name)(**fields)
    torch.manual_seed(0)
    hf_model = getattr(transformers, model_name)(config).eval()
    if family == "t5":  # the head of v1.1 is not tied
        hf_model.lm_head.weight = torch.nn.Parameter(hf_model.lm_head.weight.detach().clone())
    scale = 0.3 if family in MOE_FAMILIES else 0.1  # routers need large logits
    with torch.no_grad():
        for parameter in hf_model.parameters():
            parameter.add_(torch.randn_like(parameter) * scale)
        for block in hf_model.model.layers if family == "gpt_oss" else ():
            block.mlp.experts.gate_up_proj.mul_(2)  # some values are clamped
        for name, buffer in hf_model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.add_(torch.randn_like(buffer) * scale)
    return hf_model


def to_hub_tensors(hf_model: Any, tensors: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """Return tensors of a Hugging Face model with the names and shapes of its files.

    In memory, transformers stacks the experts of a layer.
    """
    from transformers.core_model_loading import revert_weight_conversion

    is_moe = hf_model.config.model_type in MOE_FAMILIES
    return revert_weight_conversion(hf_model, dict(tensors)) if is_moe else tensors


class ModelPair(NamedTuple):
    """A Hugging Face model with random weights, and a native model with the same weights and its config."""

    hf_model: Any
    native_model: Any
    config: Any


def build_models(family: str, **changes: Any) -> ModelPair:
    """Build both models of a family; `changes` are fields of the Hugging Face config."""
    hf_model = build_hf_model(family, **changes)
    config = parse_hf_config(hf_model.config.to_dict())
    native_model = build_model(config).eval()
    view = from_huggingface(DictWeights(to_hub_tensors(hf_model, hf_model.state_dict())), config, family)
    with torch.no_grad():
        for name, tensor in iter_weights(native_model):
            tensor.copy_(view.read(f"model.{name}"))
    return ModelPair(hf_model, native_model, config)


def build_variant(name: str) -> ModelPair:
    """Build the models of one of VARIANTS."""
    family, changes = VARIANTS[name]
    return build_models(family, **changes)
