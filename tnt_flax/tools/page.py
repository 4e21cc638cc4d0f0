# SPDX-License-Identifier: Apache-2.0
"""HTML elements of a self-contained page: one file without external resources, light and dark."""

import base64
import html
import io
import pathlib
import re
import tempfile
from collections.abc import Callable, Iterable, Sequence

import numpy as np

INK = "#010203"  # matplotlib color that `plot` replaces by the text color of the page
STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --soft: #5d6470; --ground: #ffffff;
  --card: #f5f6f8; --line: #dfe2e7; --accent: 37, 99, 175; --good: #1b7837; --bad: #b2182b; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8eb; --soft: #9aa3af; --ground: #15171a; --card: #1e2125; --line: #33383f;
    --accent: 96, 165, 250; --good: #6cc48a; --bad: #f0808a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1080px; padding: 28px 20px 60px; background: var(--ground);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 26px; margin: 0; } h2 { font-size: 18px; margin: 40px 0 8px; }
p { margin: 4px 0 12px; } .soft, figcaption, th { color: var(--soft); font-weight: normal; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(130px, 1fr)); gap: 10px;
  margin: 20px 0; }
.facts div { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: 10px 14px; }
.facts b { display: block; font-size: 21px; font-variant-numeric: tabular-nums; }
.images { display: flex; flex-wrap: wrap; gap: 14px; }
figure { margin: 0; } figcaption { font-size: 13px; max-width: 200px; overflow-wrap: anywhere; }
figure img { display: block; width: 112px; height: 112px; border-radius: 4px; }
img.small { image-rendering: pixelated; }
.row { margin-bottom: 14px; } .groups { gap: 10px 34px; margin-top: 20px; }
.right { color: var(--good); } .wrong { color: var(--bad); }
.wide { overflow-x: auto; } svg { max-width: 100%; height: auto; color: var(--ink); }
svg text { font-family: system-ui, sans-serif !important; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: 3px 9px; text-align: left; vertical-align: top; overflow-wrap: anywhere; }
.matrix td, .matrix th { text-align: center; min-width: 38px; } .list td + td { width: 70%; }
.list tr { border-top: 1px solid var(--line); }
summary { cursor: pointer; margin: 6px 0; }
"""


def page(title: str, parts: Iterable[str]) -> str:
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<link rel="icon" href="data:,">\n'
        f"<title>{text(title)}</title>\n<style>{STYLE}</style>\n{body}\n</html>\n"
    )


def text(value: object) -> str:
    return html.escape(str(value))


def facts(values: dict[str, str]) -> str:
    cards = [f"<div><b>{text(value)}</b>{text(name)}</div>" for name, value in values.items()]
    return f'<div class="facts">{"".join(cards)}</div>'


def image(pixels: np.ndarray, caption: str, alt: str) -> str:
    """Embeds uint8 pixels [H, W, 3]; `caption` is HTML."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    small = ' class="small"' if max(pixels.shape[:2]) < 100 else ""
    tag = f'<img{small} alt="{text(alt)}" src="data:image/png;base64,{data}">'
    return f"<figure>{tag}<figcaption>{caption}</figcaption></figure>"


def images(parts: Iterable[str], kind: str = "") -> str:
    return f'<div class="images {kind}">{"".join(parts)}</div>'


def table(rows: Iterable[Sequence[object]], head: Sequence[str] = ()) -> str:
    lines = ["".join(f"<th>{text(cell)}</th>" for cell in head)] if head else []
    lines += ["".join(f"<td>{text(cell)}</td>" for cell in row) for row in rows]
    return f'<table class="list">{"".join(f"<tr>{line}</tr>" for line in lines)}</table>'


def matrix(counts: np.ndarray, names: Sequence[str]) -> str:
    """Renders a confusion matrix. Rows are labels; shading is the share of the row."""
    head = "".join(f"<th>{text(name)}</th>" for name in names)
    lines = [f"<tr><th></th>{head}<th>correct</th></tr>"]
    for i, (name, row) in enumerate(zip(names, counts, strict=True)):
        total = max(int(row.sum()), 1)
        cells = [
            f'<td style="background: rgba(var(--accent), {0.75 * n / total:.3f})">{n or ""}</td>'
            for n in row.tolist()
        ]
        share = f'<td class="soft">{row[i] / total:.1%}</td>'
        lines.append(f"<tr><th>{text(name)}</th>{''.join(cells)}{share}</tr>")
    return f'<div class="wide"><table class="matrix">{"".join(lines)}</table></div>'


def plot_svg(plot: Callable[[pathlib.Path], None], name: str) -> str:
    """Returns the matplotlib figure that `plot(path)` saves, as SVG in the colors of the page."""
    import matplotlib

    inks = ("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "grid.color")
    style = dict.fromkeys([*inks, "xtick.color", "ytick.color"], INK) | {
        "axes.prop_cycle": matplotlib.cycler(color=["#3b82c4", "#d9822b", "#6a9f4b"]),
        "savefig.transparent": True,
        "svg.fonttype": "none",
        "svg.hashsalt": name,  # else two figures on a page would share ids
    }
    with tempfile.TemporaryDirectory() as folder, matplotlib.rc_context(style):
        path = pathlib.Path(folder) / f"{name}.svg"
        plot(path)
        svg = path.read_text()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    return f'<div class="wide" role="img" aria-label="{text(name)}">{svg}</div>'
