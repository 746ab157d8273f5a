"""Random AnnData against an oracle: each is embedded, trained on and checked as plain arrays and lists say it must be.

``GENEJEPA_FUZZ_SEED=123`` repeats one of them.
"""

from __future__ import annotations

import functools
import os
import re
import traceback
import unicodedata
import warnings
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import anndata
import numpy as np
import pandas as pd
import pytest

import genejepa
from genejepa.errors import DataError, DataWarning, GeneMismatchError, MissingKeyError
from genejepa.model import GeneJEPA
from tests.reliability._strategy import DATES, DONORS, ID_OF, PANEL, Case, draw, fingerprint

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from numpy.typing import NDArray

    Fault = tuple[type[DataError], str]
    Untouched = Callable[[], AbstractContextManager[None]]

WARNINGS = {
    "batch column": r"`obs` has no column 'donor'",
    "batches": r"cells are of a batch that the training did not have",
    "changed names": r"names that R or a spreadsheet has changed",
    "elsewhere": r"not counts \(NaN, infinite, negative or fractional\), all of them in genes that are not used",
    "empty cells": r"of \d+ cells have no counts over the genes of the model",
    "few counts": r"has a median of \S+ counts in a cell",
    "few genes": r"only \d+ of the 10 genes of the model",
    "fractional": r"fractional values among \d+",
    "inexact": r"not every whole number can be kept",
    "no text": r"holds names of type",
    "noise": r"with rounding noise of at most",
    "numbers as batches": r"holds floating-point numbers",
    "objects": r"holds numbers as Python objects",
    "unicode": r"only after Unicode normalisation",
}

SMALLER = {"n_genes": None, "n_latents": 1, "dim": 8, "n_heads": 2, "n_layers": 0}
"""Most of the time goes to the network."""


@dataclass
class Expected:
    """What must come of a case.

    Attributes
    ----------
    faults
        Class and slot of the errors that may be raised: one of them must be, if there is any.
    warned
        Keys of ``WARNINGS``, if there is no error.
    genes, counts
        Genes of the model, or of the panel, that there are, and counts of all cells over them, (n_obs, len(genes)).
    batches
        Names of the batches; None if they do not matter.
    """

    faults: list[Fault] = field(default_factory=list)
    warned: set[str] = field(default_factory=set)
    genes: list[str] = field(default_factory=list)
    counts: NDArray[np.float64] = field(default_factory=lambda: np.empty((0, 0)))
    batches: list[str] | None = None


# The oracle ---------------------------------------------------------------------------------------------


def expected_embedding(case: Case, share: dict[str, float], *, corrects: bool) -> Expected:
    """What must come of the embedding by a model whose genes had these shares of the training counts."""
    expected = Expected()
    _look_at_slot(expected, case)
    columns = _look_at_genes(expected, case, share)
    if corrects or not case.arguments:
        _look_at_batches(expected, case, default="donor" if corrects else None)
    if case.readable and not _lacks_names(case):
        expected.genes = [gene for gene, _ in columns]
        expected.counts = _look_at_values(expected, case, np.array([column for _, column in columns], dtype=int))
        if (expected.counts.sum(1) == 0).any():
            expected.warned.add("empty cells")
    return expected


def expected_training(case: Case) -> Expected:
    """What must come of the start of a training on all genes."""
    expected = Expected()
    _look_at_slot(expected, case)
    _look_at_names(expected, case)
    _look_at_batches(expected, case, default=None, training=True)
    if not case.readable:
        return expected
    counts = _look_at_values(expected, case, np.arange(len(case.names)))
    if len(counts) < 4:
        expected.faults.append((DataError, "`adata`"))
    if _lacks_names(case):
        return expected
    panel = [j for j in range(len(case.names)) if case.is_gene[j] and (counts[:, j] > 0).any()]
    names = [text(name) for name in case.names]
    repeated = Counter(clean(name) for name, is_gene in zip(names, case.is_gene, strict=True) if is_gene)
    if any(repeated[clean(names[j])] > 1 for j in panel):
        expected.faults.append((DataError, f"`{case.table}_names`"))
    if len(panel) < 2:
        expected.faults.append((DataError, f"`{case.slot}`" if panel else f"`{case.table}`"))
    expected.genes, expected.counts = [names[j] for j in panel], counts[:, panel]
    if (expected.counts.sum(1) > 0).sum() < 4:
        expected.faults.append((DataError, "`adata`"))
    return expected


