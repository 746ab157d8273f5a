"""Write docs/benchmark.md, its figure and results/summary.csv from the tables in benchmarks/results.

    python benchmarks/report.py

Every number of the document comes from these tables.
"""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
import pandas as pd
from _common import HERE, RESULTS
from _data import (
    ABLATIONS,
    BASELINES,
    BATCH_DATASETS,
    DATASETS,
    HARMONY,
    INDUCTIVE,
    MODEL,
    OTHER_ENCODERS,
    PCAS,
    SCVI,
    TRANSDUCTIVE,
    TWO_VIEWS,
    WITH_BATCH,
    all_jobs,
)

from genejepa.bench import statistics

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

DOCUMENT = HERE.parent / "docs" / "benchmark.md"
FIGURE = DOCUMENT.parent / "images" / "benchmark.png"

TIE: Final = 0.005
"""Two scores that differ by no more are called tied."""
MARK: Final = "†"
"""Of labels that come from clustering the same counts."""
NONE: Final = "–"
INTERVAL: Final = ("ci_low", "ci_high")
COSTS: Final = ("fit_seconds", "embed_seconds", "peak_mb")
_MACHINE: Final = ("cpu", "processes", "threads per process")

INTRODUCTION: Final = """\
<!-- Written by benchmarks/report.py: do not edit. -->

# Benchmark

How well embeddings of single cells serve, measured the same way for all. This page is generated from the tables in
`benchmarks/results`.

![Scores of all methods](images/benchmark.png)
"""

IN_SHORT: Final = """\
## In short

A cell is one label column with one of linear probe, kNN and few-shot 5. The baselines are all methods but the variants
of genejepa; the best of them is chosen anew for every cell, after the fact, which favours them.
"""

PROTOCOL: Final = """\
## How it was done

`make benchmark` runs everything. All methods get the same cells and the same panel of 2,000 genes (or all expressed
genes, if fewer), which is the one that genejepa chooses by default. All have their published or default settings.
genejepa has one configuration for all data sets, chosen with these data sets in view: the differences are those of a
development set. Folds, labelled cells, thinned cells and held-out cells are the same for all methods and seeds.

- **linear**: logistic regression, five folds, scale and penalty chosen within the fold. **kNN**: 15 neighbours, five
  folds. **few-shot n**: logistic regression on n labelled cells per class, mean of ten draws.
- **shallow cells, small panels**: the models of the linear probe, tested on their test cells after binomial thinning of
  the molecules, or with a random share of the genes visible.
- Classes with fewer than ten cells take no part. Scores are in points, hundredths; those of probes are macro-F1.
- `a ± b` is mean and standard deviation over seeds. `a [b, c]` is one seed with its 95 % bootstrap interval over cells
  (few-shot: Student interval over draws). An average over data sets has the deviation of the average over seeds, or
  the interval as of independent data sets. Clusters, scib-metrics, the leak of depth and means over left-out batches
  have no interval.
- In tables of averages, brackets such as (+1.2) hold what genejepa has more on the same label sets. For time, scVI-50
  and the inductive scVI-10 ran on some data sets only.
- † marks labels that come from clustering the same counts. They favour methods like that clustering, mostly PCA; a high
  score shows agreement with an earlier analysis, not correctness. Averages are over both kinds of labels.
- The two kang data sets come from one experiment and share 114 cells.
"""

GROUPS: Final = """\
## Donors left out

skin_ctcl has three healthy and three diseased donors, and no cell types. The linear probe is tested on the condition of
donors that it was not fitted on, two at a time. Intervals are over cells; with six donors, differences between methods
are no evidence.
"""

BATCHES: Final = """\
## Batches

Genes are chosen within batches. Harmony, scVI and genejepa are told the batch; PCA and one row of genejepa are not.
Total, biology and batch are the aggregates of scib-metrics. "Left-out batch" is the macro-F1 of a linear probe on a
batch that it was not fitted on, mean over batches. In the last column less is better.
"""

STATISTICS: Final = """\
## Statistics

Average ranks of the means over seeds, over all label columns (also those marked †) and linear, kNN and few-shot 5; 1 is
best. A method that was not run everywhere has no rank.
"""

