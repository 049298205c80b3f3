"""The former name of `dist-llm data`."""

import sys

from dist_llm.cli import main

if __name__ == "__main__":
    sys.exit(main(["data", *sys.argv[1:]]))