def _look_at_slot(expected: Expected, case: Case) -> None:
    if not case.readable:
        is_missing = case.container == "absent" and case.slot != "X"
        slot = case.slot.removesuffix(".X") if is_missing else case.slot
        expected.faults.append((MissingKeyError if is_missing else DataError, f"`{slot}`"))
    if not case.names:
        expected.faults.append((DataError, f"`{case.slot}`"))
    if case.container == "objects":
        expected.warned.add("objects")


def _look_at_names(expected: Expected, case: Case) -> None:
    if _lacks_names(case):
        expected.faults.append((DataError, f"`{case.table}_names`"))
    elif not all(isinstance(name, str) for name in case.names):
        expected.warned.add("no text")


def _lacks_names(case: Case) -> bool:
    return case.n_names > 1 or any(pd.isna(name) or not text(name).strip() for name in case.names)


def _look_at_genes(expected: Expected, case: Case, share: dict[str, float]) -> list[tuple[str, int]]:
    """Genes of the model that the data have, and their columns."""
    _look_at_names(expected, case)
    if _lacks_names(case):
        return []
    found = find_genes([text(name) if is_gene else "" for name, is_gene in zip(case.names, case.is_gene, strict=True)])
    slot = f"`{case.table}_names`"
    if any(len(columns) > 1 for _, columns in found.values()):
        expected.faults.append((DataError, slot))
    mass = sum(share[gene] for gene in found)
    if mass < 0.5 or not found:
        expected.faults.append((GeneMismatchError, slot))
    if mass < 0.9:
        expected.warned.add("few genes")
    if any(how == "changed" for how, _ in found.values()):
        expected.warned.add("changed names")
    if any(how == "equal" and text(case.names[j]).strip() != gene for gene, (how, (j, *_)) in found.items()):
        expected.warned.add("unicode")
    return [(gene, columns[0]) for gene, (_, columns) in sorted(found.items())]


def find_genes(names: list[str]) -> dict[str, tuple[str, list[int]]]:
    """How each gene of the model is found among names, and in which columns; an empty name is not a gene."""
    names = [clean(name) for name in names]
    found: dict[str, tuple[str, list[int]]] = {}
    unclear: set[str] = set()
    taken: set[int] = set()
    for how in ("equal", "version", "identifier", "changed", "date"):
        new = {}
        for gene in PANEL:
            columns = [j for j, name in enumerate(names) if name and fits(gene, name, how)]
            free = [j for j in columns if j not in taken]
            if gene in found or gene in unclear or not free:
                continue
            if len({names[j].partition(".")[0] if names[j].startswith("ENSG") else names[j] for j in columns}) == 1:
                new[gene] = ("changed" if how == "date" else how, free)
            else:
                unclear.add(gene)
        found |= new
        taken |= {j for _, columns in new.values() for j in columns}
    return found


def fits(gene: str, name: str, how: str) -> bool:
    """Whether a name is that of a gene of the model, in one of the ways."""
    symbol = next((symbol for symbol, gene_id in ID_OF.items() if gene_id == gene), gene)
    bare = re.sub(r"\.\d+$", "", name) if name.startswith("ENSG") else ""
    if how == "equal":
        return name == gene
    if how == "version":
        return bare == gene
    if how == "identifier":
        return name == symbol if gene.startswith("ENSG") else bare != "" and bare == ID_OF.get(gene)
    if how == "date":
        return name in DATES.get(gene, ())
    return name.replace("-", ".") == gene.replace("-", ".")


def text(name: Any) -> str:
    return name.decode() if isinstance(name, bytes) else str(name)


def clean(name: str) -> str:
    return unicodedata.normalize("NFC", name).strip()


def _look_at_values(expected: Expected, case: Case, used: NDArray[np.int_]) -> NDArray[np.float64]:
    """Counts as they are used, (n_obs, len(used))."""
    values = case.counts[:, used]
    possible = np.isfinite(case.counts) & (np.abs(case.counts) <= 2.0**53)
    numbers = np.where(possible[:, used], values, 0)
    deviation = np.abs(numbers - np.rint(numbers))
    positive = values > np.finfo(np.float32).tiny
    has_noise_only = deviation.max(initial=0) <= 1e-4
    is_corrected = 2 * (deviation > 0).sum() < positive.sum()
    if has_noise_only:
        values = np.where(possible[:, used], np.rint(values), values)
        positive = values > 0
    is_bad = not possible[:, used].all() or (values < 0).any() or not (has_noise_only or is_corrected)
    if is_bad or (len(values) and not positive.any()):
        expected.faults.append((DataError, f"`{case.slot}`"))
        return np.where(possible[:, used], values, 0)
    if deviation.max(initial=0) > np.finfo(np.float32).tiny:
        expected.warned.add("noise" if has_noise_only else "fractional")
    if values.max(initial=0) > (2**11 if case.dtype == np.float16 else 2**24):
        expected.warned.add("inexact")
    others = np.delete(np.where(possible, case.counts, -1), used, axis=1)
    if (others < 0).any() or (others != np.rint(others)).any():
        expected.warned.add("elsewhere")
    if len(values) and np.median(np.where(possible, case.counts, 0).sum(1)) < 10:
        expected.warned.add("few counts")
    return values


