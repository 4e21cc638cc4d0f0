# SPDX-License-Identifier: Apache-2.0
"""HTML elements of the report and of the page of explore, without external resources."""

import base64
import html
import io
import pathlib
import re
import tempfile
from collections.abc import Callable, Iterable, Sequence

import numpy as np

INK = "#010203"  # matplotlib color that `plot` replaces by the text color of the page


def text(value: object) -> str:
    return html.escape(str(value))


def data_url(pixels: np.ndarray) -> str:
    """Encodes uint8 pixels [H, W, 3] as the URL of a PNG."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def image(pixels: np.ndarray, caption: str, alt: str) -> str:
    """Embeds uint8 pixels [H, W, 3]; `caption` is HTML."""
    small = ' class="small"' if max(pixels.shape[:2]) < 100 else ""
    tag = f'<img{small} alt="{text(alt)}" src="{data_url(pixels)}">'
    return f"<figure>{tag}<figcaption>{caption}</figcaption></figure>"


def images(parts: Iterable[str], kind: str = "") -> str:
    return f'<div class="images {kind}">{"".join(parts)}</div>'


def table(rows: Iterable[Sequence[object]]) -> str:
    lines = ["".join(f"<td>{text(cell)}</td>" for cell in row) for row in rows]
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
