"""Check that a checkpoint and a Hugging Face directory are the same model, by comparing logits on a fixed batch."""

from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_llm.checkpoint.checkpoint_state import TorchState
from dist_llm.checkpoint.load_checkpoint import load_checkpoint
from dist_llm.config.load import load_saved_config
from dist_llm.convert.hf_moe_codecs import get_moe
from dist_llm.errors import CheckpointError
from dist_llm.models.attention_mask import AttentionMask, EncoderInput
from dist_llm.models.build_model import build_model

NUM_ROWS, ROW_TOKENS = 2, 32  # shape of the batch of random ids
MAX_LOGIT_DIFFERENCE = 1e-4  # in fp32, relative to the largest logit if that is above 1
MAX_KL = 1e-9  # KL divergence in nats, in fp64


@torch.no_grad()
def compare_logits(checkpoint: Path, hf_folder: Path, dtype: torch.dtype = torch.float32) -> str:
    """Compare the logits of both models and return a line with the differences. Our weights are rounded to `dtype`.

    Both models are in memory, at the end in fp64. Raises CheckpointError if the differences exceed rounding, or
    `transformers` is not installed.
    """
    try:
        import transformers
    except ImportError:
        raise CheckpointError("--check needs `transformers`: pip install transformers") from None
    config = load_saved_config(checkpoint)
    native_model = build_model(config.model).eval()
    load_checkpoint(checkpoint, TorchState(native_model), with_moments=False)
    native_model.to(dtype).float()
    hf_classes = {"encoder": "AutoModelForMaskedLM", "encoder_decoder": "AutoModelForSeq2SeqLM"}
    hf_class = getattr(transformers, hf_classes.get(config.model.architecture, "AutoModelForCausalLM"))
    hf_model = hf_class.from_pretrained(hf_folder, dtype=torch.float32, attn_implementation="eager").eval()
    num_tokens = min(ROW_TOKENS, config.model.max_seq_len)
    ids = torch.randint(config.model.vocab_size, (NUM_ROWS, num_tokens), generator=torch.Generator().manual_seed(0))
    difference = compute_logit_difference(native_model, hf_model, ids, config.model.architecture)
    native_model, hf_model = native_model.double(), hf_model.double()
    if get_moe(config.model) is not None:
        hf_model.set_experts_implementation("eager")  # the grouped product does not support fp64
    for module in hf_model.modules():
        # The RMSNorm of Hugging Face computes in fp32. Those with other weights (Gemma) stay: their rounding is below
        # MAX_KL.
        if type(module).__name__.endswith(("RMSNorm", "T5LayerNorm")) and hasattr(module, "variance_epsilon"):
            module.forward = partial(_rms_norm, module.weight, module.variance_epsilon)
    kl_divergence = _compute_kl_divergence(native_model, hf_model, ids, config.model.architecture)
    line = f"logits differ by {difference:.1e} at most in fp32, distributions by a KL of {kl_divergence:.1e} in fp64"
    if difference > MAX_LOGIT_DIFFERENCE or kl_divergence > MAX_KL:
        raise CheckpointError(f"{checkpoint} and {hf_folder} are not the same model: {line}")
    return line


def _rms_norm(weight: Tensor, eps: float, x: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


def _compute_logits(
    native_model: nn.Module, hf_model: nn.Module, ids: Tensor, architecture: str
) -> tuple[Tensor, Tensor]:
    """Return the logits of both models on `ids`, [rows, tokens]: ours, and those of Hugging Face."""
    if architecture == "encoder_decoder":
        return native_model(ids, encoder_input=EncoderInput(ids.flip(1))), hf_model(
            input_ids=ids.flip(1), decoder_input_ids=ids
        ).logits
    return native_model(ids, mask=AttentionMask(architecture == "decoder")), hf_model(input_ids=ids).logits


def compute_logit_difference(native_model: nn.Module, hf_model: nn.Module, ids: Tensor, architecture: str) -> float:
    """Return the largest difference of the logits, relative to the largest logit if that is above 1."""
    actual, expected = _compute_logits(native_model, hf_model, ids, architecture)
    return float((actual - expected).abs().max() / expected.abs().max().clamp(min=1))


def _compute_kl_divergence(native_model: nn.Module, hf_model: nn.Module, ids: Tensor, architecture: str) -> float:
    """Return the largest KL divergence of the predictions for a position, in nats."""
    actual, expected = (logits.log_softmax(-1) for logits in _compute_logits(native_model, hf_model, ids, architecture))
    return float((expected.exp() * (expected - actual)).sum(-1).max())
