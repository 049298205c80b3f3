"""`python -m dist_llm` is the `dist-llm` command."""

from dist_llm.cli import run

if __name__ == "__main__":
    run()
