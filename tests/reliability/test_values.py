"""Rows 1 to 20 of the catalogue of bad input: values that are not counts, or odd ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import genejepa
from genejepa.data.counts import check_counts, open_counts, panel_counts
from genejepa.data.normalization import Normalizer
from genejepa.data.slots import CountSlot
from genejepa.errors import DataError, DataWarning

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from genejepa.data.counts import CountMatrix
    from genejepa.data.panel import PanelCounts

N_OBS, N_VARS = 40, 30


def counts_of_cells() -> NDArray[np.float64]:
    return np.random.default_rng(0).poisson(2.0, size=(N_OBS, N_VARS)).astype(np.float64)


def adata_of(matrix: Any) -> anndata.AnnData:
    obs = pd.DataFrame(index=[f"c{i}" for i in range(matrix.shape[0])])
    return anndata.AnnData(matrix, obs=obs, var=pd.DataFrame(index=[f"g{j}" for j in range(matrix.shape[1])]))


def checked(adata: anndata.AnnData, **options: Any) -> CountMatrix:
    return check_counts(open_counts(adata, CountSlot()), adata=adata, **options)


def panel_of(adata: anndata.AnnData, **options: Any) -> PanelCounts:
    matrix = checked(adata, **options).to_csr()
    return panel_counts(matrix, np.arange(matrix.shape[1]), matrix.shape[1])


def with_value(value: float, *, row: int = 7, column: int = 3) -> NDArray[np.float64]:
    values = counts_of_cells()
    values[row, column] = value
    return values


def scaled_to(values: NDArray[np.float64], total: float) -> NDArray[np.float64]:
    scaled: NDArray[np.float64] = values / values.sum(1, keepdims=True) * total
    return scaled


def scaled(values: NDArray[np.float64]) -> NDArray[np.float64]:
    logged = np.log1p(scaled_to(values, 1e4))
    standard: NDArray[np.float64] = (logged - logged.mean(0)) / logged.std(0)
    return standard


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "row 01: log-normalised": (
        lambda: np.log1p(scaled_to(counts_of_cells(), 1e4)),
        r"`X` holds \d+ fractional values .* in cell 'c0', gene 'g\d+'\. It looks log-normalised",
    ),
    "row 01: log1p of counts": (lambda: np.log1p(counts_of_cells()), "looks log-normalised: log1p of counts"),
    "row 01: log2 of shallow counts": (
        lambda: np.log2(1 + np.minimum(counts_of_cells(), 1) + np.eye(N_OBS, N_VARS)),
        r"looks log-normalised: log2\(1 \+ x\)",
    ),
    "row 01: square root of counts": (lambda: np.sqrt(counts_of_cells()), "looks transformed: the square root"),
    "row 02: counts per 10,000": (
        lambda: scaled_to(counts_of_cells(), 1e4),
        r"normalised without log.* every cell add up to 1e\+04\.",
    ),
    "row 02: counts per million": (lambda: scaled_to(counts_of_cells(), 1e6).astype(np.float32), r"add up to 1e\+06\."),
    "row 02: TPM-like": (lambda: counts_of_cells() * 17.3 * (1 + np.arange(N_OBS))[:, None], "FPKM, TPM or CPM"),
    "row 03: scaled": (lambda: scaled(counts_of_cells()), r"negative values .* It looks scaled \(z-scored\)"),
    "row 04: one negative value": (
        lambda: with_value(-5),
        r"`X` holds 1 negative value among \d+ values, expected counts; the first is -5 in cell 'c7', gene 'g3'",
    ),
    "row 04: one negative value, sparse": (lambda: sparse.csr_matrix(with_value(-5)), "holds 1 negative value among"),
    "row 05: all shifted": (lambda: counts_of_cells() - 0.7, "It looks scaled"),
    "row 05: integers shifted": (lambda: (counts_of_cells() - 2).astype(np.int32), "Counts are never negative"),
    "row 06: NaN, sparse": (
        lambda: sparse.csr_matrix(with_value(np.nan)),
        r"`X` holds 1 NaN among .* first is nan in cell 'c7', gene 'g3'",
    ),
    "row 06: NaN, csc": (lambda: sparse.csc_matrix(with_value(np.nan)), "`X` holds 1 NaN among"),
    "row 07: NaN, dense": (lambda: with_value(np.nan), "`X` holds 1 NaN among"),
    "row 08: infinite": (lambda: with_value(np.inf), r"`X` holds 1 infinite value among .* inf in cell 'c7'"),
    "row 08: minus infinite": (lambda: with_value(-np.inf), r"`X` holds 1 infinite value among .* -inf in cell"),
    "row 08: infinite in float16": (
        lambda: with_value(70000).astype(np.float32).astype(np.float16),
        "1 infinite value among",
    ),
    "row 12: all zero": (lambda: np.zeros((N_OBS, N_VARS)), rf"holds no count above zero, in any of {N_OBS} cells"),
    "row 12: explicit zeros": (
        lambda: sparse.csr_matrix((np.zeros(3), ([0, 1, 2], [0, 1, 2])), shape=(N_OBS, N_VARS)),
        "holds no count above zero",
    ),
    "row 12: rounding noise around zero": (
        lambda: 5e-5 * np.eye(N_OBS, N_VARS),
        "holds no count above zero",
    ),
    "row 13: too large to be exact": (lambda: with_value(1e30), r"1 value beyond 2\^53 .* 1e\+30 in cell"),
}


@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")
@pytest.mark.parametrize("case", BAD)
def test_refused(case: str) -> None:
    make, message = BAD[case]
    adata = adata_of(make())
    with pytest.raises(DataError, match=r"(?s)" + message) as caught:
        checked(adata)
    assert caught.value.fix
    with pytest.raises(DataError, match=r"(?s)" + message):
        genejepa.GeneJEPA(adata)


@pytest.mark.parametrize("kind", [np.asarray, sparse.csr_matrix, sparse.csc_matrix], ids=["dense", "csr", "csc"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, -5, 1e30])
def test_one_bad_value_is_found_wherever_it_is(bad: float, kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows 04 and 06-08: nothing is sampled, whatever the size of the blocks."""
    monkeypatch.setattr("genejepa.data.containers._BLOCK_VALUES", 70)
    for row, column in ((0, 0), (N_OBS - 1, N_VARS - 1), (17, 11)):
        adata = adata_of(kind(with_value(bad, row=row, column=column)))
        with pytest.raises(DataError, match=rf"`X` holds 1 .* in cell 'c{row}', gene 'g{column}'"):
            checked(adata)


