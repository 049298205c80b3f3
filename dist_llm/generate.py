"""Sampling, token by token, with a cache of keys and values."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dist_llm.checkpoint import store
from dist_llm.checkpoint.state import Held
from dist_llm.config.load import load_saved
from dist_llm.config.schema import Config
from dist_llm.convert.spread import spread
from dist_llm.errors import ConfigError, DataError
from dist_llm.models.attention import KVCache
from dist_llm.models.attention_mask import CAUSAL, AttentionMask, EncoderInput
from dist_llm.models.build_model import build_model
from dist_llm.models.decoder import Decoder
from dist_llm.text.tokenizer import TOKENIZER_FILE, Tokenizer


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 keep all tokens."""

    max_tokens: int = 128
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def check(self) -> None:
        """Raises ConfigError for a value outside its range."""
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
    """Where blocks wait that do not fit: at most `memory_bytes` in host memory, the rest in `folder`."""

    folder: Path
    memory_bytes: int


def load_model(
    checkpoint: Path | str, device: torch.device, offload: Offload | None = None
) -> tuple[Decoder, Tokenizer, Config]:
    """The model of a checkpoint (or of a run's newest) on one device, or spread, ready to sample."""
    path = store.find(checkpoint)
    config = load_saved(path)
    if not (path / TOKENIZER_FILE).exists():
        raise DataError(
            f"{path}: has no tokenizer, so no text can be generated; copy {TOKENIZER_FILE} of its corpus there"
        )
    if config.model.architecture == "encoder":
        raise ConfigError(f"{path}: an encoder fills in masks and does not go on with a text; it cannot generate")
    if offload is not None:
        model = spread(path, config.model, device, offload.folder, offload.memory_bytes)
        return model, Tokenizer.load(path), config
    with torch.device("meta"):
        model = build_model(config.model)
    model.to_empty(device=device)
    store.load(path, Held(model), moments=False)
    return model.eval(), Tokenizer.load(path), config


@dataclass(frozen=True)
class Prompt:
    """What the model is given: ids to go on from, whether they see each other, and what an encoder reads."""

    ids: list[int]
    whole: bool = False
    source: list[int] | None = None
    stops: frozenset[int] = frozenset()


def encode_prompt(config: Config, tokenizer: Tokenizer, prompt: str) -> Prompt:
    """Put the question as the model was trained to be asked it. An empty prompt is the end of another text.

    Of a mixture's members one that goes on with its text is taken where there is one. A model of span corruption is
    asked for what was cut out at the end.
    """
    vocabulary = tokenizer.vocabulary()
    ids = tokenizer.encode_prompt(prompt) or [vocabulary.eot]
    components = config.objective.components
    component = next((candidate for candidate in components if candidate.name != "span"), components[0])
    mode = [vocabulary.special(component.mode)] if component.mode else []
    start = vocabulary.special("start")
    two_stacks = config.model.architecture == "encoder_decoder"
    ends = frozenset((vocabulary.sentinel(1),) if tokenizer.eot is None else (tokenizer.eot, vocabulary.sentinel(1)))
    if component.name == "span":
        infilling_ids, gap_ids = [*mode, *ids, vocabulary.sentinel(0), vocabulary.eot], [vocabulary.sentinel(0)]
        if two_stacks:
            return Prompt([start, *gap_ids], False, infilling_ids, ends)
        return Prompt([*infilling_ids, *gap_ids], component.see_prefix, None, ends)
    if two_stacks:
        return Prompt([start], False, [*mode, *ids], ends)
    return Prompt([*mode, *ids], component.name == "prefix" and component.see_prefix, None, ends)


@torch.no_grad()
def generate_tokens(
    model: torch.nn.Module, prompt: Prompt, sampling: Sampling, max_seq_len: int, use_cache: bool = True
) -> Iterator[int]:
    """Yield new token ids after `prompt`, at most `max_tokens`, and no more than make `longest` in all."""
    device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    generator = torch.Generator().manual_seed(sampling.seed)
    cache = KVCache() if use_cache else None
    source = None
    if prompt.source is not None:
        source = {"encoder_input": EncoderInput(torch.tensor([prompt.source], device=device))}
    ids = list(prompt.ids)
    prefix_B = torch.tensor([len(prompt.ids)], device=device) if prompt.whole else None
    for _ in range(min(sampling.max_tokens, max_seq_len - len(prompt.ids))):
        input_ids = ids[cache.length :] if cache is not None else ids
        # Once they are in the cache, all of the prompt is seen by whatever follows.
        mask = CAUSAL if len(input_ids) == 1 else AttentionMask(causal=True, prefix_B=prefix_B)
        logits_BSV = model(torch.tensor([input_ids], device=device), mask=mask, cache=cache, **(source or {}))
        source = source if cache is None else None  # the encoder's output is in the cache, too
        token = sample_token(logits_BSV[0, -1].float().cpu(), sampling, generator)
        ids.append(token)
        yield token


def sample_token(logits_V: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """One token id. The nucleus (Holtzman et al. 2020) is the fewest tokens that hold `top_p`."""
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    logits_V = logits_V / sampling.temperature
    if 0 < sampling.top_k < len(logits_V):
        weakest = logits_V.topk(sampling.top_k).values[-1]
        logits_V = logits_V.masked_fill(logits_V < weakest, -torch.inf)
    probabilities_V, ids_V = logits_V.softmax(-1).sort(descending=True)
    if sampling.top_p < 1:  # 1 keeps all, though the sum of many small ones may round to 1 too early
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
    """Yield pieces of text as they are sampled, the bytes of a character held until it is whole.

    Ends before what `asked` stops at. With `stop` false the model goes on to its last token first, as it
    must when it is sharded and all ranks have to run it equally often.
    """
    vocabulary = tokenizer.vocabulary()
    if (length := max(len(prompt.ids), len(prompt.source or ()))) >= max_seq_len:
        raise ConfigError(f"the prompt has {length} tokens, but the model takes at most {max_seq_len}; shorten it")
    stream = tokenizer.text_stream(prompt.ids)
    ended = False
    for token in generate_tokens(model, prompt, sampling, max_seq_len):
        ended = ended or token in prompt.stops
        if ended and stop:
            break
        name = vocabulary.describe(token)  # of an id that an objective added
        if not ended and (piece := stream.end() + name if name else stream.add(token)):
            yield piece
    if tail := stream.end():
        yield tail


def print_continuations(
    checkpoint: str, prompts: list[str], sampling: Sampling, offload: Offload | None = None
) -> None:
    """Print each prompt and what follows it, as it comes."""
    sampling.check()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer, config = load_model(checkpoint, device, offload)
    for number, prompt in enumerate(prompts):
        print("\n---\n" * bool(number) + prompt, end="", flush=True)
        encoded = encode_prompt(config, tokenizer, prompt)
        for piece in generate_text(model, tokenizer, encoded, sampling, config.model.max_seq_len):
            print(piece, end="", flush=True)
        print()
