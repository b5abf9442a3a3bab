"""Draws the pictures of the documentation: `python docs/pictures/draw.py`.

Index tables in them are those that the library draws. Each picture brings its own background, light or dark as the
reader's system is, so it is readable on any page.
"""

from __future__ import annotations

import colorsys
from collections.abc import Iterable
from pathlib import Path

from mos_ext import MoSConfig
from mos_ext.routing import draw_tables

FOLDER = Path(__file__).resolve().parent
STYLE = """
  svg { font-family: system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; font-size: 13px; }
  .page { fill: #f8f9fb; } .text { fill: #20242b; } .soft { fill: #5b6472; font-size: 12px; }
  .number { fill: #16191e; font-size: 11px; text-anchor: middle; } .head { font-weight: 600; }
  .line { stroke: #8b94a3; fill: none; stroke-width: 1.4; } .box { fill: #ffffff; stroke: #8b94a3; }
  .frozen { fill: #dde3ea; stroke: #8b94a3; } .train { fill: #ffd9a8; stroke: #c77d1e; }
  .kept { fill: #bfe3d0; stroke: #2f8a5b; } .cell { stroke: #f8f9fb; stroke-width: 1; }
  .public { fill: #3f7fbf; } .private { fill: #d9822b; } .empty { fill: #e3e7ed; } .middle { text-anchor: middle; }
  @media (prefers-color-scheme: dark) {
    .page { fill: #1b1e23; } .text { fill: #e6e9ee; } .soft { fill: #a3adba; } .line { stroke: #7c8694; }
    .box { fill: #262a31; stroke: #7c8694; } .frozen { fill: #3a414b; stroke: #7c8694; }
    .train { fill: #7a4d12; stroke: #e0a04c; } .kept { fill: #1f5a3c; stroke: #58b988; }
    .cell { stroke: #1b1e23; } .empty { fill: #2b3038; } .public { fill: #5b9bd8; } .private { fill: #e39a4a; }
  }
"""


