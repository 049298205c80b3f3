"""Generate text token by token, with a KV cache."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dist_llm.checkpoint import store
from dist_llm.checkpoint.checkpoint_state import TorchState
from dist_llm.config.load import load_saved
from dist_llm.config.objective_sections import PrefixSpec, SpanSpec, mode_of
from dist_llm.config.schema import Config
from dist_llm.convert.offload import load_offloaded
from dist_llm.errors import ConfigError, DataError
from dist_llm.launch.process_group import select_device
from dist_llm.launch.world import World
from dist_llm.models.attention import KVCache
from dist_llm.models.attention_mask import CAUSAL, AttentionMask, EncoderInput
from dist_llm.models.build_model import build_model
from dist_llm.models.decoder import Decoder
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
        if broken := [message for holds, message in rules if not holds]:
            raise ConfigError("\n".join(broken))


@dataclass(frozen=True)
class Offload:
    """Where to keep blocks that do not fit on the device: up to `memory_bytes` in host memory, the rest in `folder`."""

    folder: Path
    memory_bytes: int


def load_model(
    checkpoint: Path | str, device: torch.device, offload: Offload | None = None
) -> tuple[Decoder, Tokenizer, Config]:
    """Load the model of a checkpoint, or of a run's latest, for sampling: on one device or, with `offload`,
    dispatched."""
    path = store.open_checkpoint(checkpoint)
    config = load_saved(path)
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
        return model, Tokenizer.load(path), config
    with torch.device("meta"):
        model = build_model(config.model)
    model.to_empty(device=device)
    store.load_checkpoint(path, TorchState(model), with_moments=False)
    return model.eval(), Tokenizer.load(path), config


@dataclass(frozen=True)
class Prompt:
    """A tokenized prompt: the decoder's ids, the encoder's ids, and the tokens that end the generation."""

    ids: list[int]
    bidirectional: bool = False
    encoder_ids: list[int] | None = None
    stop_ids: frozenset[int] = frozenset()


def encode_prompt(config: Config, tokenizer: Tokenizer, prompt: str) -> Prompt:
    """Tokenize the prompt in the format of the training objective. An empty prompt becomes the end-of-document token.

    Of a mixture, use a component that predicts the next token if there is one. A span-corruption model gets the prompt
    with one corrupted span at its end, and generates that span.
    """
    vocabulary = tokenizer.vocabulary()
    ids = tokenizer.encode_prompt(prompt) or [vocabulary.eot]
    components = config.objective.components
    component = next((candidate for candidate in components if candidate.name != "span"), components[0])
    mode = [vocabulary.special_id(name)] if (name := mode_of(component)) else []
    start = vocabulary.special_id("start")
    has_encoder = config.model.architecture == "encoder_decoder"
    stop_ids = frozenset(
        (vocabulary.sentinel(1),) if tokenizer.eot is None else (tokenizer.eot, vocabulary.sentinel(1))
    )
    if isinstance(component, SpanSpec):
        infilling_ids, gap_ids = [*mode, *ids, vocabulary.sentinel(0), vocabulary.eot], [vocabulary.sentinel(0)]
        if has_encoder:
            return Prompt([start, *gap_ids], encoder_ids=infilling_ids, stop_ids=stop_ids)
        return Prompt([*infilling_ids, *gap_ids], bidirectional=component.see_prefix, stop_ids=stop_ids)
    if has_encoder:
        return Prompt([start], encoder_ids=[*mode, *ids], stop_ids=stop_ids)
    bidirectional = isinstance(component, PrefixSpec) and component.see_prefix
    return Prompt([*mode, *ids], bidirectional=bidirectional, stop_ids=stop_ids)


@torch.no_grad()
def generate_tokens(
    model: torch.nn.Module, prompt: Prompt, sampling: Sampling, max_seq_len: int, use_cache: bool = True
) -> Iterator[int]:
    """Yield at most `max_tokens` token ids after `prompt`, limited by a total length of `max_seq_len`."""
    device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    generator = torch.Generator().manual_seed(sampling.seed)
    cache = KVCache() if use_cache else None
    encoder_input = None
    if prompt.encoder_ids is not None:
        encoder_input = {"encoder_input": EncoderInput(torch.tensor([prompt.encoder_ids], device=device))}
    ids = list(prompt.ids)
    prefix_B = torch.tensor([len(prompt.ids)], device=device) if prompt.bidirectional else None
    for _ in range(min(sampling.max_tokens, max_seq_len - len(prompt.ids))):
        input_ids = ids[cache.length :] if cache is not None else ids
        # Later tokens attend to all of the cached prompt, so the prefix mask is only needed for the first forward.
        mask = CAUSAL if len(input_ids) == 1 else AttentionMask(causal=True, prefix_B=prefix_B)
        logits_BSV = model(torch.tensor([input_ids], device=device), mask=mask, cache=cache, **(encoder_input or {}))
        encoder_input = encoder_input if cache is None else None  # the cache also holds the encoder's output
        token = sample_token(logits_BSV[0, -1].float().cpu(), sampling, generator)
        ids.append(token)
        yield token


def sample_token(logits_V: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Sample one token id. The nucleus (Holtzman et al. 2020) is the smallest set of tokens with probability
    `top_p`."""
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    logits_V = logits_V / sampling.temperature
    if 0 < sampling.top_k < len(logits_V):
        weakest = logits_V.topk(sampling.top_k).values[-1]
        logits_V = logits_V.masked_fill(logits_V < weakest, -torch.inf)
    probabilities_V, ids_V = logits_V.softmax(-1).sort(descending=True)
    if sampling.top_p < 1:  # 1 keeps all tokens, though the cumulative sum may round to 1 too early
        before_V = probabilities_V.cumsum(-1) - probabilities_V
        probabilities_V = probabilities_V.masked_fill(before_V >= sampling.top_p, 0.0)
    return int(ids_V[torch.multinomial(probabilities_V, 1, generator=generator)])


def generate_text(
    model: torch.nn.Module,
    tokenizer: Tokenizer,
    prompt: Prompt,
    sampling: Sampling,
    max_seq_len: int,
    stop: bool = True,
) -> Iterator[str]:
    """Yield text as it is sampled. The bytes of a character are held back until it is complete.

    Ends before a stop token of `prompt`. With `stop` false the model still runs to the last token, because the ranks of
    a sharded model must run it equally often.
    """
    vocabulary = tokenizer.vocabulary()
    if (length := max(len(prompt.ids), len(prompt.encoder_ids or ()))) >= max_seq_len:
        raise ConfigError(f"the prompt has {length} tokens, but the model takes at most {max_seq_len}; shorten it")
    stream = tokenizer.text_stream(prompt.ids)
    ended = False
    for token in generate_tokens(model, prompt, sampling, max_seq_len):
        ended = ended or token in prompt.stop_ids
        if ended and stop:
            break
        name = vocabulary.describe(token)  # for an id that an objective added
        if not ended and (chunk := stream.end() + name if name else stream.add(token)):
            yield chunk
    if tail := stream.end():
        yield tail


def print_continuations(
    checkpoint: str, prompts: list[str], sampling: Sampling, offload: Offload | None = None
) -> None:
    """Print each prompt and its continuation, as it is generated."""
    sampling.check()
    model, tokenizer, config = load_model(checkpoint, select_device(World()), offload)
    for number, prompt in enumerate(prompts):
        print("\n---\n" * bool(number) + prompt, end="", flush=True)
        encoded = encode_prompt(config, tokenizer, prompt)
        for chunk in generate_text(model, tokenizer, encoded, sampling, config.model.max_seq_len):
            print(chunk, end="", flush=True)
        print()
