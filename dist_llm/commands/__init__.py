"""The commands of `dist-llm`: one module per command with its arguments, and modules for the actions of commands."""