def test_fix_for_missing_values_repairs() -> None:
    """Row 06: the line after Fix can be pasted."""
    for kind in (sparse.csr_matrix, np.asarray):
        adata = adata_of(kind(with_value(np.nan)))
        with pytest.raises(DataError) as caught:
            checked(adata)
        scope = {"adata": adata, "np": np}
        exec(caught.value.fix, scope)
        assert checked(scope["adata"]).shape == (N_OBS - 1, N_VARS)


def test_fix_names_the_slot_with_counts() -> None:
    """Rows 01 and 12: a layer or raw that holds counts is named."""
    adata = adata_of(np.log1p(counts_of_cells()))
    adata.layers["zeros"] = np.zeros((N_OBS, N_VARS))
    adata.layers["text"] = counts_of_cells().astype(str)
    adata.layers["umi"] = sparse.csc_matrix(counts_of_cells())
    with pytest.raises(DataError, match=r"Fix: pass layer='umi': `layers\['umi'\]` holds counts"):
        checked(adata)
    adata.X = np.zeros((N_OBS, N_VARS))
    with pytest.raises(DataError, match=r"Fix: pass layer='umi'"):
        checked(adata)
    raw = adata_of(counts_of_cells())
    raw.raw = raw
    raw.X = np.log1p(counts_of_cells())
    with pytest.raises(DataError, match=r"Fix: pass use_raw=True: `raw\.X` holds counts"):
        checked(raw)


