"""Names of genes, and the choice of a gene panel."""

from __future__ import annotations

import warnings
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np

from genejepa._memory import memory_errors
from genejepa.data.counts import columns_to_genes, panel_counts
from genejepa.data.gene_search import clean_name
from genejepa.data.slots import as_text, missing_key
from genejepa.errors import ConfigError, DataError, DataWarning

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray
    from scipy import sparse

_SMALLEST_BATCH = 20
"""Cells that a batch needs for a vote on the panel: below, residual variances are noise and tie."""

_EXPRESSION = "Gene Expression"
"""Value of ``feature_types`` that 10x Genomics gives to genes."""

_N_EXAMPLES = 3


def gene_names(var: pd.DataFrame, *, gene_symbols: str | None = None, table: str = "var") -> NDArray[np.object_]:
    """Read the name of every gene.

    Parameters
    ----------
    var
        Table of the genes: ``var`` or ``raw.var``.
    gene_symbols
        Column with the names; None takes the index, ``var_names``.
    table
        Name of the table, for messages.

    Returns
    -------
    Array of shape ``(n_vars,)`` of Python strings, not necessarily unique. Numbers become strings, bytes are
    decoded.

    Raises
    ------
    MissingKeyError
        If the column does not exist.
    DataError
        If a name is missing (NaN, None) or blank or cannot be written as UTF-8, or if there are several names for each
        gene (a MultiIndex, or several columns of this name).

    Warns
    -----
    DataWarning
        If names are bytes or numbers.
    """
    values: Any
    if gene_symbols is None:
        values = var.index
    elif gene_symbols in var:
        values = var[gene_symbols]
    else:
        raise missing_key(table, gene_symbols, var.columns, argument="gene_symbols")
    slot = names_slot(gene_symbols, table)
    n_levels = values.shape[1] if values.ndim == 2 else getattr(values, "nlevels", 1)
    if n_levels > 1:
        raise DataError(
            f"`{slot}` has {n_levels} names for each gene, expected one",
            fix=f"adata.{table}_names = adata.{table}_names.get_level_values(0)"
            if gene_symbols is None
            else f"adata.{table} = adata.{table}.loc[:, ~adata.{table}.columns.duplicated()]",
        )
    missing = np.asarray(values.isna())
    names = np.empty(len(values), dtype=object)
    names[:] = [as_text(value) for value in values]
    blank = np.flatnonzero(missing | np.fromiter((not n.strip() for n in names), dtype=bool, count=len(names)))
    if len(blank):
        raise DataError(
            f"`{slot}` has {len(blank)} missing or blank names among {len(names)}, at the positions "
            f"{blank[:_N_EXAMPLES].tolist()}{' and more' if len(blank) > _N_EXAMPLES else ''}; expected a name for "
            "every gene",
            fix=_keeping(slot, "{}.astype(object).fillna('').astype(str).str.strip() != ''"),
        )
    _check_writable(names, slot)
    foreign = sorted({type(value).__name__ for value in values if not isinstance(value, str)})
    if foreign:
        warnings.warn(
            f"`{slot}` holds names of type {', '.join(foreign)}, expected text; they are read as text, the first as "
            f"{names[0]!r}",
            DataWarning,
            stacklevel=2,
        )
    return names


def names_slot(gene_symbols: str | None, table: str) -> str:
    """Where the names of the genes are, for messages: ``var_names`` or ``var['<gene_symbols>']``."""
    return f"{table}_names" if gene_symbols is None else f"{table}[{gene_symbols!r}]"


def _check_writable(names: NDArray[np.object_], slot: str) -> None:
    """Refuse names that no file can hold: lone surrogates, as a wrong encoding leaves them."""
    bad = [name for name in names if not name.isascii() and any("\ud800" <= letter <= "\udfff" for letter in name)]
    if bad:
        target = slot.replace("raw.var_names", "raw.var.index")
        raise DataError(
            f"`{slot}` has {len(bad)} names that cannot be written as UTF-8: "
            f"{', '.join(map(repr, bad[:_N_EXAMPLES]))}{' and more' if len(bad) > _N_EXAMPLES else ''}; expected text",
            fix=f"adata.{target} = [name.encode('utf-8', 'backslashreplace').decode() for name in adata.{target}]",
        )