class Picture:
    """An SVG in the making: shapes are appended in the order of painting."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.size, self.title, self.parts = (width, height), title, []
        self.box(0, 0, width, height, "page", 10)

    def box(self, x: float, y: float, w: float, h: float, kind: str, radius: float = 3, fill: str = "") -> None:
        style = f' style="fill:{fill}"' if fill else ""
        self.parts.append(
            f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="{radius:g}"{style}/>'
        )

    def text(self, x: float, y: float, text: str, kind: str = "text") -> None:
        escaped = text.replace("&", "&amp;").replace("<", "&lt;")
        self.parts.append(f'<text class="{kind}" x="{x:g}" y="{y:g}">{escaped}</text>')

    def arrow(self, *points: tuple[float, float]) -> None:
        path = " L".join(f"{x:g},{y:g}" for x, y in points)
        self.parts.append(f'<path class="line" d="M{path}" marker-end="url(#tip)"/>')

    def squares(self, corners: Iterable[tuple[float, float]], size: float, kind: str) -> None:
        path = "".join(f"M{x:g},{y:g}h{size:g}v{size:g}h-{size:g}z" for x, y in corners)
        self.parts.append(f'<path class="{kind}" d="{path}"/>')

    def label(self, x: float, y: float, w: float, h: float, text: str, kind: str, below: str = "") -> None:
        """A box with a word in it, and a second line."""
        self.box(x, y, w, h, kind, 4)
        self.text(x + w / 2, y + h / 2 + (-2 if below else 5), text, "text middle head")
        if below:
            self.text(x + w / 2, y + h / 2 + 14, below, "soft middle")

    def svg(self) -> str:
        w, h = self.size
        tip = (
            '<marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
            '<path d="M0,0 L8,4 L0,8 z" style="fill:#8b94a3"/></marker>'
        )
        head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {w} {h}" width="{w}" height="{h}" role="img">'
        lines = [head, f"<title>{self.title}</title>", f"<style>{STYLE}</style>", f"<defs>{tip}</defs>", *self.parts]
        return "\n".join(lines) + "\n</svg>\n"


def colour(number: int, count: int, kind: str) -> str:
    """Blues for public shards, oranges for private ones; of middle lightness, so that dark numbers are readable."""
    hue = 0.50 + 0.22 * number / count if kind == "public" else 0.07 + 0.05 * number / count
    r, g, b = colorsys.hls_to_rgb(hue, 0.70 if kind == "public" else 0.68, 0.55 if kind == "public" else 0.75)
    return f"#{round(255 * r):02x}{round(255 * g):02x}{round(255 * b):02x}"


def pools() -> Picture:
    """A pool, the tables of two layers, and what they assemble."""
    layers, config = 4, MoSConfig(r=4, equivalent_rank=2, shards_per_vector=4, private_rank=1)
    table = draw_tables(config, "example[8->8]", (config.r,) * layers).a
    public, size = config.num_public_shards(layers), 30
    p = Picture(760, 440, "Pools of shards, index tables, and the matrices they assemble")

    def shard(x: float, y: float, number: int) -> None:
        kind = "public" if number < public else "private"
        own = number if kind == "public" else number - public
        p.box(x, y, size, size, "cell", 3, colour(own, public, kind))
        p.text(x + size / 2, y + size / 2 + 4, str(number), "number")

    p.text(24, 34, "The A-pool of 4 layers", "text head")
    p.text(24, 52, f"n = e·L·l = {config.num_shards(layers)} shards of in / l", "soft")
    for number in range(config.num_shards(layers)):
        row, column = divmod(number, 4)
        shard(24 + column * (size + 4), 66 + (row if number < public else row + 1) * (size + 4), number)
    p.text(170, 86, "public:", "soft")
    p.text(170, 102, "any layer", "soft")
    p.text(24, 66 + 4 * (size + 4) + 20, "private: p = 1 rank of a layer", "soft")
    for row in range(4):
        p.text(170, 66 + (row + 5) * (size + 4) + 20, f"of layer {row}", "soft")
    for k, x in ((0, 300), (1, 470)):
        p.text(x, 34, f"A of layer {k}", "text head")
        p.text(x, 52, "r = 4 rows of l = 4", "soft")
        for i, j in ((i, j) for i in range(4) for j in range(4)):
            shard(x + j * (size + 4), 66 + i * (size + 4), int(table[k, i, j]))
    p.text(620, 86, "a row is one rank", "soft")
    p.text(620, 102, "vector (in)", "soft")
    lines = (
        "Index tables say which shard goes where. They are drawn",
        "once, from a seed, and never change: a static routing.",
        "No layer uses a public shard twice; the last rows of a",
        "layer are its private shards, which no other layer has.",
        "B has a pool and tables of its own.",
        "",
        "Trained are the 32 shards of either pool: as many numbers",
        "as LoRA of rank e = 2 on four layers has. The matrices",
        "have rank r = 4, because layers share.",
    )
    for i, line in enumerate(lines):
        p.text(300, 246 + 20 * i, line)
    return p


def sharing() -> Picture:
    """Which layer uses which shard: LoRA, pure sharing and MoS, of one number of parameters."""
    layers, config = 12, MoSConfig(r=8, equivalent_rank=2, shards_per_vector=4, private_rank=1)
    table = draw_tables(config, "self_attn.q_proj[96->96]", (config.r,) * layers).a
    n, public = config.num_shards(layers), config.num_public_shards(layers)
    p = Picture(760, 436, "Which layer uses which shard, of one number of parameters")
    e_l = config.equivalent_rank * config.shards_per_vector
    panels = (
        (
            "LoRA of rank 2: every layer has its own, rank 2",
            [set(range(k * e_l, (k + 1) * e_l)) for k in range(layers)],
            0,
        ),
        ("Pure sharing: every layer uses all of them, rank 24, and all layers are alike", [set(range(n))] * layers, n),
        (
            "MoS: a subset of the public shards, and private ones; rank 8, and no two layers alike",
            [set(table[k].flatten().tolist()) for k in range(layers)],
            public,
        ),
    )
    for i, (title, used, shared) in enumerate(panels):
        y = 30 + 132 * i
        p.text(24, y, title, "text head")
        cells: dict[str, list[tuple[float, float]]] = {"public": [], "private": []}
        for k in range(layers):
            p.box(24, y + 12 + 8 * k, 7.4 * n, 6.5, "empty", 1)
            for m in used[k]:
                cells["public" if m < shared else "private"].append((24 + 7.4 * m, y + 12 + 8 * k))
        for kind, corners in cells.items():
            p.squares(corners, 6.5, kind)
    p.text(
        24,
        426,
        f"Rows: 12 layers. Columns: {n} shards, as many parameters in all three. Blue: shared, orange: a layer's own.",
        "soft",
    )
    return p


def step() -> Picture:
    """An adapted linear layer, forward and backward."""
    p = Picture(760, 330, "An adapted linear layer, forward and backward")
    p.text(24, 34, "Forward", "text head")
    p.label(24, 96, 84, 44, "x", "kept", "T x in")
    p.label(250, 56, 130, 44, "W, bias", "frozen", "out x in")
    p.label(176, 140, 92, 44, "A", "train", "r x in")
    p.label(304, 140, 76, 44, "S", "kept", "T x r")
    p.label(416, 140, 92, 44, "B", "train", "out x r")
    p.label(560, 78, 40, 40, "+", "box")
    p.label(650, 76, 84, 44, "y", "box", "T x out")
    p.arrow((108, 110), (150, 78), (250, 78))
    p.arrow((108, 126), (146, 162), (176, 162))
    p.arrow((268, 162), (304, 162))
    p.arrow((380, 162), (416, 162))
    p.arrow((380, 78), (470, 78), (560, 98))
    p.arrow((508, 162), (540, 162), (572, 118))
    p.arrow((600, 98), (650, 98))
    p.text(112, 200, "drop(x) Aᵀ: shards gathered inside the kernel", "soft")
    p.text(416, 200, "scale · S Bᵀ", "soft")
    p.text(24, 236, "Backward", "text head")
    rows = (
        ("reading dy once", "dS = scale · dy B", "dB = scale · dyᵀ S"),
        ("reading x once", "dA = dSᵀ drop(x)", "dx = dy W + drop'(dS A)"),
    )
    for i, row in enumerate(rows):
        for x, cell in zip((24, 166, 330), row, strict=True):
            p.text(x, 260 + 22 * i, cell, "soft" if x == 24 else "text")
    p.text(24, 306, "once per backward pass: dA and dB of all layers into their shards", "soft")
    p.box(560, 246, 14, 14, "kept")
    p.text(580, 258, "kept for backward", "soft")
    p.box(560, 268, 14, 14, "train")
    p.text(580, 280, "from pools, trained", "soft")
    p.box(560, 290, 14, 14, "frozen")
    p.text(580, 302, "frozen", "soft")
    return p


def tile() -> Picture:
    """One pass of the CPU kernel over its activations."""
    p = Picture(760, 300, "One pass over the activations feeds up to three products")
    p.text(24, 34, "x or dy, read once: T rows of C columns", "text head")
    for i in range(4):
        for j in range(4):
            p.box(24 + j * 66, 52 + i * 44, 62, 40, "kept" if (i, j) == (1, 1) else "box", 2)
    p.text(24, 252, "a tile, 64 rows x 512 columns, stays in the L2 cache", "soft")
    p.text(24, 270, "while up to three products use it", "soft")
    p.label(330, 118, 120, 56, "F", "train", "gathered once")
    p.arrow((290, 116), (330, 136))
    results = (
        (60, "project", "in Fᵀ: S or dS", "(T x r)"),
        (128, "outer", "sᵀ in: dA or dB", "(r x C)"),
        (196, "expand", "out += s F: y or dx", "(T x C)"),
    )
    for y, name, formula, shape in results:
        p.arrow((450, 146), (490, y + 24))
        p.label(490, y, 96, 48, name, "frozen")
        p.text(598, y + 20, formula, "text")
        p.text(598, y + 38, shape, "soft")
    p.text(400, 270, "sums: fp32, one owner each, a fixed order", "soft")
    return p


def pictures() -> Iterable[tuple[Path, str]]:
    """The file of every picture, and its content."""
    for draw in (pools, sharing, step, tile):
        yield FOLDER / f"{draw.__name__}.svg", draw().svg()


if __name__ == "__main__":
    for file, content in pictures():
        file.write_text(content)