def test_fractional_values_beside_counts() -> None:
    """Row 12: where fractions are allowed, a slot that holds counts is still named."""
    adata = adata_of(np.log1p(counts_of_cells()))
    checked(adata, allow_fractional=True)
    adata.layers["umi"] = counts_of_cells()
    fix = r"`X` holds \d+ fractional values\. It looks log-normalised.*\nFix: pass layer='umi': `layers\['umi'\]`"
    with pytest.warns(DataWarning, match=fix):
        checked(adata, allow_fractional=True)
    adata.X = counts_of_cells()
    checked(adata, allow_fractional=True)


def test_fix_that_leads_to_x(tiny_settings: dict[str, Any]) -> None:
    """Row 01: what the fix says works where a layer was asked for, and where one was declared."""
    adata = adata_of(counts_of_cells())
    adata.layers["log"] = np.log1p(counts_of_cells())
    on_cpu = {"accelerator": "cpu", "precision": "32-true", "threads": 1}
    options = {"max_epochs": 1, "progress_bar": False, "train_options": on_cpu, **tiny_settings}
    fix = r"Fix: leave `layer` and `use_raw` out: `X` holds counts\. If `layers\['log'\]` is still read then, declare"
    with pytest.raises(DataError, match=fix):
        genejepa.fit(adata, layer="log", **options)
    model = genejepa.fit(adata, **options)
    genejepa.GeneJEPA.setup_anndata(adata, layer="log")
    with pytest.raises(DataError, match=fix) as caught:
        model.get_latent_representation(adata)
    exec(caught.value.fix.partition("first: ")[2], {"adata": adata, "genejepa": genejepa})
    np.testing.assert_array_equal(model.get_latent_representation(adata), adata.obsm["X_genejepa"])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -3, 0.5])
def test_genes_that_are_not_used_may_hold_anything(bad: float) -> None:
    """Row 09: a warning with the number."""
    values = with_value(bad)
    values[9, 3] = bad
    used = np.arange(N_VARS) != 3
    with pytest.warns(DataWarning, match="`X` holds 2 values that are not counts .* genes that are not used"):
        counts = checked(adata_of(values), used=used)
    panel = panel_counts(counts.to_csr(), np.where(used, np.arange(N_VARS), -1), N_VARS)
    assert np.isfinite(panel.data).all()
    values[9, 4] = np.nan
    with pytest.raises(DataError, match=r"`X` holds 1 NaN among .* in cell 'c9', gene 'g4'"):
        checked(adata_of(values), used=used)


def test_no_count_in_the_genes_that_are_used() -> None:
    """Row 12: counts of other genes do not help."""
    values = counts_of_cells()
    values[:, :5] = 0
    with pytest.raises(DataError, match="no count above zero in the 5 genes that are used"):
        checked(adata_of(values), used=np.arange(N_VARS) < 5)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: with_value(0) * (np.arange(N_OBS) % 7 > 0)[:, None], id="row 10: cells without counts"),
        pytest.param(lambda: counts_of_cells() * (np.arange(N_VARS) % 5 > 0), id="row 11: genes without counts"),
        pytest.param(lambda: np.repeat(counts_of_cells()[:1], N_OBS, axis=0), id="row 18: equal cells"),
        pytest.param(lambda: np.full((N_OBS, N_VARS), 3.0), id="row 18: constant cells"),
        pytest.param(lambda: counts_of_cells() * -1.0 * -1.0, id="row 19: minus zero"),
        pytest.param(lambda: np.where(counts_of_cells() == 0, 1e-310, counts_of_cells()), id="row 19: subnormal"),
        pytest.param(
            lambda: np.stack([np.roll(np.arange(30.0), i) for i in range(N_OBS)]),
            id="row 02: whole numbers of equal sum",
        ),
    ],
)
def test_accepted_in_silence(make: Callable[[], NDArray[np.float64]]) -> None:
    values = make()
    panel = panel_of(adata_of(values))
    found = sparse.csr_matrix((panel.data, panel.indices, panel.indptr), shape=values.shape)
    np.testing.assert_array_equal(found.toarray(), np.where(values < 1e-300, 0, values))
    assert (panel.data >= 1).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        pytest.param(
            lambda: with_value(1e9), r"values up to 1e\+09; above 16777216 .* float32", id="row 13: 1e9 counts"
        ),
        pytest.param(lambda: with_value(1e12).astype(np.int64), r"values up to 1e\+12", id="row 13: 1e12, integers"),
        pytest.param(
            lambda: np.random.default_rng(0).integers(2, size=(80, N_VARS)),
            r"`X` looks binarised: all of its \d+ values are 1",
            id="row 15: ones only",
        ),
        pytest.param(
            lambda: np.random.default_rng(0).integers(2, size=(80, N_VARS)).astype(bool),
            "`X` looks binarised",
            id="row 15: booleans",
        ),
        pytest.param(
            lambda: np.eye(N_OBS, 1000),
            r"`X` has a median of 1 counts in a cell: are these empty",
            id="row 20: ambient",
        ),
        pytest.param(
            lambda: np.where(counts_of_cells() > 2, 2048.0 + 2, counts_of_cells()).astype(np.float16),
            r"values up to 2050; above 2048 .* float16",
            id="row 69: float16 beyond 2048",
        ),
    ],
)
def test_accepted_with_a_warning(make: Callable[[], Any], message: str) -> None:
    with pytest.warns(DataWarning, match=message):
        panel = panel_of(adata_of(make()))
    assert np.isfinite(panel.data).all()


