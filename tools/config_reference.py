"""Generate docs/config.md, the reference of all config keys, from the schema.

python tools/config_reference.py            # print the page
python tools/config_reference.py --write    # write docs/config.md
"""

import argparse
from pathlib import Path

from dist_llm.config.describe import format_markdown

PAGE = Path(__file__).resolve().parents[1] / "docs/config.md"
TITLE = """\
# Config reference

All keys of a run's YAML file. `dist-llm train --help-config TEXT` searches them. A `*` in a key stands for the number
of an entry in a list. This page is generated from the schema by `tools/config_reference.py`.
"""


def main() -> None:
    """Print or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the page to docs/config.md")
    page = "\n".join((TITLE, *format_markdown())).rstrip() + "\n"
    if parser.parse_args().write:
        PAGE.write_text(page)
    else:
        print(page, end="")


if __name__ == "__main__":
    main()
