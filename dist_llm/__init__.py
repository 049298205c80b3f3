"""dist_llm: pre-train language models on any layout, each proven to compute the same step."""

__version__ = "0.1.0"
