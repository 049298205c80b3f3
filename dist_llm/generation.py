"""Generate text with a trained model, token by token, with a KV cache."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from dist_llm.checkpoint.checkpoint_state import TorchState
from dist_llm.checkpoint.find_checkpoint import fetch_verified_checkpoint
from dist_llm.checkpoint.load_checkpoint import load_checkpoint
from dist_llm.config.load import load_saved_config
from dist_llm.config.objective_sections import PrefixSpec, SpanSpec, get_mode_token
from dist_llm.config.schema import Config
from dist_llm.convert.offload import load_offloaded
from dist_llm.errors import ConfigError, DataError
from dist_llm.launch.process_group import select_device
from dist_llm.launch.world import World
from dist_llm.models.attention_mask import CAUSAL, AttentionMask, EncoderInput
from dist_llm.models.build_model import build_model
from dist_llm.models.decoder import Decoder
from dist_llm.models.kv_cache import KVCache
from dist_llm.text.tokenizer import TOKENIZER_FILE, Tokenizer


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters. `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 keep all tokens."""

    max_tokens: int = 128
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def check(self) -> None:
        """Raise ConfigError for a value outside its range."""
        rules = (
            (self.max_tokens >= 1, f"--max-tokens {self.max_tokens}: must be at least 1"),
            (self.temperature >= 0, f"--temperature {self.temperature}: must be at least 0 (0 is greedy)"),
            (self.top_k >= 0, f"--top-k {self.top_k}: must be at least 0 (0 keeps all)"),
            (0 < self.top_p <= 1, f"--top-p {self.top_p}: must be above 0 and at most 1 (1 keeps all)"),
        )
        if messages := [message for is_satisfied, message in rules if not is_satisfied]:
            raise ConfigError("\n".join(messages))


@dataclass(frozen=True)
class OffloadOptions:
    """Offloading of the blocks that do not fit on the device: `memory_bytes` to host memory, the rest to `folder`."""

    folder: Path
    memory_bytes: int


class LoadedModel(NamedTuple):
    """What generation needs of a checkpoint."""

    model: Decoder
    tokenizer: Tokenizer
    config: Config


def load_model(checkpoint: Path | str, device: torch.device, offload: OffloadOptions | None = None) -> LoadedModel:
    """Load a checkpoint, or the latest checkpoint of a run, for generation.

    The model is on `device` or, with `offload`, partly in host memory and on the disk. Raises DataError or ConfigError
    if the checkpoint cannot generate text.
    """
    path = fetch_verified_checkpoint(checkpoint)
    config = load_saved_config(path)
    if not (path / TOKENIZER_FILE).exists():
        raise DataError(
            f"{path}: has no tokenizer, so it cannot generate text; copy {TOKENIZER_FILE} of its corpus there"
        )
    if config.model.architecture == "encoder":
        raise ConfigError(
            f"{path}: cannot generate text with an encoder-only model: it predicts masked tokens and not the next token"
        )
    if offload is not None:
        model = load_offloaded(path, config.model, device, offload.folder, offload.memory_bytes)
        return LoadedModel(model, Tokenizer.load(path), config)
    with torch.device("meta"):
        model = build_model(config.model)
    model.to_empty(device=device)
    load_checkpoint(path, TorchState(model), with_moments=False)
    return LoadedModel(model.eval(), Tokenizer.load(path), config)


@dataclass(frozen=True)
class Prompt:
    """A tokenized prompt."""

    ids: list[int]  # input of the decoder
    bidirectional: bool = False  # whether the tokens of `ids` attend to each other in both directions
    encoder_ids: list[int] | None = None  # input of the encoder, if there is one
    stop_ids: frozenset[int] = frozenset()  # tokens that end the generation


def encode_prompt(config: Config, tokenizer: Tokenizer, prompt: str) -> Prompt:
    """Tokenize a prompt in the format of the training objective. An empty prompt becomes the end-of-document token.

    If the objective is a mixture, use its first component that is not span corruption. With span corruption only, the
    prompt gets one corrupted span at its end, and the model generates this span.
    """
    vocabulary = tokenizer.build_objective_vocabulary()
    ids = tokenizer.encode_prompt(prompt) or [vocabulary.eot]
    components = config.objective.components
    component = next((candidate for candidate in components if candidate.name != "span"), components[0])
    mode_ids = [vocabulary.special_id(name)] if (name := get_mode_token(component)) else []
    start = vocabulary.special_id("start")
    has_encoder = config.model.architecture == "encoder_decoder"
    stop_ids = frozenset(
        (vocabulary.sentinel_id(1),) if tokenizer.eot is None else (tokenizer.eot, vocabulary.sentinel_id(1))
    )
    if isinstance(component, SpanSpec):
        sentinel = vocabulary.sentinel_id(0)
        corrupted_ids = [*mode_ids, *ids, sentinel, vocabulary.eot]
        if has_encoder:
            return Prompt([start, sentinel], encoder_ids=corrupted_ids, stop_ids=stop_ids)
        return Prompt([*corrupted_ids, sentinel], bidirectional=component.see_prefix, stop_ids=stop_ids)
    if has_encoder:
        return Prompt([start], encoder_ids=[*mode_ids, *ids], stop_ids=stop_ids)
    bidirectional = isinstance(component, PrefixSpec) and component.see_prefix
    return Prompt([*mode_ids, *ids], bidirectional=bidirectional, stop_ids=stop_ids)