def test_few_ones_are_no_sign_of_binarised_values() -> None:
    """Row 15: small data are no reason for a warning."""
    panel_of(adata_of(np.random.default_rng(0).integers(2, size=(20, N_VARS))))


@pytest.mark.parametrize("kind", [np.asarray, sparse.csr_matrix, sparse.csc_matrix], ids=["dense", "csr", "csc"])
def test_rounding_noise_is_rounded_away(kind: Any) -> None:
    """Row 16: counts with noise give the very counts."""
    noise = 1e-7 * np.random.default_rng(1).uniform(-1, 1, size=(N_OBS, N_VARS))
    noisy = adata_of(kind(counts_of_cells() * (1 + noise)))
    before = noisy.X.copy()
    with pytest.warns(DataWarning, match=r"rounding noise of at most \d+e-07; they are rounded"):
        panel = panel_of(noisy)
    exact = panel_of(adata_of(counts_of_cells()))
    for name in ("indptr", "indices", "data"):
        np.testing.assert_array_equal(getattr(panel, name), getattr(exact, name))
    assert abs(noisy.X - before).max() == 0
    with pytest.warns(DataWarning, match="fractional values"):
        checked(adata_of(counts_of_cells() + 2e-4 * np.eye(N_OBS, N_VARS)))


def test_soft_counts() -> None:
    """Row 17: accepted with a warning, which ``allow_fractional`` silences; then fractions of any number pass."""
    values = counts_of_cells()
    values[:, :4] *= 0.93
    adata = adata_of(values)
    with pytest.warns(DataWarning, match=r"fractional values among .*CellBender, SoupX, RSEM.* used as they are"):
        counts = checked(adata)
    np.testing.assert_array_equal(counts.to_csr().toarray(), values)
    np.testing.assert_array_equal(checked(adata, allow_fractional=True).to_csr().toarray(), values)
    fractional = adata_of(values * 0.93 * (1 + np.arange(N_OBS))[:, None])
    with pytest.raises(DataError, match="normalised without log"):
        checked(fractional)
    checked(fractional, allow_fractional=True)
    for bad in (np.nan, np.inf, -0.5):
        with pytest.raises(DataError, match="`X` holds 1 "):
            checked(adata_of(with_value(bad)), allow_fractional=True)


def test_totals_beyond_float16() -> None:
    """Row 14: depth is added up in float64, whatever the precision of the training, so that values stay finite."""
    panel = panel_of(adata_of(np.full((N_OBS, N_VARS), 60_000.0) + counts_of_cells()))
    normalizer = Normalizer.fit(panel, transform="log1p")
    values, _ = normalizer.dense(panel, np.arange(N_OBS))
    assert normalizer.median_depth > 2 * float(np.finfo(np.float16).max)
    assert values.dtype == np.float32
    assert np.isfinite(values).all()
    assert np.abs(values).max() < float(np.finfo(np.float16).max)