TESTS: Final = """\
Wilcoxon signed-rank tests over data sets, with the label columns of one data set averaged, and corrected by Holm within
each measure. With so few data sets the smallest possible p is not small.
"""

COST: Final = """\
## Time and memory

Median over data sets and seeds (smallest to largest), one thread per method, two methods at a time on two cores that
had little else to do. Memory is what fit and embedding added to that of the process, which had the libraries loaded.
The last column is the time of the fit of scVI-10 over that of the method, on the same data set: two at a time slow each
other down, and [benchmarks/README.md](../benchmarks/README.md) has the times of genejepa and scVI one after the other.
"""


class Measure(NamedTuple):
    """A column of a table: its title, and the rows of the scores that it shows."""

    title: str
    task: str
    setting: str = "all"
    metric: str = "macro_f1"

    @property
    def key(self) -> tuple[str, str, str]:
        """As in :mod:`genejepa.bench.statistics`."""
        return self.task, self.setting, self.metric


LINEAR: Final = Measure("linear", "linear")
KNN: Final = Measure("kNN", "knn")
FEW: Final = {n: Measure(f"few-shot {n}", "few_shot", str(n)) for n in (1, 5, 10, 50)}
DEPTH: Final = {s: Measure(f"{100 * s:g} % of molecules", "depth", f"{s:g}") for s in (0.5, 0.25, 0.1)}
GENES: Final = {s: Measure(f"{100 * s:g} % of genes", "genes", f"{s:g}") for s in (0.5, 0.2)}
CLUSTERS: Final = [
    Measure(f"{title} {metric.upper()}", "clustering", setting, metric)
    for (title, setting), metric in product((("k-means", "kmeans"), ("Leiden", "leiden")), ("ari", "nmi"))
]
TOTAL: Final = Measure("scib total", "integration", metric="total")
TRANSFER: Final = Measure("left-out batch", "transfer", "mean")
BIOLOGY: Final = Measure("scib biology", "integration", metric="bio_conservation")
MIXING: Final = Measure("scib batch", "integration", metric="batch_correction")
LEAKED_DEPTH: Final = Measure("depth (R²)", "leak", "depth", "r2")
LEAKED_BATCH: Final = Measure("batch (balanced accuracy)", "leak", "batch", "balanced_accuracy")
MAIN: Final = [LINEAR, KNN, FEW[5]]


Unit = tuple[str, str]
"""A data set and one of its label columns."""


class Scores:
    """The scores of some rows, such as those of one regime, by method and measure."""

    def __init__(self, table: pd.DataFrame) -> None:
        self.table = table
        labels = table[["dataset", "labels", "labels_from_clustering"]].drop_duplicates()
        self.units = list(labels[["dataset", "labels"]].itertuples(index=False, name=None))
        self._clustered = dict(zip(self.units, labels["labels_from_clustering"], strict=True))
        groups = table.dropna(subset="value").groupby(["method", "task", "setting", "metric"])
        self._rows: dict[Any, pd.DataFrame] = dict(list(groups))

    def rows(self, method: str, measure: Measure, unit: Unit | None = None) -> pd.DataFrame:
        """The rows of a method and a measure, one per unit and seed."""
        found = self._rows.get((method, *measure.key), self.table.iloc[:0])
        return found if unit is None else found[(found["dataset"] == unit[0]) & (found["labels"] == unit[1])]

    def means(self, method: str, measure: Measure) -> pd.Series[float]:
        """Means over seeds, by unit."""
        return self.rows(method, measure).groupby(["dataset", "labels"], sort=False)["value"].mean()

    def has(self, method: str, measure: Measure) -> bool:
        """Whether there is any value."""
        return (method, *measure.key) in self._rows

    def is_clustered(self, unit: Unit) -> bool:
        """Whether the labels come from clustering the same counts."""
        return bool(self._clustered[unit])

    def name(self, unit: Unit) -> str:
        """Data set and label column, marked if the labels come from clustering."""
        return f"{unit[0]}, {unit[1]}{' ' + MARK if self.is_clustered(unit) else ''}"


