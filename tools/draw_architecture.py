"""Draw docs/architecture.svg: the path from raw text to a trained model, and the layers of the package.

The layers come from LEVELS in tests/test_layers.py and the descriptions from the tree in docs/design/README.md, so
the picture shows what the tests enforce. Without --write the picture goes to standard output.

  python tools/draw_architecture.py --write docs/architecture.svg
"""

import argparse
import ast
import re
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
RULES = REPOSITORY / "tests" / "test_layers.py"
TREE = REPOSITORY / "docs" / "design" / "README.md"

WIDTH, MARGIN, GAP = 1000, 20, 8
LINE, CHARACTER = 16, 6.4  # height of a line and mean width of a character, in pixels at 12 px
# One stage of the path: what exists there, the packages that produce it, the command that starts them.
PATH = (
    ("raw text", (), ""),
    ("token shards", ("text",), "prepare, adopt"),
    ("batches", ("data", "objectives"), ""),
    ("training step", ("models", "losses", "parallel", "engines", "optim"), "train"),
    ("checkpoint", ("checkpoint",), ""),
    ("results", ("generation", "training", "convert"), "evaluate, generate, convert"),
)
# Colours that can be told apart in print: infrastructure, model, data, distribution, program.
COLOURS = {
    "#e8e8e8": ("errors", "config", "launch", "observe"),
    "#dbe9f6": ("losses", "optim", "models", "objectives"),
    "#e2f0d9": ("data", "text"),
    "#fdebd0": ("parallel", "checkpoint", "convert", "engines"),
    "#eadcf4": ("training", "generation", "commands", "api", "cli"),
}
FILL = {name: colour for colour, names in COLOURS.items() for name in names}


@dataclass(frozen=True)
class Box:
    """A rectangle with a title, lines of text below it, and a fill colour."""

    x: float
    y: float
    width: float
    height: float
    title: str
    lines: tuple[str, ...]
    fill: str

    def svg(self) -> Iterator[str]:
        """The rectangle and its text."""
        yield (
            f'<rect x="{self.x:g}" y="{self.y:g}" width="{self.width:g}" height="{self.height:g}" rx="4" '
            f'fill="{self.fill}" stroke="#555555"/>'
        )
        middle, first = self.x + self.width / 2, self.y + (self.height - LINE * len(self.lines)) / 2 + 4
        yield f'<text x="{middle:g}" y="{first:g}" class="title">{escape(self.title)}</text>'
        for number, line in enumerate(self.lines, start=1):
            yield f'<text x="{middle:g}" y="{first + number * LINE:g}">{escape(line)}</text>'


def main() -> int:
    """Print the picture or write it."""
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("--write", type=Path, metavar="FILE", help="write the picture to this file")
    file = top.parse_args().write
    picture = draw(read_levels(RULES.read_text(encoding="utf-8")), read_tree(TREE.read_text(encoding="utf-8")))
    if file is None:
        print(picture, end="")
    else:
        file.write_text(picture, encoding="utf-8")
        print(f"{file}: written", file=sys.stderr)
    return 0


def read_levels(source: str) -> list[list[str]]:
    """The packages of each layer, lowest layer first, from the assignment to LEVELS in `source`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "LEVELS":
            return [sorted(names - {"__main__"}) for names in ast.literal_eval(node.value) if names != {"__main__"}]
    raise ValueError(f"{RULES} assigns no LEVELS")


def read_tree(document: str) -> dict[str, str]:
    """Description by package, from the part of the tree below dist_llm/."""
    (tree,) = re.findall(r"```text tree\n.*?^dist_llm/\n(.*?)```", document, re.DOTALL | re.MULTILINE)
    return dict(re.findall(r"^  (\w+)(?:/|\.py) +(.+)$", tree, re.MULTILINE))


def draw(levels: list[list[str]], descriptions: dict[str, str]) -> str:
    """The picture as SVG."""
    boxes = list(path_boxes(76))
    stack_top = 76 + boxes[0].height + 62
    boxes += layer_boxes(levels, descriptions, stack_top)
    height = max(box.y + box.height for box in boxes) + MARGIN
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" width="{WIDTH}" '
            f'height="{height:g}" role="img" aria-label="Architecture of dist_llm">',
            "<style>text { font: 12px sans-serif; text-anchor: middle; fill: #222222 } .title { font-weight: bold; "
            "font-size: 13px } .heading { font-size: 15px; font-weight: bold; text-anchor: start } "
            ".note { text-anchor: start }</style>",
            f'<rect width="{WIDTH}" height="{height:g}" fill="#ffffff"/>',
            *heading(30, "From raw text to a trained model", "Each box: what exists; the packages that make it."),
            *heading(stack_top - 30, "Layers", "A package may import only packages below its row (a test checks it)."),
            *(line for box in boxes for line in box.svg()),
            *arrows(len(PATH), 76 + boxes[0].height / 2),
            "</svg>\n",
        ]
    )


def heading(y: float, text: str, note: str) -> Iterator[str]:
    """A heading and the sentence below it."""
    yield f'<text x="{MARGIN}" y="{y:g}" class="heading">{escape(text)}</text>'
    yield f'<text x="{MARGIN}" y="{y + 19:g}" class="note">{escape(note)}</text>'


def path_boxes(y: float) -> Iterator[Box]:
    """One box for each stage of PATH, from left to right."""
    width = path_width(len(PATH))
    for number, (title, packages, commands) in enumerate(PATH):
        lines = textwrap.wrap(", ".join(packages), int(width / CHARACTER))
        lines += textwrap.wrap(f"$ {commands}", int(width / CHARACTER)) if commands else []
        fill = FILL[packages[0]] if packages else "#ffffff"
        yield Box(MARGIN + number * (width + 3 * GAP), y, width, 88, title, tuple(lines), fill)


def path_width(count: int) -> float:
    """The width of a box on the path, where `count` boxes and the arrows between them fill the picture."""
    return (WIDTH - 2 * MARGIN - (count - 1) * 3 * GAP) / count


def arrows(count: int, y: float) -> Iterator[str]:
    """The arrows between the boxes of the path."""
    width = path_width(count)
    for number in range(1, count):
        x = MARGIN + number * (width + 3 * GAP)
        yield (
            f'<path d="M{x - 3 * GAP + 3:g} {y:g} H{x - 8:g} m-5 -5 l6 5 l-6 5" fill="none" stroke="#222222" '
            'stroke-width="1.5"/>'
        )


def layer_boxes(levels: list[list[str]], descriptions: dict[str, str], y: float) -> Iterator[Box]:
    """A row of boxes for each layer, the highest layer on top."""
    for names in reversed(levels):
        width = (WIDTH - 2 * MARGIN - (len(names) - 1) * GAP) / len(names)
        wrapped = [textwrap.wrap(descriptions.get(name, ""), int(width / CHARACTER)) for name in names]
        height = LINE * (max(map(len, wrapped)) + 1) + 8
        for number, (name, lines) in enumerate(zip(names, wrapped, strict=True)):
            x = MARGIN + number * (width + GAP)
            yield Box(x, y, width, height, name, tuple(lines), FILL.get(name, "#e8e8e8"))
        y += height + GAP


if __name__ == "__main__":
    sys.exit(main())