def _look_at_batches(expected: Expected, case: Case, *, default: str | None, training: bool = False) -> None:
    key = case.batch_key or default
    if key is None:
        return
    if key not in case.obs:
        if case.batch_key is None:
            expected.warned.add("batch column")
        else:
            expected.faults.append((MissingKeyError, f"`obs['{key}']`"))
        return
    batches = case.obs[key]
    is_mixed = any(isinstance(b, int) for b in batches) and any(isinstance(b, str) for b in batches)
    has_too_many = training and len(batches) >= 20 and len(set(batches)) > len(batches) / 2
    if None in batches or is_mixed or has_too_many:
        expected.faults.append((DataError, f"`obs['{key}']`"))
    if default is not None:
        expected.batches = [str(batch) for batch in batches]
        if not set(expected.batches) <= set(DONORS):
            expected.warned.add("batches")
        if any(isinstance(batch, float) for batch in batches):
            expected.warned.add("numbers as batches")


# The cases ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """A trained model, and the share that each of its genes had in the training counts."""

    trained: GeneJEPA
    share: dict[str, float]
    corrects: bool


@pytest.fixture(scope="module")
def models(tiny_settings: dict[str, Any], tiny_training: dict[str, Any]) -> list[Model]:
    """A model without and one with batch correction."""
    rng = np.random.default_rng(5)  # no selection of the genes has 50 or 90 % of these counts, to 1e-4
    counts = rng.poisson(rng.gamma(2.0, 2.0, size=len(PANEL)), size=(60, len(PANEL))).astype(np.float32)
    share = (counts.sum(0) + 0.5) / (counts.sum(0) + 0.5).sum()
    made = []
    for batch_key in (None, "donor"):
        adata = anndata.AnnData(counts, var=pd.DataFrame(index=list(PANEL)))
        adata.obs_names = [f"cell{i}" for i in range(60)]
        adata.obs["donor"] = [DONORS[i % 2] for i in range(60)]
        GeneJEPA.setup_anndata(adata, batch_key=batch_key)
        model = GeneJEPA(adata, **tiny_settings | SMALLER)
        model.train(**tiny_training)
        made.append(Model(model, dict(zip(PANEL, share.tolist(), strict=True)), corrects=batch_key is not None))
    return made


def test_random_cells(
    models: list[Model],
    profile: Any,
    record_figure: Callable[[str, Any], None],
    global_rng_untouched: Untouched,
    tmp_path: Path,
) -> None:
    """Any AnnData gives the right vectors or the right error, and is not changed."""
    only = os.environ.get("GENEJEPA_FUZZ_SEED")
    if only is not None:
        _try(int(only), models, global_rng_untouched, tmp_path)
        return
    n_cases = profile.pick(fast=1_000, slow=3_000, nightly=10_000)
    found: Counter[str] = Counter()
    failures = []
    for seed in range(n_cases):
        try:
            found.update(_try(seed, models, global_rng_untouched, tmp_path))
        except Exception:  # noqa: BLE001  # every exception is a finding
            failures.append(f"GENEJEPA_FUZZ_SEED={seed}\n{traceback.format_exc()}")
    record_figure("cases", n_cases)
    record_figure("failures", len(failures))
    record_figure("outcomes", dict(sorted(found.items())))
    assert not failures, f"{len(failures)} of {n_cases} cases, such as\n" + "\n".join(failures[:3])
    for outcome, share in {
        "embedded": 0.2,
        "refused at embedding: DataError": 0.1,
        "refused at embedding: GeneMismatchError": 0.02,
        "refused at embedding: MissingKeyError": 0.01,
        "accepted for training": 0.2,
        "refused for training: DataError": 0.2,
        "refused for training: MissingKeyError": 0.01,
        "check: ok": 0.2,
        "check: not ok": 0.2,
        **dict.fromkeys((f"warned of: {label}" for label in WARNINGS), 0.002),
    }.items():
        assert found[outcome] >= share * n_cases, f"{found[outcome]} times {outcome!r}: {found}"