@torch.no_grad()
def generate_tokens(
    model: torch.nn.Module, prompt: Prompt, sampling: Sampling, max_seq_len: int, use_cache: bool = True
) -> Iterator[int]:
    """Yield the sampled token ids after `prompt`: at most `max_tokens`, and at most `max_seq_len` with the prompt."""
    device = next((parameter.device for parameter in model.parameters() if not parameter.is_meta), torch.device("cpu"))
    generator = torch.Generator().manual_seed(sampling.seed)
    cache = KVCache() if use_cache else None
    encoder_arguments: dict[str, EncoderInput] = {}
    if prompt.encoder_ids is not None:
        encoder_arguments["encoder_input"] = EncoderInput(torch.tensor([prompt.encoder_ids], device=device))
    ids = list(prompt.ids)
    prefix_B = torch.tensor([len(prompt.ids)], device=device) if prompt.bidirectional else None
    for _ in range(min(sampling.max_tokens, max_seq_len - len(prompt.ids))):
        input_ids = ids[cache.length :] if cache is not None else ids
        # Later tokens attend to all of the cached prompt, so the prefix mask is only needed for the first forward.
        mask = CAUSAL if len(input_ids) == 1 else AttentionMask(causal=True, prefix_B=prefix_B)
        logits_BSV = model(torch.tensor([input_ids], device=device), mask=mask, cache=cache, **encoder_arguments)
        if cache is not None:
            encoder_arguments = {}  # the cache has the keys and values of the encoder output
        token = sample_token(logits_BSV[0, -1].float().cpu(), sampling, generator)
        ids.append(token)
        yield token


def sample_token(logits_V: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Sample one token id from logits [V].

    `top_p` keeps the nucleus: the smallest set of tokens with this total probability (Holtzman et al. 2020).
    """
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    logits_V = logits_V / sampling.temperature
    if 0 < sampling.top_k < len(logits_V):
        min_logit = logits_V.topk(sampling.top_k).values[-1]
        logits_V = logits_V.masked_fill(logits_V < min_logit, -torch.inf)
    probabilities_V, ids_V = logits_V.softmax(-1).sort(descending=True)
    if sampling.top_p < 1:  # skipped for 1, because the cumulative sum may round to 1 before the last token
        preceding_sum_V = probabilities_V.cumsum(-1) - probabilities_V
        probabilities_V = probabilities_V.masked_fill(preceding_sum_V >= sampling.top_p, 0.0)
    return int(ids_V[torch.multinomial(probabilities_V, 1, generator=generator)])


def generate_text(
    model: torch.nn.Module,
    tokenizer: Tokenizer,
    prompt: Prompt,
    sampling: Sampling,
    max_seq_len: int,
    *,
    stop: bool = True,
) -> Iterator[str]:
    """Yield the text of sampled tokens as soon as its characters are complete, up to a stop token of `prompt`.

    With `stop` false, the model runs on after a stop token, but no more text is yielded: all ranks of a sharded model
    must run the same number of forward passes. Raises ConfigError if the prompt is too long.
    """
    vocabulary = tokenizer.build_objective_vocabulary()
    if (prompt_len := max(len(prompt.ids), len(prompt.encoder_ids or ()))) >= max_seq_len:
        raise ConfigError(f"the prompt has {prompt_len} tokens, but the model takes at most {max_seq_len}; shorten it")
    decoder = tokenizer.build_incremental_decoder(prompt.ids)
    has_ended = False
    for token in generate_tokens(model, prompt, sampling, max_seq_len):
        has_ended = has_ended or token in prompt.stop_ids
        if has_ended and stop:
            break
        name = vocabulary.describe_added_id(token)  # not None for a special token of the objective
        if not has_ended and (text := decoder.end() + name if name else decoder.add(token)):
            yield text
    if text := decoder.end():
        yield text


def print_continuations(
    checkpoint: str, prompts: list[str], sampling: Sampling, offload: OffloadOptions | None = None
) -> None:
    """Print each prompt and its continuation while it is generated."""
    sampling.check()
    model, tokenizer, config = load_model(checkpoint, select_device(World()), offload)
    for index, prompt in enumerate(prompts):
        separator = "\n---\n" if index > 0 else ""
        print(separator + prompt, end="", flush=True)
        encoded_prompt = encode_prompt(config, tokenizer, prompt)
        for text in generate_text(model, tokenizer, encoded_prompt, sampling, config.model.max_seq_len):
            print(text, end="", flush=True)
        print()
