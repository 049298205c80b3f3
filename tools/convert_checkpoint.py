"""An alias of `dist-llm convert`, which replaces this script."""

import sys

from dist_llm.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