def is_gene(var: pd.DataFrame) -> NDArray[np.bool_]:
    """Which columns are genes, shape ``(n_vars,)``, by the column ``feature_types`` that 10x Genomics writes.

    Antibodies, peaks and guides are none. All columns are genes if there is no such column, or if none is marked so.
    """
    types = var["feature_types"].astype(str).to_numpy() if "feature_types" in var else np.empty(0, dtype=object)
    genes: NDArray[np.bool_] = types == _EXPRESSION
    return genes if genes.any() else np.ones(len(var), dtype=bool)


def check_unique(names: NDArray[np.object_], columns: NDArray[np.int64], *, slot: str = "var_names") -> None:
    """Refuse a panel that holds a gene whose name occurs more than once in the data.

    Names are compared as they are when a model looks for its genes: without white space at the ends, and in one form
    of Unicode characters.

    Parameters
    ----------
    names
        Name of every gene of the data, shape ``(n_vars,)``.
    columns
        Columns of the panel, in ``0..n_vars - 1``; repeated names outside of it do no harm.
    slot
        Where the names come from, for the message.

    Raises
    ------
    DataError
        If the name of a panel gene is repeated.
    """
    cleaned = np.array([clean_name(name) for name in names], dtype=object)
    count = Counter(cleaned.tolist())
    repeated = [name for name in dict.fromkeys(cleaned[columns]) if count[name] > 1]
    if repeated:
        raise _duplicates_error(repeated, count, names=names, cleaned=cleaned, slot=slot)


def _duplicates_error(
    repeated: list[str],
    count: Counter[str],
    *,
    names: NDArray[np.object_],
    cleaned: NDArray[np.object_],
    slot: str,
) -> DataError:
    """Error that lists repeated names and where the first one is."""
    listed = ", ".join(f"{name!r} x{count[name]}" for name in repeated[:_N_EXAMPLES])
    where = np.flatnonzero(cleaned == repeated[0])[:_N_EXAMPLES]
    as_written = dict.fromkeys(names[where])
    variants = f" as {', '.join(map(repr, as_written))}" if len(as_written) > 1 else ""
    cleaning = "" if (names == cleaned).all() else ".astype(str).str.normalize('NFC').str.strip()"
    return DataError(
        f"`{slot}` has {len(repeated)} duplicated names among the genes of the model: {listed}; "
        f"the first is at positions {where.tolist()}{variants}; expected each once",
        fix=_keeping(slot, f"~{{}}{cleaning}.duplicated()") + "  # keeps the first of each",
    )


def _keeping(slot: str, condition: str) -> str:
    """Line of code that keeps the genes whose names, put in for ``{}``, meet a condition."""
    names = slot.removeprefix("raw.")
    whole = "" if names == slot else "adata = adata.raw.to_adata(); "
    return f"{whole}adata = adata[:, {condition.format(f'adata.{names}')}].copy()"


