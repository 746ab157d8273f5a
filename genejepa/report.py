"""A report of a model as one HTML page."""

from __future__ import annotations

import base64
import html
import io
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from genejepa import pl
from genejepa._constants import OBSM_KEY
from genejepa.errors import ConfigError, MissingKeyError
from genejepa.persistence import write_atomically

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence

    import pandas as pd
    from anndata import AnnData
    from matplotlib.figure import Figure

__all__ = ["build_report", "write_report"]

_PACKAGES: Final = ("genejepa", "torch", "scvi-tools", "scanpy", "anndata", "scikit-learn", "numpy")
_PROBE_NAMES: Final = {"linear": "Linear", "knn": "Nearest-neighbour", "few_shot": "Few-shot"}
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


def write_report(
    path: str | os.PathLike[str],
    *,
    title: str,
    facts: Mapping[str, str],
    figures: Sequence[tuple[str, Figure]] = (),
    tables: Sequence[tuple[str, pd.DataFrame]] = (),
    notes: Sequence[str] = (),
) -> Path:
    """Write one HTML page that holds its pictures and needs no other file.

    Parameters
    ----------
    path
        File to write; an existing one is replaced at once, so that no reader sees half a page.
    title
        Title of the page.
    facts
        Names and values shown at the top.
    figures
        Captions and figures.
    tables
        Captions and tables. The index is shown unless it is a plain count of rows.
    notes
        Paragraphs at the end.

    Returns
    -------
    pathlib.Path
        The file written.

    Raises
    ------
    ConfigError
        If the folder of `path` does not exist, or `path` is a folder.

    Examples
    --------
    >>> import tempfile
    >>> from genejepa.report import write_report
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     page = write_report(f"{folder}/report.html", title="A model", facts={"Cells": "2,638"})
    ...     "2,638" in page.read_text(encoding="utf-8")
    True
    """
    target = _checked_target(path)
    sections = [_facts_html(facts)]
    if figures:
        sections += ["<h2>Figures</h2>", *(_figure_html(caption, figure) for caption, figure in figures)]
    if tables:
        sections += ["<h2>Tables</h2>", *(_table_html(caption, table) for caption, table in tables)]
    if notes:
        sections += ["<h2>Notes</h2>", *(f"<p>{html.escape(note)}</p>" for note in notes)]
    heading = html.escape(title)
    page = "\n".join(
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
    write_atomically(target, page.encode("utf-8"))
    return target


def build_report(
    path: str | os.PathLike[str],
    *,
    adata: AnnData,
    facts: Mapping[str, str],
    history: pd.DataFrame | None = None,
    labels_key: str | None = None,
    probe_tables: Sequence[pd.DataFrame] = (),
    use_rep: str = OBSM_KEY,
    layer: str | None = None,
    title: str = "Report of a genejepa model",
    notes: Sequence[str] = (),
    seed: int = 0,
) -> Path:
    """Write a report of an embedding, of the training behind it, and of its probes.

    Parameters
    ----------
    path
        File to write; an existing one is replaced at once.
    adata
        Annotated data with an embedding in ``obsm``; it is not changed.
    facts
        Facts of the model, such as genes, seconds of training and seed. Number of cells, dimensions of the
        embedding, last effective rank and package versions are added, unless they are given here.
    history
        History of the training, as for `genejepa.pl.training`.
    labels_key
        Column of ``obs`` that colours the embedding. Without it, cells are coloured by their total.
    probe_tables
        Tables returned by the probes of `genejepa.evaluate`.
    use_rep
        Key of ``obsm`` with the embedding, shape (n_cells, dim).
    layer
        Layer with the counts; ``X`` by default.
    title
        Title of the page.
    notes
        Paragraphs at the end.
    seed
        Seed of the UMAP.

    Returns
    -------
    pathlib.Path
        The file written.

    Raises
    ------
    MissingKeyError
        If `use_rep`, `labels_key` or, where it is needed, `layer` does not exist.
    DataError
        If the embedding, the history or a probe table cannot be drawn.
    ConfigError
        If the folder of `path` does not exist, or `path` is a folder.
    """
    _checked_target(path)
    embedding_figure = _embedding_figure(
        adata, labels_key=labels_key, use_rep=use_rep, layer=layer, seed=seed
    )
    figures = [embedding_figure]
    if history is not None:
        figures.append(("Training: loss, its terms, and signs of collapse.", _training_figure(history)))
    figures += [(f"What the {_probe_name(table)} confuses.", _probe_figure(table)) for table in probe_tables]
    return write_report(
        path,
        title=title,
        facts=_all_facts(adata, facts, history, use_rep=use_rep),
        figures=figures,
        tables=[(f"Scores of the {_probe_name(table)}.{_left_out(table)}", table) for table in probe_tables],
        notes=notes,
    )


# Content ----------------------------------------------------------------------------------------------


def _all_facts(
    adata: AnnData, facts: Mapping[str, str], history: pd.DataFrame | None, *, use_rep: str
) -> dict[str, str]:
    """Join the facts of the caller, which win, with those that can be read off."""
    found = {"Cells": f"{adata.n_obs:,}", "Embedding dimensions": str(adata.obsm[use_rep].shape[1])}
    if history is not None and "effective_rank" in history:
        ranks = history["effective_rank"].dropna()
        if len(ranks):
            found["Effective rank at the end of training"] = f"{ranks.iloc[-1]:.1f}"
    versions = {name: _version(name) for name in _PACKAGES}
    found["Versions"] = ", ".join(f"{name} {number}" for name, number in versions.items() if number)
    return {**found, **facts}


def _version(package: str) -> str | None:
    """Return the version of an installed package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _embedding_figure(
    adata: AnnData, *, labels_key: str | None, use_rep: str, layer: str | None, seed: int
) -> tuple[str, Figure]:
    """Draw the embedding by label, else by the total of each cell, and describe it."""
    import anndata as ad
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 5.2), layout="constrained")
    caption = "UMAP of the embedding; distances between far groups carry no meaning. "
    if labels_key is not None:
        pl.embedding(adata, color=labels_key, use_rep=use_rep, seed=seed, ax=figure.subplots())
        return f"{caption}Colour: {labels_key}.", figure
    totals = _log_totals(adata, layer=layer)
    if totals is None or use_rep not in adata.obsm:
        pl.embedding(adata, use_rep=use_rep, seed=seed, ax=figure.subplots())
        return caption.strip(), figure
    name = "Total per cell (log10)"
    cells = ad.AnnData(obs=adata.obs[[]].assign(**{name: totals}), obsm={use_rep: adata.obsm[use_rep]})
    pl.embedding(cells, color=name, use_rep=use_rep, seed=seed, ax=figure.subplots())
    return f"{caption}Colour: total of {'X' if layer is None else layer} per cell, log10.", figure


def _log_totals(adata: AnnData, *, layer: str | None) -> np.ndarray[Any, np.dtype[np.float64]] | None:
    """Return log10 totals per cell, shape (n_cells,); none if there is no matrix of totals above zero."""
    if layer is not None and layer not in adata.layers:
        raise MissingKeyError(
            f"`layers[{layer!r}]` does not exist, found {', '.join(map(repr, adata.layers)) or 'none'}.",
            fix="Pass the name of the layer with the counts, or none if they are in X.",
        )
    matrix: Any = adata.X if layer is None else adata.layers[layer]
    if matrix is None or adata.isbacked:
        return None
    totals = np.asarray(matrix.sum(axis=1), dtype=np.float64).ravel()
    if not (totals > 0).any():
        return None
    # Cells without any count have no logarithm, and are drawn as missing.
    return np.log10(np.where(totals > 0, totals, np.nan))


def _training_figure(history: pd.DataFrame) -> Figure:
    """Draw the history of a training run."""
    from matplotlib.figure import Figure

    return pl.training(history, figure=Figure(figsize=(10.0, 6.5), layout="constrained"))


def _probe_figure(table: pd.DataFrame) -> Figure:
    """Draw the confusion matrix of a probe."""
    from matplotlib.figure import Figure

    side = 3.2 + 0.4 * len(table.attrs.get("probe", {}).get("classes", ()))
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    pl.probe(table, ax=figure.subplots())
    return figure


def _probe_name(table: pd.DataFrame) -> str:
    """Name a probe in words, with what it predicts."""
    record = table.attrs.get("probe", {})
    name = _PROBE_NAMES.get(record.get("name", ""), "").lower()
    return f"{name} probe of {record.get('labels_key', 'the labels')}".strip()


def _left_out(table: pd.DataFrame) -> str:
    """Tell which cells a probe left out."""
    record = table.attrs.get("probe", {})
    parts = [f"{name} ({n} cells)" for name, n in record.get("dropped_classes", {}).items()]
    if record.get("n_unlabelled", 0):
        parts.append(f"{record['n_unlabelled']} cells without a label")
    return f" Left out: {', '.join(parts)}." if parts else ""


# HTML -------------------------------------------------------------------------------------------------


def _checked_target(path: str | os.PathLike[str]) -> Path:
    """Return `path` if a file can be written there."""
    target = Path(path)
    if not target.parent.is_dir():
        raise ConfigError(
            f"`path` is {str(path)!r}, but the folder {str(target.parent)!r} does not exist.",
            fix="Create the folder first, or pass another path.",
        )
    if target.is_dir():
        raise ConfigError(
            f"`path` is {str(path)!r}, which is a folder, expected the name of an HTML file.",
            fix=f"Pass {str(target / 'report.html')!r}.",
        )
    return target


def _facts_html(facts: Mapping[str, str]) -> str:
    """Render the facts as a list of names and values."""
    items = (f"<div><dt>{html.escape(k)}</dt><dd>{html.escape(str(v))}</dd></div>" for k, v in facts.items())
    return f"<dl>{''.join(items)}</dl>"


def _figure_html(caption: str, figure: Figure) -> str:
    """Render a figure as a PNG image inside the page."""
    buffer = io.BytesIO()
    # Without the name of the software, equal figures give equal bytes in all versions.
    figure.savefig(
        buffer, format="png", dpi=_DPI, bbox_inches="tight", facecolor="white", metadata={"Software": None}
    )
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    text = html.escape(caption)
    image = f'<img alt="{text}" src="data:image/png;base64,{data}">'
    return f"<figure>{image}<figcaption>{text}</figcaption></figure>"


def _table_html(caption: str, table: pd.DataFrame) -> str:
    """Render a table, with numbers to the right."""
    from pandas import RangeIndex
    from pandas.api.types import is_bool_dtype, is_numeric_dtype

    shown = table if isinstance(table.index, RangeIndex) else table.reset_index()
    classes = [
        ' class="number"' if is_numeric_dtype(dtype) and not is_bool_dtype(dtype) else ""
        for dtype in shown.dtypes
    ]
    head = "".join(
        f'<th scope="col"{kind}>{html.escape(str(name))}</th>'
        for name, kind in zip(shown.columns, classes, strict=True)
    )
    rows = "".join(
        "<tr>"
        + "".join(f"<td{kind}>{_cell_text(value)}</td>" for value, kind in zip(row, classes, strict=True))
        + "</tr>"
        for row in shown.itertuples(index=False, name=None)
    )
    return (
        f'<div class="wide"><table><caption>{html.escape(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _cell_text(value: object) -> str:
    """Render one value of a table."""
    if isinstance(value, float | np.floating):
        value = float(value)
        if not np.isfinite(value):
            return "–" if np.isnan(value) else str(value)
        return f"{value:.3f}" if value == 0 or abs(value) >= 0.001 else f"{value:.1e}"
    return html.escape(str(value))
