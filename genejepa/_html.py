"""The HTML of a report: one page that holds its style and its pictures."""

from __future__ import annotations

import base64
import io
from html import escape
from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import pandas as pd
    from matplotlib.figure import Figure

_DPI: Final = 144

_STYLE: Final = """
:root { color-scheme: light dark; --text: #1a1a1a; --soft: #5a5f66; --page: #ffffff; --line: #d9dce0;
  --band: #f4f6f8; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e8e8e8; --soft: #a9b0b8; --page: #16181b; --line: #3a3f45; --band: #1f2226; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1rem 4rem; max-width: 60rem; background: var(--page);
  color: var(--text); font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 1.5rem; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 1rem; padding-bottom: .3rem;
  border-bottom: 1px solid var(--line); }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(14rem, 1fr)); gap: .8rem 1.5rem;
  margin: 0; }
dt { color: var(--soft); font-size: .85rem; }
dd { margin: 0; overflow-wrap: anywhere; }
figure { margin: 0 0 2rem; break-inside: avoid; }
img { display: block; max-width: 100%; height: auto; background: #ffffff; padding: .5rem;
  border: 1px solid var(--line); border-radius: 4px; }
figcaption, caption { color: var(--soft); font-size: .9rem; text-align: left; padding: .5rem 0; }
.wide { overflow-x: auto; margin-bottom: 2rem; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .9rem .3rem 0; text-align: left; border-bottom: 1px solid var(--line); }
th.number, td.number { text-align: right; }
tbody tr:nth-child(even) { background: var(--band); }
@media print {
  :root { --text: #000000; --soft: #444444; --page: #ffffff; --line: #bbbbbb; --band: #ffffff; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  h2 { break-after: avoid; } tr { break-inside: avoid; } .wide { overflow: visible; } }
"""


def page_html(title: str, sections: Iterable[str]) -> str:
    """Render a whole page; `sections` are HTML."""
    heading = escape(title)
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            '<head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{heading}</title>",
            f"<style>{_STYLE}</style></head>",
            f"<body><main><h1>{heading}</h1>",
            *sections,
            "</main></body></html>",
            "",
        ]
    )


def facts_html(facts: Mapping[str, str]) -> str:
    """Render facts as a list of names and values."""
    items = (f"<div><dt>{escape(k)}</dt><dd>{escape(str(v))}</dd></div>" for k, v in facts.items())
    return f"<dl>{''.join(items)}</dl>"


def figure_html(caption: str, figure: Figure) -> str:
    """Render a figure as a PNG image inside the page."""
    buffer = io.BytesIO()
    # Without the name of the software, equal figures give equal bytes in all versions.
    figure.savefig(buffer, format="png", dpi=_DPI, bbox_inches="tight", facecolor="white", metadata={"Software": None})
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    text = escape(caption)
    image = f'<img alt="{text}" src="data:image/png;base64,{data}">'
    return f"<figure>{image}<figcaption>{text}</figcaption></figure>"


def table_html(caption: str, table: pd.DataFrame) -> str:
    """Render a table, with numbers to the right."""
    from pandas import RangeIndex
    from pandas.api.types import is_bool_dtype, is_numeric_dtype

    shown = table if isinstance(table.index, RangeIndex) else table.reset_index()
    classes = [
        ' class="number"' if is_numeric_dtype(dtype) and not is_bool_dtype(dtype) else "" for dtype in shown.dtypes
    ]
    head = "".join(
        f'<th scope="col"{kind}>{escape(str(name))}</th>' for name, kind in zip(shown.columns, classes, strict=True)
    )
    rows = "".join(
        "<tr>"
        + "".join(f"<td{kind}>{_cell_text(value)}</td>" for value, kind in zip(row, classes, strict=True))
        + "</tr>"
        for row in shown.itertuples(index=False, name=None)
    )
    return (
        f'<div class="wide"><table><caption>{escape(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _cell_text(value: object) -> str:
    """Render one value of a table."""
    if isinstance(value, float | np.floating):
        value = float(value)
        if not np.isfinite(value):
            return "–" if np.isnan(value) else str(value)
        return f"{value:.3f}" if value == 0 or abs(value) >= 0.001 else f"{value:.1e}"
    return escape(str(value))