def select_panel(
    counts: sparse.csr_matrix,
    names: NDArray[np.object_],
    *,
    n_genes: int | None = 2000,
    batch: NDArray[np.int64] | None = None,
    table: str = "var",
) -> NDArray[np.int64]:
    """Choose the most variable genes by the variance of their Pearson residuals.

    Analytic Pearson residuals (Lause, Berens and Kobak 2021, Genome Biology 22:258) as implemented in scanpy.
    On FACS-sorted blood cells, a linear probe on 50 principal components of 2,000 genes chosen this way
    reached a macro-F1 of .844, against .822 for ``seurat_v3`` and .816 for ``seurat``.

    Genes without a count are never chosen. Cells without a count are left out of the computation. With
    batches, genes are ranked within each batch and chosen by the number of batches in which they are among
    the first ``n_genes``, so that a difference between batches is not taken for variability; batches of less
    than 20 cells are put together. The choice does not depend on the order of the genes: they are ranked in
    the order of their names.

    Parameters
    ----------
    counts
        Counts of shape ``(n_obs, n_vars)``, not changed.
    names
        Name of every gene, shape ``(n_vars,)``.
    n_genes
        Size of the panel. None takes all genes that have a count, and so does a number that is not smaller
        than theirs.
    batch
        Batch of every cell, shape ``(n_obs,)``; None for one batch.
    table
        Table of the genes, for messages.

    Returns
    -------
    Columns of the chosen genes, ascending.

    Raises
    ------
    ConfigError
        If ``n_genes`` is below 1.
    DataError
        If no gene has a count.
    """
    if n_genes is not None and n_genes < 1:
        raise ConfigError(f"`n_genes` is {n_genes}, expected at least 1", fix="pass n_genes=2000, or None for all.")
    expressed = _expressed_genes(counts)
    if not len(expressed):
        raise DataError(
            f"`{table}` has {counts.shape[1]} genes, and none of them has a count in {counts.shape[0]} cells",
            fix="check the filters that were applied to `adata`, and that the right layer is used.",
        )
    if n_genes is None or len(expressed) <= n_genes:
        return expressed
    by_name = expressed[np.argsort(names[expressed], kind="stable")]
    chosen = _most_variable(counts, by_name, n_genes=n_genes, batch=batch)
    return np.sort(by_name[chosen])


def _expressed_genes(counts: sparse.csr_matrix) -> NDArray[np.int64]:
    """Columns with a count, ascending."""
    stored = slice(0, int(counts.indptr[-1]))
    indices, data = counts.indices[stored], counts.data[stored]
    if not data.all():
        indices = indices[data != 0]
    expressed = np.zeros(counts.shape[1], dtype=bool)
    expressed[indices] = True
    return np.flatnonzero(expressed)


def _most_variable(
    counts: sparse.csr_matrix, columns: NDArray[np.int64], *, n_genes: int, batch: NDArray[np.int64] | None
) -> NDArray[np.int64]:
    """Positions in ``columns`` of the ``n_genes`` genes with the most variable Pearson residuals."""
    import anndata
    import pandas as pd
    import scanpy as sc
    from scipy import sparse

    panel = panel_counts(counts, columns_to_genes(columns, counts.shape[1]), len(columns))
    filled = np.diff(panel.indptr) > 0
    # Whole numbers are summed exactly, so the result does not depend on the order of cells and genes.
    whole = bool((panel.data == np.rint(panel.data)).all())
    data = panel.data.astype(np.int32 if whole and panel.data.max() < 2**31 - 128 else np.float64)
    matrix = sparse.csr_matrix((data, panel.indices, panel.indptr), shape=(panel.n_obs, panel.n_genes))
    del panel, data
    if not filled.all():
        matrix = matrix[filled]  # a cell without counts has an undefined residual
    groups = None if batch is None else _voting_groups(np.asarray(batch)[filled])
    n_groups = 1 if groups is None else len(np.unique(groups))
    obs = pd.DataFrame(index=pd.RangeIndex(matrix.shape[0]).astype(str))
    if groups is not None:
        obs["batch"] = groups
    table: Any = sc.experimental.pp.highly_variable_genes(
        anndata.AnnData(matrix, obs=obs),
        flavor="pearson_residuals",
        n_top_genes=n_genes,
        batch_key=None if groups is None else "batch",
        # scanpy takes the default from the first batch and keeps it for all others.
        clip=float(np.sqrt(matrix.shape[0] / n_groups)),
        check_values=False,
        inplace=False,
    )
    return np.flatnonzero(table["highly_variable"].to_numpy())


def _voting_groups(batch: NDArray[np.int64]) -> NDArray[np.int64]:
    """Put the cells of too small batches together, or into the largest batch if they are still too few."""
    codes, groups, sizes = np.unique(batch, return_inverse=True, return_counts=True)
    small = sizes[groups] < _SMALLEST_BATCH
    groups[small] = len(codes) if small.sum() >= _SMALLEST_BATCH else sizes.argmax()
    return groups


