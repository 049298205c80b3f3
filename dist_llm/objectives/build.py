"""From a config to a function of windows and sample numbers that gives batches."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dist_llm.config.lengths import Lengths, all_lengths, inputs_len
from dist_llm.config.schema import Config, Denoiser
from dist_llm.counter_rng import splitmix64
from dist_llm.models.attention_mask import CAUSAL
from dist_llm.objectives.batch import Batch
from dist_llm.objectives.causal import causal
from dist_llm.objectives.fim import fim
from dist_llm.objectives.masked import masked
from dist_llm.objectives.prefix import prefix
from dist_llm.objectives.rows import Form, Row, Text, stack
from dist_llm.objectives.span import span
from dist_llm.objectives.vocabulary import Vocabulary

Windows = Sequence[npt.NDArray[Any] | Text] | npt.NDArray[Any]  # one window of ids, or text, per sample


@dataclass(frozen=True)
class Objective:
    """What is learned from a window. A sample is a function of (window, seed, its number), whoever makes it."""

    members: tuple[tuple[Denoiser, Lengths], ...]
    vocabulary: Vocabulary
    form: Form
    inputs: int  # length of every row
    source: int  # and of what an encoder reads
    seed: int

    def __call__(self, windows: Windows, samples_B: npt.NDArray[np.int64], members_B: Sequence[int] = ()) -> Batch:
        """Windows of ids, the number of each sample, and whose window it is in a mixture -> a batch."""
        numbers_B = torch.from_numpy(samples_B)
        sample_hash_B = splitmix64(numbers_B ^ self._mixed_seed) if self.form.draws else None
        if self.plain:
            ids_BW = np.asarray(windows)
            inputs_BS, targets_BS = torch.from_numpy(ids_BW[:, :-1]), torch.from_numpy(ids_BW[:, 1:])
            scored = ids_BW.size - len(ids_BW)
            return Batch(inputs_BS, targets_BS, CAUSAL, scored, sample_hash_B=sample_hash_B, samples_B=numbers_B)
        owners = members_B or [0] * len(windows)
        rows = [self.row(*each) for each in zip(windows, samples_B.tolist(), owners, strict=True)]
        return replace(stack(rows, self.form, sample_hash_B), samples_B=numbers_B)

    @cached_property
    def _mixed_seed(self) -> torch.Tensor:
        return splitmix64(torch.tensor(self.seed))  # once: it would be a third of the price of a small batch

    @cached_property
    def plain(self) -> bool:
        """Whether a batch is nothing but windows and their next tokens."""
        causal = all(each.name == "causal" for each, _ in self.members)
        return causal and not (self.form.documents or self.form.prefix or self.form.texts)

    def row(self, window: npt.NDArray[Any] | Text, sample: int, member: int) -> Row:
        """One sample, as long as all others."""
        denoiser, size = self.members[member]
        rng = np.random.Generator(np.random.Philox(key=[self.seed, sample]))
        made = self._make(window, rng, denoiser, size)
        return made.padded(self.inputs, self.source, self.vocabulary.eot)

    def _make(
        self, window: npt.NDArray[Any] | Text, rng: np.random.Generator, denoiser: Denoiser, size: Lengths
    ) -> Row:
        text = window if isinstance(window, Text) else Text(window)
        if self.form.documents and text.pieces_W is None and text.documents_W is None:
            raise ValueError("a window without document numbers: its reader must take them from the corpus's offsets")
        match denoiser.name:
            case "causal":
                return causal(text)
            case "prefix":
                return prefix(text, rng, denoiser, self.vocabulary, two_stacks=self.source > 0)
            case "masked":
                return masked(text, rng, denoiser, self.vocabulary)
            case "span":
                return span(text, rng, denoiser, size, self.vocabulary, two_stacks=self.source > 0)
            case "fim":
                return fim(text, rng, denoiser, self.vocabulary)


def build_objective(config: Config, vocabulary: Vocabulary, prompts: bool = False) -> Objective:
    """The objective of a resolved config over a corpus with that vocabulary; `prompts`: some tokens are not scored."""
    denoisers, sizes = config.objective.members, all_lengths(config)
    two_stacks = config.model.architecture == "encoder_decoder"
    seeing = [each for each in denoisers if each.name in ("prefix", "span") and each.see_prefix]
    form = Form(
        causal=config.model.architecture != "encoder",
        prefix=bool(seeing) and not two_stacks,
        # Padding follows the text: only those that look ahead must be kept from it.
        documents=config.data.document_mask
        or config.data.windows == "packed"
        or (config.data.windows == "document" and config.model.architecture == "encoder"),
        source_padding=two_stacks and any(each.name == "prefix" for each in denoisers),
        draws=config.model.stochastic_depth > 0,
        texts=prompts or config.data.windows != "stream",
    )
    source = config.data.seq_len if two_stacks else 0
    members = tuple(zip(denoisers, sizes, strict=True))
    return Objective(members, vocabulary, form, inputs_len(config), source, config.run.seed)
