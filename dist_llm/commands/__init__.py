"""The commands of `dist-llm` that convert checkpoints and inspect data, and their arguments."""
