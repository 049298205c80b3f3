"""The model that a config asks for."""

from dist_llm.config.schema import ModelConfig
from dist_llm.losses.cross_entropy import CrossEntropy
from dist_llm.models.decoder import Decoder
from dist_llm.models.encoder_decoder import EncoderDecoder


def build_model(config: ModelConfig, loss: CrossEntropy | None = None) -> Decoder:
    """By `model.architecture`; an encoder is a decoder whose batches let all tokens see each other."""
    return EncoderDecoder(config, loss) if config.architecture == "encoder_decoder" else Decoder(config, loss)
