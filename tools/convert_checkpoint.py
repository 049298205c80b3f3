"""The former name of `dist-llm convert`."""

import sys

from dist_llm.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
