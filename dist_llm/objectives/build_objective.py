"""Build the training objective of a config: a function from token windows and sample ids to batches.

Shape suffixes: B samples, W tokens of a window, S tokens of an example.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dist_llm.config.objective_sections import (
    CausalSpec,
    FIMSpec,
    MaskedSpec,
    ObjectiveSpec,
    PrefixSpec,
    RegisteredObjectiveSpec,
    SpanSpec,
)
from dist_llm.config.schema import Config
from dist_llm.config.sequence_lengths import SequenceLengths, compute_component_lengths, compute_inputs_len
from dist_llm.counter_rng import splitmix64
from dist_llm.models.attention_mask import CAUSAL
from dist_llm.objectives.batch import Batch
from dist_llm.objectives.causal_lm import make_causal_example
from dist_llm.objectives.custom_objective import CustomObjective, build_custom_objective
from dist_llm.objectives.examples import BatchLayout, Example, TokenWindow, collate
from dist_llm.objectives.fill_in_the_middle import make_fim_example
from dist_llm.objectives.masked_lm import make_masked_example
from dist_llm.objectives.objective_vocabulary import ObjectiveVocabulary
from dist_llm.objectives.prefix_lm import make_prefix_example
from dist_llm.objectives.span_corruption import make_span_example

Windows = Sequence[npt.NDArray[Any] | TokenWindow] | npt.NDArray[Any]  # one window per sample


@dataclass(frozen=True)
class Objective:
    """The training objective, or a mixture of several objectives (its components).

    An example depends only on (window, seed, sample id), so it is the same on all ranks and after a resume.
    """

    components: tuple[tuple[ObjectiveSpec, SequenceLengths], ...]
    vocabulary: ObjectiveVocabulary
    layout: BatchLayout
    inputs_len: int  # tokens of an example, which is padded to this length
    encoder_len: int  # tokens of an encoder input, which is padded to this length; 0: there is no encoder
    seed: int

    def __call__(
        self, windows: Windows, sample_ids_B: npt.NDArray[np.int64], component_ids_B: Sequence[int] = ()
    ) -> Batch:
        """Build a batch from windows. `component_ids_B` has the component of each window; empty: the first."""
        ids_B = torch.from_numpy(sample_ids_B)
        sample_hash_B = splitmix64(ids_B ^ self._seed_hash) if self.layout.has_sample_hashes else None
        if self.has_plain_windows:
            ids_BW = np.asarray(windows)
            inputs_BS, targets_BS = torch.from_numpy(ids_BW[:, :-1]), torch.from_numpy(ids_BW[:, 1:])
            num_valid_tokens = ids_BW.size - len(ids_BW)
            return Batch(
                inputs_BS, targets_BS, CAUSAL, num_valid_tokens, sample_hash_B=sample_hash_B, sample_ids_B=ids_B
            )
        component_ids = component_ids_B or [0] * len(windows)
        samples = zip(windows, sample_ids_B.tolist(), component_ids, strict=True)
        examples = [self.build_example(*sample) for sample in samples]
        return replace(collate(examples, self.layout, sample_hash_B), sample_ids_B=ids_B)

    @cached_property
    def _seed_hash(self) -> torch.Tensor:
        return splitmix64(torch.tensor(self.seed))  # cached: it would take a third of the time to build a small batch

    @cached_property
    def has_plain_windows(self) -> bool:
        """Whether a batch has only windows and their next tokens: no masks, prefixes or padding."""
        all_causal = all(spec.name == "causal" for spec, _ in self.components)
        return all_causal and not (
            self.layout.has_document_mask or self.layout.has_prefix or self.layout.uses_token_windows
        )

    @cached_property
    def _custom_objectives(self) -> dict[int, CustomObjective]:
        """The objectives of other packages, by component."""
        return {
            component: build_custom_objective(spec)
            for component, (spec, _) in enumerate(self.components)
            if isinstance(spec, RegisteredObjectiveSpec)
        }

    def build_example(self, window: npt.NDArray[Any] | TokenWindow, sample_id: int, component: int) -> Example:
        """Build one example, padded to `inputs_len` and `encoder_len`."""
        rng = np.random.Generator(np.random.Philox(key=[self.seed, sample_id]))
        window = window if isinstance(window, TokenWindow) else TokenWindow(window)
        if self.layout.has_document_mask and window.segment_ids_W is None and window.document_ids_W is None:
            raise ValueError("a window without document ids: its reader must take them from the document offsets")
        example = self._apply_objective(window, rng, component)
        return example.pad(self.inputs_len, self.encoder_len, filler=self.vocabulary.eot)

    def _apply_objective(self, window: TokenWindow, rng: np.random.Generator, component: int) -> Example:
        spec, lengths = self.components[component]
        is_encoder_decoder = self.encoder_len > 0
        match spec:
            case CausalSpec():
                return make_causal_example(window)
            case PrefixSpec():
                return make_prefix_example(window, rng, spec, self.vocabulary, is_encoder_decoder)
            case MaskedSpec():
                return make_masked_example(window, rng, spec, self.vocabulary)
            case SpanSpec():
                return make_span_example(window, rng, spec, lengths, self.vocabulary, is_encoder_decoder)
            case FIMSpec():
                return make_fim_example(window, rng, spec, self.vocabulary)
            case RegisteredObjectiveSpec():
                return self._custom_objectives[component].make_example(window, rng, self.vocabulary)


def build_objective(config: Config, vocabulary: ObjectiveVocabulary, weights_prompts: bool = False) -> Objective:
    """Build the objective of a resolved config. `weights_prompts`: the losses of prompts have another weight than 1."""
    specs, lengths_of_specs = config.objective.components, compute_component_lengths(config)
    is_encoder_decoder = config.model.architecture == "encoder_decoder"
    is_prefix_bidirectional = any(isinstance(spec, PrefixSpec | SpanSpec) and spec.see_prefix for spec in specs)
    layout = BatchLayout(
        causal=config.model.architecture != "encoder",
        has_prefix=is_prefix_bidirectional and not is_encoder_decoder,
        # Padding follows the text, so causal attention needs no mask against it; bidirectional attention does.
        has_document_mask=config.data.document_mask
        or config.data.windows == "packed"
        or (config.data.windows == "document" and config.model.architecture == "encoder"),
        has_encoder_padding=is_encoder_decoder and any(spec.name == "prefix" for spec in specs),
        has_sample_hashes=config.model.stochastic_depth > 0,
        # With weight 0, prompts have no targets.
        has_loss_weights=(weights_prompts and config.data.prompt_loss_weight > 0)
        or any(
            isinstance(spec, RegisteredObjectiveSpec) and build_custom_objective(spec).has_loss_weights
            for spec in specs
        ),
        uses_token_windows=weights_prompts or config.data.windows != "stream",
    )
    encoder_len = config.data.seq_len if is_encoder_decoder else 0
    components = tuple(zip(specs, lengths_of_specs, strict=True))
    return Objective(components, vocabulary, layout, compute_inputs_len(config), encoder_len, config.run.seed)
