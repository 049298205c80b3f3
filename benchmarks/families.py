"""Compare the logits of small models of all Hugging Face families with those of transformers.

Each family has one small model or several, with random weights and with values of its settings that have a visible
effect (tests/convert/families.py). `difference` is the largest difference of the logits in fp32 over these models,
relative to the largest logit if that is above 1. The program measures no time.

Prints one JSON line per family on stdout, and a Markdown table on stderr. `--write` also writes the table into
docs/checkpoints.md.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dist_llm.convert.hf_family_list import SIZE_KEYS, FamilySummary, list_families
from dist_llm.convert.hf_parity import compute_logit_difference
from results import DIRECTORY, Results, make_parser

REPOSITORY = Path(__file__).parents[1]
DOCUMENT = REPOSITORY / "docs" / "checkpoints.md"
TABLE_BEGIN, TABLE_END = "<!-- families: python benchmarks/families.py --write -->\n", "<!-- /families -->"
HEADER = "| family | must have | may have | models | largest difference |\n| --- | --- | --- | --- | --- |\n"
SEQ_LEN = 24
# Keys that all families may set. The document lists them above the table.
COMMON_KEYS = SIZE_KEYS | {"rope_theta", "rope_scaling", "tie_embeddings"}
GATED = ("swiglu", "geglu", "geglu_tanh")  # the activations of families whose row has no activation


def main() -> None:
    """Compare the models of all families, print a row for each, and write the table with --write."""
    options = make_parser(__doc__).parse_args()
    results = Results("families", torch.device("cpu"))
    for family in list_families():
        differences = compute_differences(family.model_type)
        results.add({"family": family.model_type, "models": len(differences), "difference": max(differences)})
    table = format_table({row["family"]: row for row in results.rows})
    results.finish(table, options.write)
    if options.write == DIRECTORY:
        before, rest = DOCUMENT.read_text().split(TABLE_BEGIN)
        _, after = rest.split(TABLE_END)
        DOCUMENT.write_text(before + TABLE_BEGIN + table + TABLE_END + after)


@torch.no_grad()
def compute_differences(family: str) -> list[float]:
    """Return the difference of the logits of each small model of a family."""
    sys.path.insert(0, str(REPOSITORY))
    from tests.convert.families import FAMILIES, VARIANTS, VOCAB, build_models

    ids = torch.randint(3, VOCAB, (2, SEQ_LEN), generator=torch.Generator().manual_seed(0))
    variants = [changes for name, changes in VARIANTS.values() if name == family] or [{}]
    assert family in FAMILIES
    differences = []
    for changes in variants:
        hf_model, native_model, config = build_models(family, **changes)
        differences.append(compute_logit_difference(native_model, hf_model, ids, config.architecture))
    return differences


def format_table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Format the table of the document; `rows` has the row of each family."""
    lines = [
        f"| {format_requirements(family)} | {rows[family.model_type]['models']} | "
        f"{format_difference(rows[family.model_type]['difference'])} |\n"
        for family in list_families()
    ]
    return HEADER + "".join(lines)


def format_requirements(family: FamilySummary) -> str:
    """Format the first cells of the row of a family: its name, the keys that are fixed, and the keys that are free."""
    fixed = [format_key(key, format_value(value)) for key, value in family.shared_keys.items()]
    free = [
        f"`{key}` ({', '.join(values)})" if values else f"`{key}`"
        for key, values in family.free_keys.items()
        if key not in COMMON_KEYS and not key.startswith("kinds.") and values != GATED
    ]
    by_layer = [format_key(key.removeprefix("kinds.")) for key in family.free_keys if key.startswith("kinds.")]
    if by_layer:
        free.append(f"by layer: {', '.join(by_layer)}")
    return f"`{family.model_type}` | {', '.join(fixed) or '-'} | {', '.join(free) or '-'}"


def format_key(key: str, value: str = "") -> str:
    """Format a key, with its value if there is one."""
    return f"`{key}: {value}`" if value else f"`{key}`"


def format_difference(difference: float) -> str:
    """Format a difference; 0 if all logits are equal."""
    return f"{difference:.1e}" if difference else "0"


def format_value(value: object) -> str:
    """Format a value as in YAML."""
    names: Sequence[tuple[object, str]] = ((None, "null"), (True, "true"), (False, "false"))
    return next((name for constant, name in names if value is constant), str(value))


if __name__ == "__main__":
    main()
