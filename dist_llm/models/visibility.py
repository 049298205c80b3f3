"""Who may look at whom, as data that travels with the batch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Visibility:
    """Attention's mask. `causal`: a token sees itself and what came before; else it sees all."""

    causal: bool


CAUSAL = Visibility(causal=True)
FULL = Visibility(causal=False)
