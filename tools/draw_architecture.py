"""Draw docs/architecture.svg: the path from raw text to a trained model, and the layers of the package.

The layers come from LEVELS in tests/test_layers.py, which the tests enforce, and the descriptions from the tree in
docs/design/README.md. Without --write the program prints the picture.

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

WIDTH, MARGIN, GAP = 1000, 20, 8  # pixels
LINE_HEIGHT, CHARACTER_WIDTH = 16, 6.4  # pixels; the mean width of a character at 12 px
# A stage of the path: (title, the packages that produce it, the commands that run them).
PATH = (
    ("raw text", (), ""),
    ("token shards", ("text",), "prepare, adopt"),
    ("batches", ("data", "objectives"), ""),
    ("training step", ("models", "losses", "parallel", "engines", "optim"), "train"),
    ("checkpoint", ("checkpoint",), ""),
    ("results", ("generation", "training", "convert"), "evaluate, generate, convert"),
)
# Colors that differ in print, for the groups infrastructure, model, data, distribution and program.
COLORS = {
    "#e8e8e8": ("errors", "config", "launch", "observe"),
    "#dbe9f6": ("losses", "optim", "models", "objectives"),
    "#e2f0d9": ("data", "text"),
    "#fdebd0": ("parallel", "checkpoint", "convert", "engines"),
    "#eadcf4": ("training", "generation", "commands", "api", "cli"),
}
COLOR_OF_PACKAGE = {name: color for color, names in COLORS.items() for name in names}


@dataclass(frozen=True)
class Box:
    """A rectangle with a title, lines of text below the title, and a fill color."""

    x: float
    y: float
    width: float
    height: float
    title: str
    lines: tuple[str, ...]
    fill: str

    def iter_svg(self) -> Iterator[str]:
        """Yield the SVG elements of the rectangle and its text."""
        yield (
            f'<rect x="{self.x:g}" y="{self.y:g}" width="{self.width:g}" height="{self.height:g}" rx="4" '
            f'fill="{self.fill}" stroke="#555555"/>'
        )
        middle_x, title_y = self.x + self.width / 2, self.y + (self.height - LINE_HEIGHT * len(self.lines)) / 2 + 4
        yield f'<text x="{middle_x:g}" y="{title_y:g}" class="title">{escape(self.title)}</text>'
        for line_number, line in enumerate(self.lines, start=1):
            yield f'<text x="{middle_x:g}" y="{title_y + line_number * LINE_HEIGHT:g}">{escape(line)}</text>'


def main() -> int:
    """Print the picture or write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the picture to this file")
    file = parser.parse_args().write
    picture = draw(read_levels(RULES.read_text(encoding="utf-8")), read_tree(TREE.read_text(encoding="utf-8")))
    if file is None:
        print(picture, end="")
    else:
        file.write_text(picture, encoding="utf-8")
        print(f"{file}: written", file=sys.stderr)
    return 0


def read_levels(source: str) -> list[list[str]]:
    """Return the packages of each layer, lowest layer first, from the assignment to LEVELS in `source`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "LEVELS":
            return [sorted(names - {"__main__"}) for names in ast.literal_eval(node.value) if names != {"__main__"}]
    raise ValueError(f"{RULES} assigns no LEVELS: this program reads the layers from it")


def read_tree(document: str) -> dict[str, str]:
    """Return {package: description} from the part of the tree below dist_llm/."""
    (tree,) = re.findall(r"```text tree\n.*?^dist_llm/\n(.*?)```", document, re.DOTALL | re.MULTILINE)
    return dict(re.findall(r"^  (\w+)(?:/|\.py) +(.+)$", tree, re.MULTILINE))


def draw(levels: list[list[str]], descriptions: dict[str, str]) -> str:
    """Return the picture as SVG."""
    boxes = list(iter_path_boxes(76))
    stack_top = 76 + boxes[0].height + 62
    boxes += iter_layer_boxes(levels, descriptions, stack_top)
    height = max(box.y + box.height for box in boxes) + MARGIN
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" width="{WIDTH}" '
            f'height="{height:g}" role="img" aria-label="Architecture of dist_llm">',
            "<style>text { font: 12px sans-serif; text-anchor: middle; fill: #222222 } .title { font-weight: bold; "
            "font-size: 13px } .heading { font-size: 15px; font-weight: bold; text-anchor: start } "
            ".note { text-anchor: start }</style>",
            f'<rect width="{WIDTH}" height="{height:g}" fill="#ffffff"/>',
            *iter_heading(30, "From raw text to a trained model", "Each box: what exists; the packages that make it."),
            *iter_heading(
                stack_top - 30, "Layers", "A package may import only packages below its row (a test checks it)."
            ),
            *(line for box in boxes for line in box.iter_svg()),
            *iter_arrows(len(PATH), 76 + boxes[0].height / 2),
            "</svg>\n",
        ]
    )


def iter_heading(y: float, text: str, note: str) -> Iterator[str]:
    """Yield the SVG elements of a heading and of the sentence below it."""
    yield f'<text x="{MARGIN}" y="{y:g}" class="heading">{escape(text)}</text>'
    yield f'<text x="{MARGIN}" y="{y + 19:g}" class="note">{escape(note)}</text>'


def iter_path_boxes(y: float) -> Iterator[Box]:
    """Yield a box for each stage of PATH, from left to right."""
    width = compute_path_box_width(len(PATH))
    for index, (title, packages, commands) in enumerate(PATH):
        lines = textwrap.wrap(", ".join(packages), int(width / CHARACTER_WIDTH))
        lines += textwrap.wrap(f"$ {commands}", int(width / CHARACTER_WIDTH)) if commands else []
        fill = COLOR_OF_PACKAGE[packages[0]] if packages else "#ffffff"
        yield Box(MARGIN + index * (width + 3 * GAP), y, width, height=88, title=title, lines=tuple(lines), fill=fill)


def compute_path_box_width(num_boxes: int) -> float:
    """Return the width of a box of the path if `num_boxes` boxes and the arrows between them fill the picture."""
    return (WIDTH - 2 * MARGIN - (num_boxes - 1) * 3 * GAP) / num_boxes


def iter_arrows(num_boxes: int, y: float) -> Iterator[str]:
    """Yield the SVG elements of the arrows between the boxes of the path."""
    width = compute_path_box_width(num_boxes)
    for index in range(1, num_boxes):
        x = MARGIN + index * (width + 3 * GAP)
        yield (
            f'<path d="M{x - 3 * GAP + 3:g} {y:g} H{x - 8:g} m-5 -5 l6 5 l-6 5" fill="none" stroke="#222222" '
            'stroke-width="1.5"/>'
        )


def iter_layer_boxes(levels: list[list[str]], descriptions: dict[str, str], y: float) -> Iterator[Box]:
    """Yield a row of boxes for each layer, the highest layer on top."""
    for names in reversed(levels):
        width = (WIDTH - 2 * MARGIN - (len(names) - 1) * GAP) / len(names)
        lines_by_box = [textwrap.wrap(descriptions.get(name, ""), int(width / CHARACTER_WIDTH)) for name in names]
        height = LINE_HEIGHT * (max(map(len, lines_by_box)) + 1) + 8
        for index, (name, lines) in enumerate(zip(names, lines_by_box, strict=True)):
            x = MARGIN + index * (width + GAP)
            yield Box(x, y, width, height, name, tuple(lines), COLOR_OF_PACKAGE.get(name, "#e8e8e8"))
        y += height + GAP


if __name__ == "__main__":
    sys.exit(main())
