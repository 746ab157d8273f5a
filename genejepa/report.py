"""A report of a model as one HTML page."""

from __future__ import annotations

from html import escape
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from genejepa import pl
from genejepa._constants import OBSM_KEY
from genejepa._html import facts_html, figure_html, page_html, table_html
from genejepa.data.counts import open_counts
from genejepa.data.slots import CountSlot
from genejepa.errors import ConfigError
from genejepa.files import output_file, write_atomically

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence

    import pandas as pd
    from anndata import AnnData
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

__all__ = ["build_report", "write_report"]

_PACKAGES: Final = ("genejepa", "torch", "scvi-tools", "scanpy", "anndata", "scikit-learn", "numpy")
_PROBE_NAMES: Final = {"linear": "linear", "knn": "nearest-neighbour", "few_shot": "few-shot"}


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
        File to write; an existing one is replaced at once, so that no reader sees half a page, and a link is followed.
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
    FileExistsError
        If a device, a pipe or a socket is at `path`.

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
    sections = [facts_html(facts)]
    if figures:
        sections += ["<h2>Figures</h2>", *(figure_html(caption, figure) for caption, figure in figures)]
    if tables:
        sections += ["<h2>Tables</h2>", *(table_html(caption, table) for caption, table in tables)]
    if notes:
        sections += ["<h2>Notes</h2>", *(f"<p>{escape(note)}</p>" for note in notes)]
    write_atomically(output_file(target), page_html(title, sections).encode("utf-8"))
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
    use_raw: bool = False,
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
    layer, use_raw
        Slot with the counts; ``X`` by default.
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
    FileExistsError
        If a device, a pipe or a socket is at `path`.
    """
    from matplotlib.figure import Figure

    _checked_target(path)
    figures = [
        _embedding_figure(adata, labels_key=labels_key, use_rep=use_rep, slot=CountSlot(layer, use_raw), seed=seed)
    ]
    if history is not None:
        training = pl.training(history, figure=Figure(figsize=(10.0, 6.5), layout="constrained"))
        figures.append(("Training: loss, its terms, and signs of collapse.", training))
    figures += [(f"What the {_probe_name(table)} confuses.", _probe_figure(table)) for table in probe_tables]
    return write_report(
        path,
        title=title,
        facts=_all_facts(adata, facts, history, use_rep=use_rep),
        figures=figures,
        tables=[(f"Scores of the {_probe_name(table)}.{_left_out(table)}", table) for table in probe_tables],
        notes=notes,
    )


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
    adata: AnnData, *, labels_key: str | None, use_rep: str, slot: CountSlot, seed: int
) -> tuple[str, Figure]:
    """Draw the embedding by label, else by the total of each cell, and describe it."""
    import anndata as ad
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 5.2), layout="constrained")
    caption = "UMAP of the embedding; distances between far groups carry no meaning."
    if labels_key is not None:
        caption += f" Colour: {labels_key}."
    elif (totals := _log_totals(adata, slot)) is not None:
        caption += f" Colour: total of {slot.name} per cell, log10."
        labels_key = "Total per cell (log10)"
        adata = ad.AnnData(obs=adata.obs[[]].assign(**{labels_key: totals}), obsm=dict(adata.obsm))
    pl.embedding(adata, color=labels_key, use_rep=use_rep, seed=seed, ax=figure.subplots())
    return caption, figure


def _log_totals(adata: AnnData, slot: CountSlot) -> NDArray[np.float64] | None:
    """Return log10 totals per cell, shape (n_cells,); none if there is no matrix of totals above zero."""
    if slot == CountSlot() and (adata.isbacked or adata.X is None):
        return None
    blocks = open_counts(adata, slot).blocks()
    sums = [np.asarray(block.sum(axis=1), dtype=np.float64).ravel() for _, block in blocks]
    totals = np.concatenate([np.empty(0), *sums])
    if not (totals > 0).any():
        return None
    # Cells without any count have no logarithm, and are drawn as missing.
    return np.log10(np.where(totals > 0, totals, np.nan))


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
    name = _PROBE_NAMES.get(record.get("name"), "")
    return f"{name} probe of {record.get('labels_key', 'the labels')}".strip()


def _left_out(table: pd.DataFrame) -> str:
    """Tell which cells a probe left out."""
    record = table.attrs.get("probe", {})
    parts = [f"{name} ({n} cells)" for name, n in record.get("dropped_classes", {}).items()]
    if record.get("n_unlabelled", 0):
        parts.append(f"{record['n_unlabelled']} cells without a label")
    return f" Left out: {', '.join(parts)}." if parts else ""


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
    output_file(target)  # a device is refused before anything is drawn
    return target
