"""`python -m dist_llm` is the `dist-llm` command."""

import sys

from dist_llm.cli import main

if __name__ == "__main__":
    sys.exit(main())