@memory_errors("choosing the genes", fix="take fewer cells, or mark the genes with `mask_var`.")
def resolve_panel(
    matrix: sparse.csr_matrix,
    var: pd.DataFrame,
    *,
    n_genes: int | None = 2000,
    mask_var: str | NDArray[np.bool_] | None = None,
    gene_symbols: str | None = None,
    names: NDArray[np.object_] | None = None,
    batch: NDArray[np.int64] | None = None,
    table: str = "var",
) -> NDArray[np.int64]:
    """Choose the gene panel of a model: the genes the user marked, or the most variable ones.

    Parameters
    ----------
    matrix
        Counts of shape ``(n_obs, n_vars)``, not changed.
    var
        Table of the genes: ``var`` or ``raw.var``.
    n_genes
        Size of the panel if ``mask_var`` is None, see :func:`select_panel`. Only columns that are genes take part,
        see :func:`is_gene`.
    mask_var
        Boolean column of ``var``, or boolean array of shape ``(n_vars,)``: the columns to take, less those
        without a count.
    gene_symbols
        Column of ``var`` with the gene names; None takes ``var_names``.
    names
        These names, if they have been read already, see :func:`gene_names`.
    batch
        Batch of every cell, shape ``(n_obs,)``, used if ``mask_var`` is None; None for one batch.
    table
        Name of the table, for messages.

    Returns
    -------
    Columns of the panel, ascending.

    Raises
    ------
    MissingKeyError
        If a key does not exist.
    DataError
        If the mask is not boolean or marks no gene with a count, if a gene name is missing, or if the name of
        a panel gene is repeated.
    OutOfMemoryError
        If memory runs out.

    Warns
    -----
    DataWarning
        If columns are left out because they are not genes.
    """
    if names is None:
        names = gene_names(var, gene_symbols=gene_symbols, table=table)
    if mask_var is not None:
        mask, slot = _read_mask(var, mask_var, table)
        expressed = _expressed_genes(matrix)
        columns = expressed[mask[expressed]]
        if not len(columns):
            raise DataError(
                f"`{slot}` marks {int(mask.sum())} genes and none of them has a count",
                fix="mark other genes, or pass mask_var=None to choose the most variable genes.",
            )
    else:
        genes = np.flatnonzero(is_gene(var))
        if len(genes) < len(var):
            others = var["feature_types"].astype(str).value_counts().drop(_EXPRESSION)
            warnings.warn(
                f"`{table}['feature_types']` marks {int(others.sum())} columns as {', '.join(others.index)}: they are "
                "not used",
                DataWarning,
                stacklevel=2,
            )
            matrix = matrix[:, genes]
        columns = genes[select_panel(matrix, names[genes], n_genes=n_genes, batch=batch, table=table)]
    slot = names_slot(gene_symbols, table)
    rivals = is_gene(var)
    rivals[columns] = True
    check_unique(np.where(rivals, names, ""), columns, slot=slot)
    return columns


def _read_mask(var: pd.DataFrame, mask_var: str | NDArray[np.bool_], table: str) -> tuple[NDArray[np.bool_], str]:
    """Boolean mask over the genes, and the name of where it comes from."""
    if not isinstance(mask_var, str):
        slot, mask = "mask_var", np.asarray(mask_var)
    elif mask_var not in var:
        raise missing_key(table, mask_var, [c for c in var.columns if var[c].dtype.kind == "b"], argument="mask_var")
    else:
        slot, column = f"{table}[{mask_var!r}]", var[mask_var]
        if column.isna().any():
            raise DataError(
                f"`{slot}` has {int(column.isna().sum())} missing values, first for gene "
                f"{str(var.index[int(column.isna().argmax())])!r}; expected True or False",
                fix=f"adata.{slot} = adata.{slot}.fillna(False).astype(bool)",
            )
        mask = column.to_numpy(dtype=bool) if column.dtype == "boolean" else column.to_numpy()
    if mask.dtype != np.bool_ or mask.shape != (len(var),):
        raise DataError(
            f"`{slot}` has dtype {mask.dtype} and shape {mask.shape}, expected bool and ({len(var)},)",
            fix="mark the genes with True or False, one value for each gene.",
        )
    return mask, slot
