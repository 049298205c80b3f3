"""An alias of `dist-llm data`, which replaces this script."""

import sys

from dist_llm.cli import main

if __name__ == "__main__":
    sys.exit(main(["data", *sys.argv[1:]]))
