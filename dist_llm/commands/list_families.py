"""`dist-llm convert list-families`: the families of Hugging Face models that can be converted."""

from dist_llm.convert.hf_family_list import describe_settings
from dist_llm.convert.hf_family_list import list_families as list_summaries


def list_families() -> None:
    """Print a table: model_type of config.json, class of transformers, settings beside those of Llama."""
    rows = [("model_type", "class of transformers", "settings")]
    rows += [(family.model_type, family.hf_class, describe_settings(family)) for family in list_summaries()]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    for model_type, hf_class, settings in rows:
        print(f"{model_type:{widths[0]}}  {hf_class:{widths[1]}}  {settings}".rstrip())