def _try(seed: int, models: list[Model], global_rng_untouched: Untouched, directory: Path) -> list[str]:
    """Judge one case, and name what came of it."""
    case, model = draw(seed, directory), models[seed % 2]
    before = fingerprint(case.adata)
    try:
        with global_rng_untouched():
            n_genes = None if seed % 16 else 5
            outcomes = [*_embed(case, model), *_train(case, n_genes=n_genes), *_check(case, model)]
    finally:
        if case.adata.isbacked:
            case.adata.file.close()
    assert fingerprint(case.adata) == before
    return outcomes


def _embed(case: Case, model: Model) -> Iterator[str]:
    expected = expected_embedding(case, model.share, corrects=model.corrects)
    vectors, error, warned = _attempt(lambda: model.trained.get_latent_representation(case.adata, **case.arguments))
    _judge(error, expected)
    if error is not None:
        yield f"refused at embedding: {type(error).__name__}"
        return
    assert vectors.dtype == np.float32
    assert vectors.shape == (len(case.counts), model.trained.embedding_dim)
    assert np.isfinite(vectors).all()
    np.testing.assert_array_equal(vectors, _plainly_embedded(expected, model))
    assert warned == expected.warned
    yield "embedded"
    yield from (f"warned of: {label}" for label in warned)


def _plainly_embedded(expected: Expected, model: Model) -> NDArray[np.float32]:
    """Vectors of the same counts as a plain array of only the genes of the model, in 32 bits."""
    obs = pd.DataFrame(index=[f"c{i}" for i in range(len(expected.counts))])
    if expected.batches is not None:
        obs["donor"] = expected.batches
    plain = anndata.AnnData(expected.counts.astype(np.float32), obs=obs, var=pd.DataFrame(index=expected.genes))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)
        return model.trained.get_latent_representation(plain)


def _train(case: Case, *, n_genes: int | None) -> Iterator[str]:
    expected = expected_training(case)
    model, error, _ = _attempt(lambda: GeneJEPA(case.adata, n_genes=n_genes))
    if n_genes is None or len(expected.genes) <= n_genes:
        _judge(error, expected)
        genes = expected.genes
    else:  # which genes are chosen decides whether repeated names and cells without counts matter
        _judge(error, expected, unclear=[(DataError, "`adata`"), (DataError, f"`{case.table}_names`")])
        genes = expected.genes if error is not None else [gene for gene in expected.genes if gene in model.genes]
        assert error is not None or len(genes) == n_genes
    if error is not None:
        yield f"refused for training: {type(error).__name__}"
        return
    assert model.genes == genes
    totals = expected.counts[:, [expected.genes.index(gene) for gene in genes]].sum(0) + 0.5
    np.testing.assert_allclose(model.normalizer.frequency, totals / totals.sum(), rtol=1e-5)
    yield "accepted for training"


def _check(case: Case, model: Model) -> Iterator[str]:
    """A report has an error if, and only if, a training or an embedding would be refused."""
    training = expected_training(case)
    embedding = expected_embedding(case, model.share, corrects=model.corrects)
    asked = {"model": model.trained, **case.arguments}
    if case.arguments and model.corrects:  # a report on what is asked for leaves out what is declared
        asked["batch_key"] = case.batch_key
    for expected, options in ((training, {}), (embedding, asked)):
        report, error, warned = _attempt(functools.partial(genejepa.check, case.adata, **options))
        assert error is None
        assert not warned
        assert report.ok == (not expected.faults), f"{expected.faults}\n{report}"
        yield f"check: {'ok' if report.ok else 'not ok'}"


def _attempt(function: Callable[[], Any]) -> tuple[Any, DataError | None, set[str]]:
    """Result or error of a function, and the keys of the warnings."""
    result, error = None, None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("error")
        warnings.simplefilter("always", DataWarning)
        try:
            result = function()
        except DataError as raised:
            error = raised
    return result, error, {_label(str(warning.message)) for warning in caught}


def _label(message: str) -> str:
    (label,) = [label for label, pattern in WARNINGS.items() if re.search(pattern, message)] or [message]
    return label


def _judge(error: DataError | None, expected: Expected, *, unclear: Sequence[Fault] = ()) -> None:
    """Compare an error with those that are expected, and with those that may be raised or not."""
    certain = [fault for fault in expected.faults if fault not in unclear]
    if error is None:
        assert not certain
        return
    possible = [*certain, *unclear]
    if not possible:
        raise error
    assert (type(error), True) in [(kind, slot in error.problem) for kind, slot in possible], f"{error}\n{possible}"
    *_, last = str(error).split("\n")
    assert re.fullmatch(r"Fix: \S.{5,}", last), str(error)