def spread(rows: pd.DataFrame) -> str:
    """Mean over units in points, and the deviation over seeds or, for one seed, the interval over cells."""
    if rows.empty:
        return NONE
    mean = rows.groupby(["dataset", "labels"])["value"].mean().mean()
    seeds = rows.groupby("seed")["value"].agg(["mean", "size"])
    complete = seeds.loc[seeds["size"] == seeds["size"].max(), "mean"]
    if len(complete) > 1:
        return f"{100 * mean:.1f} ± {100 * complete.std():.1f}"
    low, high = ((rows[bound] - rows["value"]).pow(2).sum(skipna=False) ** 0.5 / len(rows) for bound in INTERVAL)
    return (
        f"{100 * mean:.1f}"
        if np.isnan(low)
        else f"{100 * mean:.1f} [{100 * (mean - low):.1f}, {100 * (mean + high):.1f}]"
    )


def records(table: pd.DataFrame) -> list[Any]:
    """Rows as tuples with the names of the columns."""
    return list(table.itertuples(index=False))


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a table, with an empty line after it."""
    lines = [header, ["---"] * len(header), *rows]
    return [*(f"| {' | '.join(line)} |" for line in lines), ""]


def averages(scores: Scores, methods: Iterable[str], measures: Sequence[Measure]) -> list[str]:
    """Table of means over units: one row per method, with what genejepa has more on the same units."""
    rows = []
    for method in methods:
        shown = [measure for measure in measures if scores.has(method, measure)]
        if not shown:
            continue
        cells = [average(scores, method, measure) for measure in measures]
        units = {unit for measure in shown for unit in scores.means(method, measure).index}
        clustered = sum(map(scores.is_clustered, units))
        rows.append([bold(method), *cells, f"{len(units)} ({clustered} {MARK})"])
    if not rows:
        return ["No results yet.", ""]
    return markdown(["method", *(measure.title for measure in measures), "label sets"], rows)


def average(scores: Scores, method: str, measure: Measure) -> str:
    """Mean over units with its spread and, in brackets, how much more genejepa has there."""
    cell = spread(scores.rows(method, measure))
    difference = (scores.means(MODEL, measure) - scores.means(method, measure)).dropna()
    return cell if method == MODEL or difference.empty else f"{cell} ({100 * difference.mean():+.1f})"


def by_unit(scores: Scores, measure: Measure, columns: dict[str, Callable[[Unit], str]]) -> list[str]:
    """Table of one measure: one row per unit."""
    with_values = {unit for method in TRANSDUCTIVE for unit in scores.means(method, measure).index}
    units = [unit for unit in scores.units if unit in with_values]
    rows = [[scores.name(unit), *(column(unit) for column in columns.values())] for unit in units]
    return markdown(["data set, labels", *columns], rows)


def comparison(scores: Scores, measure: Measure, others: Iterable[str]) -> list[str]:
    """Table of one measure: genejepa, PCA, other methods, and the difference to the best of all baselines."""

    def of(method: str) -> Callable[[Unit], str]:
        return lambda unit: spread(scores.rows(method, measure, unit))

    def best_pca(unit: Unit) -> str:
        found = {name: scores.rows(name, measure, unit)["value"].mean() for name in PCAS}
        best = max((name for name in found if not np.isnan(found[name])), key=lambda name: found[name], default=None)
        return NONE if best is None else spread(scores.rows(best, measure, unit))

    def difference(unit: Unit) -> str:
        row = compared.get(unit)
        if row is None:
            return NONE
        cell = f"{100 * row.difference:+.1f} ({row.best})"
        return cell if row.difference >= -TIE else f"**{cell}**"

    compared = {(row.dataset, row.labels): row for row in records(against_best(scores, [measure]))}
    single = best_single_pca(scores)
    columns = {MODEL: of(MODEL), "best PCA": best_pca, **({single: of(single)} if single else {})}
    columns |= {name: of(name) for name in others if scores.has(name, measure)}
    return by_unit(scores, measure, {**columns, "difference to the best baseline": difference})


def against_best(scores: Scores, measures: Sequence[Measure]) -> pd.DataFrame:
    """Comparison with the best baseline, by unit and measure; empty without both."""
    present = [name for name in BASELINES + WITH_BATCH if any(scores.has(name, m) for m in measures)]
    baselines = [name for name in dict.fromkeys(present) if not name.startswith(MODEL)]
    if not baselines or not any(scores.has(MODEL, measure) for measure in measures):
        return pd.DataFrame(columns=["dataset", "labels", "task", "setting", "metric", "best", "difference"])
    wanted = scores.table[scores.table["task"].isin([measure.task for measure in measures])]
    found = statistics.against_best(wanted, MODEL, baselines, measures=[measure.key for measure in measures])
    return found.dropna(subset="difference")


def best_single_pca(scores: Scores) -> str | None:
    """The PCA that is best on average over units and main measures, of those that have all values."""
    values = pd.DataFrame(
        {name: pd.concat({m.title: scores.means(name, m) for m in MAIN}) for name in PCAS if scores.has(name, LINEAR)}
    )
    complete = values.loc[:, values.notna().all()]
    return None if complete.empty else str(complete.mean().idxmax())


def bold(method: str) -> str:
    return f"**{method}**" if method == MODEL else method


def share_line(scores: Scores, what: str) -> str:
    """How often genejepa is best or tied, and how far behind at most."""
    found = against_best(scores, MAIN)
    if found.empty:
        return f"- {what}: no results yet."
    good = int((found["difference"] >= -TIE).sum())
    worst = records(found.nsmallest(1, "difference"))[0]
    measure = next(m.title for m in MAIN if m.key == (worst.task, worst.setting, worst.metric))
    return (
        f"- {what}: best or tied within {100 * TIE:g} point in {good} of {len(found)} cells "
        f"({100 * good / len(found):.0f} %); worst {100 * worst.difference:+.1f} points "
        f"({worst.dataset}, {worst.labels}, {measure}, against {worst.best})."
    )


def mean_difference(scores: Scores, measure: Measure, others: Iterable[str]) -> str:
    """Mean over units of genejepa minus the best of some methods, chosen anew for every unit."""
    values = pd.DataFrame({name: scores.means(name, measure) for name in others if scores.has(name, measure)})
    difference = (scores.means(MODEL, measure) - values.max(axis=1)).dropna() if not values.empty else pd.Series()
    return NONE if difference.empty else f"{100 * difference.mean():+.1f} points"


def least_difference(scores: Scores, measure: Measure, others: Iterable[str]) -> str:
    """Mean over units of genejepa minus the method that is best on average, of those that have all units."""
    model = scores.means(MODEL, measure)
    differences = [model - scores.means(name, measure) for name in others if scores.has(name, measure)]
    means = [difference.mean() for difference in differences if difference.notna().all()]
    return f"{100 * min(means):+.1f} points" if means else NONE


def in_short(plain: Scores) -> list[str]:
    """The answers to the first questions."""
    independent = Scores(plain.table[~plain.table["labels_from_clustering"]])
    return [
        IN_SHORT,
        share_line(plain, "All labels"),
        share_line(independent, "Labels that do not come from clustering"),
        *(
            f"- {what} on average: {mean_difference(plain, measure, PCAS)} against the best PCA of each label set, "
            f"{least_difference(plain, measure, PCAS)} against the one PCA that is best on average, "
            f"{mean_difference(plain, measure, SCVI)} against the best scVI of each."
            for what, measure in (("Few-shot 5", FEW[5]), ("Cells with 25 % of their molecules", DEPTH[0.25]))
        ),
        "",
    ]


def accuracy(plain: Scores) -> list[str]:
    lines = [
        "## Accuracy",
        "",
        "`best PCA` is the best of eight, chosen anew for every number; the named PCA is best on average.",
        f"A difference is bold if genejepa is more than {100 * TIE:g} point behind.",
        "",
    ]
    for measure in MAIN:
        lines += [f"### {measure.title}", "", *comparison(plain, measure, [*SCVI, "HVG", *TWO_VIEWS])]
    return lines


def groups(plain: Scores) -> list[str]:
    """Tables of labels that are nested in groups."""
    measure = Measure("macro-F1", "left_out_groups", "sample")
    return [
        GROUPS,
        *averages(plain, TRANSDUCTIVE[::-1], [measure]),
    ]


def section(title: str, text: str, table: list[str]) -> list[str]:
    return [f"## {title}", "", *([text, ""] if text else []), *table]


def batches(corrected: Scores) -> list[str]:
    """Tables of the data sets with batches."""
    lines = [BATCHES]
    for name in BATCH_DATASETS:
        own = Scores(corrected.table[corrected.table["dataset"] == name])
        if own.table.empty:
            continue
        marked = own.name(own.units[0])
        levels = own.table.loc[own.table["task"] == "transfer", "setting"].drop_duplicates()
        transfer = [Measure(str(level), "transfer", str(level)) for level in levels if level != "mean"]
        measures = [TOTAL, BIOLOGY, MIXING, TRANSFER, LINEAR, KNN, LEAKED_BATCH]
        lines += [f"### {marked}", "", *averages(own, WITH_BATCH, measures)]
        lines += [f"Left-out batches of {marked}:", "", *averages(own, WITH_BATCH, transfer)]
    return lines


def cost(costs: pd.DataFrame) -> list[str]:
    """Table of time and memory."""
    plain = costs[(costs["regime"] == "transductive") & (costs["batch"] == "plain")]
    rows = []
    seconds = plain.pivot_table("fit_seconds", "dataset", "method")
    for method in TRANSDUCTIVE[::-1]:
        own = plain[plain["method"] == method]
        if own.empty:
            continue
        ratio = (seconds["scVI-10"] / seconds[method]).dropna() if "scVI-10" in seconds else pd.Series()
        rows.append([bold(method), *(median_and_range(own[name]) for name in COSTS), median_and_range(ratio)])
    header = ["method", "fit, s", "embedding, s", "memory, MB", "scVI-10 / method"]
    return [COST, *markdown(header, rows)]


def median_and_range(values: pd.Series[float]) -> str:
    """Median, smallest and largest of the values that are known, to three digits."""
    values = values.dropna()
    if values.empty:
        return NONE
    median, low, high = (
        f"{value:,.0f}" if value >= 100 else f"{value:.3g}" for value in (values.median(), values.min(), values.max())
    )
    return median if len(values) == 1 else f"{median} ({low} to {high})"


def tests(plain: Scores) -> list[str]:
    """Tables of ranks and tests."""
    main = Scores(plain.table[plain.table["method"].isin([MODEL, *BASELINES])])
    if not (any(main.has(MODEL, m) for m in MAIN) and any(main.has(b, m) for b, m in product(BASELINES, MAIN))):
        return section("Statistics", "No results yet.", [])
    measures = [measure.key for measure in MAIN]
    ranks = statistics.average_rank(main.table, measures=measures)
    ranked = markdown(
        ["method", "average rank", "cells"],
        [[bold(row.method), f"{row.rank:.2f}" if row.rank > 0 else NONE, str(row.n_cells)] for row in records(ranks)],
    )
    found = statistics.paired_tests(main.table, MODEL, measures=measures)
    titles = {m.key: m.title for m in MAIN}
    tested = markdown(
        ["against", "measure", "data sets", "median difference, points", "p", "p (Holm)"],
        [
            [
                row.other,
                titles[row.task, row.setting, row.metric],
                str(row.n_pairs),
                f"{100 * row.median_difference:+.1f}",
                f"{row.p:.3f}",
                f"{row.p_holm:.3f}",
            ]
            for row in records(found)
        ],
    )
    return [
        STATISTICS,
        *ranked,
        TESTS,
        *tested,
    ]


def worse(plain: Scores, corrected: Scores, inductive: Scores) -> list[str]:
    """Everything in which genejepa is behind."""
    more = [*MAIN, *(FEW[n] for n in (1, 10, 50)), *DEPTH.values(), *GENES.values(), *CLUSTERS]
    parts = [
        ("", plain, more),
        ("told the batch", corrected, [LINEAR, KNN, TOTAL, BIOLOGY, MIXING, TRANSFER]),
        ("new cells", inductive, [*MAIN, *DEPTH.values(), *GENES.values()]),
    ]
    rows = []
    for setting, scores, measures in parts:
        titles = {measure.key: measure.title for measure in measures}
        found = against_best(scores, measures)
        for row in records(found[found["difference"] < -TIE].sort_values("difference")):
            unit, key = (row.dataset, row.labels), (row.task, row.setting, row.metric)
            measure = next(m for m in measures if m.key == key)
            rows.append(
                [
                    scores.name(unit),
                    ", ".join(filter(None, (titles[key], setting))),
                    spread(scores.rows(MODEL, measure, unit)),
                    f"{row.best}: {spread(scores.rows(row.best, measure, unit))}",
                    f"{100 * row.difference:+.1f}",
                ]
            )
    header = ["data set, labels", "measure", MODEL, "best baseline", "difference"]
    if not any(len(against_best(scores, measures)) for _, scores, measures in parts):
        return ["## What is worse", "", "No results yet.", ""]
    lines = [
        "## What is worse",
        "",
        f"Every number in which genejepa is more than {100 * TIE:g} point behind the best of the baselines:",
        "",
        *(markdown(header, rows) if rows else ["There is none.", ""]),
    ]
    notes = [*better_variants(plain), *leaks(plain)]
    return [*lines, *notes, ""] if notes else lines


def better_variants(plain: Scores) -> list[str]:
    """Variants of genejepa that are better than it on average."""
    out = []
    for method, measure in product(ABLATIONS, [*MAIN, *DEPTH.values(), *GENES.values(), *CLUSTERS]):
        difference = (plain.means(method, measure) - plain.means(MODEL, measure)).dropna()
        if not difference.empty and difference.mean() > 0:
            out.append(
                f"- “{method}”: {100 * difference.mean():.1f} points better than genejepa on average ({measure.title})."
            )
    return out


def leaks(plain: Scores) -> list[str]:
    """Baselines that give away less than genejepa."""
    out = []
    for measure in (LEAKED_DEPTH, LEAKED_BATCH):
        others = {name: plain.means(MODEL, measure) - plain.means(name, measure) for name in BASELINES}
        more = {name: values.mean() for name, values in others.items() if values.mean() > TIE}
        if more:
            least = max(more, key=lambda name: more[name])
            out.append(
                f"- Leak of {measure.title}: on average genejepa gives away more than {len(more)} of the baselines; "
                f"{100 * more[least]:.1f} points more than {least}, which gives away least."
            )
    return out


def protocol(environment: pd.DataFrame, costs: pd.DataFrame) -> list[str]:
    """How it was done."""
    rows = []
    for name, dataset in DATASETS.items():
        own = costs[(costs["dataset"] == name) & (costs["regime"] == "transductive") & (costs["batch"] == "plain")]
        genes = str(own["n_genes"].iloc[0]) if len(own) else NONE
        for labels, clustered in dataset.labels.items():
            kind = f"clusters of the same counts {MARK}" if clustered else "independent of the counts"
            batch = dataset.batch_key or NONE
            rows.append([name, dataset.source, labels, kind, batch, f"{dataset.n_cells:,}", genes])
    machine = dict(zip(environment["name"], environment["value"], strict=True))
    versions = ", ".join(f"{name} {value}" for name, value in machine.items() if name not in _MACHINE)
    return [
        PROTOCOL,
        *markdown(["data set", "source", "labels", "kind of labels", "batch", "cells", "genes of the panel"], rows),
        f"Processor: {machine.get('cpu', NONE)}; {machine.get('processes', NONE)} processes with "
        f"{machine.get('threads per process', NONE)} thread each. Versions: {versions or NONE}.",
        "",
    ]


def missing(costs: pd.DataFrame) -> list[str]:
    """Jobs without a result."""
    done = set(costs[["dataset", "regime", "batch", "method", "seed"]].itertuples(index=False, name=None))
    left = [job for job in all_jobs() if (job.dataset, job.regime, job.batch, job.method, job.seed) not in done]
    if not left:
        return []
    seeds: dict[tuple[str, str], list[str]] = {}
    for job in left:
        seeds.setdefault((f"{job.dataset}, {job.regime}, {job.batch}", job.method), []).append(str(job.seed))
    lines: dict[str, list[str]] = {}
    for (where, method), numbers in seeds.items():
        lines.setdefault(where, []).append(f"{method} (seed {', '.join(numbers)})")
    return [
        "## Missing",
        "",
        f"{len(left)} of {len(all_jobs())} jobs have no result in these tables:",
        "",
        *(f"- {where}: {'; '.join(methods)}" for where, methods in lines.items()),
        "",
    ]


def document(scores: pd.DataFrame, costs: pd.DataFrame, environment: pd.DataFrame) -> str:
    """The whole document."""
    is_plain = scores["batch"] == "plain"
    plain = Scores(scores[is_plain & (scores["regime"] == "transductive")])
    inductive = Scores(scores[is_plain & (scores["regime"] == "inductive")])
    corrected = Scores(scores[~is_plain])
    best_last = TRANSDUCTIVE[::-1]
    shallow = [LINEAR, *DEPTH.values(), *GENES.values()]
    lines = [
        INTRODUCTION,
        *in_short(plain),
        *protocol(environment, costs),
        *worse(plain, corrected, inductive),
        *accuracy(plain),
        *section("Few labelled cells", "", averages(plain, best_last, list(FEW.values()))),
        *section(
            "What each part contributes",
            "The same encoder without some objectives, a perceptron instead of gene tokens, random weights, and the "
            "objective of the original GeneJEPA.",
            averages(plain, [MODEL, *ABLATIONS, *OTHER_ENCODERS], [*MAIN, DEPTH[0.25], GENES[0.2], CLUSTERS[2]]),
        ),
        *section(
            "Shallow cells and small panels",
            "A linear probe that was fitted on cells as they are.",
            averages(plain, best_last, shallow),
        ),
        "### 25 % of molecules, by data set",
        "",
        *comparison(plain, DEPTH[0.25], [*SCVI, "HVG", *TWO_VIEWS]),
        *section("Clusters", "Agreement of clusters with labels.", averages(plain, best_last, CLUSTERS)),
        *batches(corrected),
        *groups(plain),
        *section(
            "Leak of technical variation",
            "What a linear model reads from the embedding; less is better. No method was told the batch. Depth differs "
            "between cell types, so that some of it is biology.",
            averages(plain, best_last, [LEAKED_DEPTH, LEAKED_BATCH]),
        ),
        *section(
            "New cells",
            "Panel, method and probe see 80 % of the cells; the others are tested.",
            averages(inductive, INDUCTIVE[::-1], [*MAIN, DEPTH[0.25], GENES[0.2]]),
        ),
        *tests(plain),
        *cost(costs),
        *missing(costs),
    ]
    return "\n".join(lines).rstrip() + "\n"


def figure_rows(scores: pd.DataFrame) -> pd.DataFrame:
    """What the figure shows: methods that correct for the batch where this matters, and others elsewhere."""
    transductive = scores["regime"] == "transductive"
    corrected = scores["batch"] == "batch"
    about_batches = scores["task"].isin(["transfer", "integration"])
    shown = scores[transductive & (corrected == about_batches)]
    single = best_single_pca(Scores(shown[~shown["method"].isin([HARMONY])])) or PCAS[0]
    hidden = [*(set(PCAS) - {single, "PCA-50 sqrt"}), *ABLATIONS]
    return shown[~shown["method"].isin(hidden)]


def read_results(folder: Path = RESULTS) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Scores, costs and environment."""
    scores = pd.read_csv(folder / "scores.csv", dtype={"setting": str})
    environment = pd.read_csv(folder / "environment.csv", dtype=str)
    return scores, pd.read_csv(folder / "cost.csv"), environment


def main() -> None:
    """Write document, figure and summary."""
    import matplotlib as mpl

    from genejepa import pl

    scores, costs, environment = read_results()
    DOCUMENT.write_text(document(scores, costs, environment), encoding="utf-8")
    parts = [
        statistics.summary(rows).assign(batch=batch)
        for batch, rows in scores.groupby("batch", sort=False, observed=True)
    ]
    pd.concat(parts, ignore_index=True).to_csv(RESULTS / "summary.csv", index=False, float_format="%.5f")
    with mpl.rc_context({"backend": "agg"}):
        figure = pl.benchmark(figure_rows(scores))
        figure.savefig(FIGURE, dpi=140, metadata={"Software": None})


if __name__ == "__main__":
    main()
