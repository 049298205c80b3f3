"""dist_llm: pre-train language models on any layout, each proven to compute the same step."""

__version__ = "0.2.0"
