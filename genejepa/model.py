"""The class that owns everything stateful: panel, normalisation, network, training record."""

from __future__ import annotations

import hashlib
import logging
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Unpack

import numpy as np
import torch

from genejepa._constants import MIN_CELLS, MIN_GENES, OBSM_KEY, UNS_KEY
from genejepa._memory import memory_errors
from genejepa._version import __version__
from genejepa.bundle import damaged, is_bundle
from genejepa.config import GeneJEPAConfig
from genejepa.data.axes import principal_axes
from genejepa.data.batches import BatchScaling
from genejepa.data.counts import check_counts, columns_to_genes, open_counts, panel_counts
from genejepa.data.genes import gene_names, resolve_panel
from genejepa.data.inputs import as_anndata
from genejepa.data.normalization import Normalizer, cell_depth
from genejepa.data.setup import (
    Registration,
    batch_codes,
    check_registration,
    register,
    registration_of,
    require_writable,
)
from genejepa.encode import encode_cells
from genejepa.errors import (
    CheckpointWarning,
    ConfigError,
    DataError,
    DataWarning,
    GeneJEPAError,
    NotFittedError,
    OutOfMemoryError,
    TrainingInterruptedWarning,
)
from genejepa.jepa import JEPA
from genejepa.persistence import StoredModel, load_model, save_model
from genejepa.query import Matching, MatchingOptions, Query, Trained, genes_of, require_key, slot_of, write_results
from genejepa.train.devices import cpu_threads
from genejepa.train.record import TrainingRecord
from genejepa.train.runner import Ending, RunOptions
from genejepa.train.runner import train as run_training
from genejepa.train.state import TrainingState

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd
    from anndata import AnnData
    from numpy.typing import NDArray
    from torch import Tensor

    from genejepa._lightning import Callback, Logger
    from genejepa.data.matching import GeneMapping, GeneReport
    from genejepa.data.panel import PanelCounts
    from genejepa.energy import EnergyFunction
    from genejepa.train.runner import RunResult

logger = logging.getLogger(__name__)

_SMALLEST_BATCH = 2
_EXIT_TERMINATED = 128 + 15


class GeneJEPA:
    """Joint-embedding predictive model of the cells of an AnnData.

    Parameters
    ----------
    adata
        Raw counts, (n_obs, n_vars), in ``X`` or the layer named in :meth:`setup_anndata`. Not changed.
    n_genes
        Size of the panel of highly variable genes; None takes all expressed genes.
    mask_var
        Column of ``adata.var`` (or boolean array) that marks the panel instead.
    gene_symbols
        Column of ``adata.var`` with the gene names to match by; None takes ``var_names``.
    allow_fractional
        Take any values that are finite and not negative, such as FPKM, where no counts exist. Likelihood and thinning
        are made for counts; expect less.
    registration
        Slots to read; None takes what :meth:`setup_anndata` has declared.
    config
        All settings at once; see :class:`genejepa.config.GeneJEPAConfig`.
    **settings
        Single settings of ``config`` by name, such as ``embedding_dim=32`` or ``information=0``.

    Raises
    ------
    genejepa.errors.DataError
        If the slot does not hold raw counts, or there are fewer than four cells with counts.

    Examples
    --------
    >>> import genejepa
    >>> adata = genejepa.datasets.pbmc3k()[:300].copy()
    >>> genejepa.GeneJEPA.setup_anndata(adata)
    >>> model = genejepa.GeneJEPA(adata, n_genes=200)
    >>> model.train(max_epochs=1, progress_bar=False)
    >>> adata.obsm["X_genejepa"] = model.get_latent_representation()
    >>> adata.obsm["X_genejepa"].shape
    (300, 64)
    """

    def __init__(
        self,
        adata: AnnData | str | Path,
        *,
        n_genes: int | None = 2000,
        mask_var: str | NDArray[np.bool_] | None = None,
        gene_symbols: str | None = None,
        allow_fractional: bool = False,
        registration: Registration | None = None,
        config: GeneJEPAConfig | None = None,
        **settings: object,
    ) -> None:
        self.config = (config or GeneJEPAConfig()).updated(**settings)
        if n_genes is not None and (
            isinstance(n_genes, bool) or not isinstance(n_genes, int | np.integer) or n_genes < 1
        ):
            raise ConfigError(f"`n_genes` is {n_genes!r}.", fix="give a whole number of at least 1, or None for all.")
        adata = as_anndata(adata)
        self.adata: AnnData | None = adata
        if registration is not None:
            check_registration(adata, registration)
        self.registration = registration or registration_of(adata)
        self.gene_symbols = gene_symbols
        self.allow_fractional = allow_fractional
        slot = self.registration.slot
        counts = check_counts(open_counts(adata, slot), adata=adata, allow_fractional=allow_fractional)
        matrix = counts.to_csr()
        if matrix.shape[0] < MIN_CELLS:
            raise _too_few_cells(matrix.shape[0], n_empty=0)
        key = self.registration.batch_key
        codes, batches = (None, []) if key is None else batch_codes(adata, key)
        names = gene_names(counts.var, gene_symbols=gene_symbols, table=slot.table)
        with cpu_threads(torch.get_num_threads()):  # numba, which scanpy uses, leaves another number behind
            columns = resolve_panel(
                matrix,
                counts.var,
                n_genes=n_genes,
                mask_var=mask_var,
                gene_symbols=gene_symbols,
                names=names,
                batch=codes,
                table=slot.table,
            )
        if len(columns) < MIN_GENES:
            raise DataError(
                f"`{slot.name}` has {len(columns)} gene to train on; genes are predicted from each other, so at least "
                f"{MIN_GENES} are needed.",
                fix="check the filters that were applied to the genes, `n_genes` and `mask_var`.",
            )
        self.genes: list[str] = names[columns].tolist()
        panel = panel_counts(matrix, columns_to_genes(columns, matrix.shape[1]), len(columns))
        self._counts: PanelCounts | None = replace(panel, batch=codes)
        self._cell_names = adata.obs_names
        self._cells = _cells_with_counts(panel)
        cells = self._counts.subset(self._cells)
        self.normalizer: Normalizer = Normalizer.fit(cells, transform=self.config.model.transform)
        if codes is not None:
            scaling = BatchScaling.fit(cells, self.normalizer, tuple(batches))
            self.normalizer = replace(self.normalizer, batches=scaling)
        self.jepa: JEPA | None = None
        self.record: TrainingRecord | None = None
        self._state: TrainingState | None = None

    @staticmethod
    def setup_anndata(
        adata: AnnData,
        *,
        layer: str | None = None,
        use_raw: bool = False,
        batch_key: str | None = None,
        labels_key: str | None = None,
    ) -> None:
        """Declare which slots of an AnnData to use; an AnnData set up for scvi-tools needs no declaration.

        Parameters
        ----------
        layer
            Layer with raw counts; None for ``X``.
        use_raw
            Take counts and genes from ``adata.raw``. Many pipelines keep log-normalised values there; they are refused.
        batch_key
            Column of ``obs`` with the batch, such as the technology or the donor, to correct for: genes are chosen
            for varying within batches, values are taken relative to the batch, the count read-out knows the batch,
            and the vectors of every batch are made to spread alike. This assumes that batches hold about the same
            kinds of cell. Do not use it where a batch is a kind of cell: that difference would be removed.
        labels_key
            Column of ``obs`` with labels: only for reports and probes, never seen in training.

        Notes
        -----
        Writes ``adata.uns["genejepa"]["setup"]``.
        """
        register(adata, layer=layer, use_raw=use_raw, batch_key=batch_key, labels_key=labels_key)

    @property
    def is_trained(self) -> bool:
        """Whether :meth:`train` has run, to its end or interrupted."""
        return self.record is not None

    @property
    def embedding_dim(self) -> int:
        """Length of a cell vector."""
        return self.config.model.embedding_dim

    @property
    def history(self) -> pd.DataFrame:
        """Objectives, learning rate and collapse measures over the training steps, one row per recorded step."""
        import pandas as pd

        return pd.DataFrame(self._trained_record().history)

    @property
    def model_id(self) -> str:
        """Hash of the weights: equal for equal models."""
        return self.weights_sha256()[:16]

    def train(
        self,
        *,
        max_epochs: int | None = None,
        batch_size: int | Literal["auto"] | None = None,
        learning_rate: float | None = None,
        seed: int | None = None,
        accelerator: str = "auto",
        devices: int | list[int] | str = 1,
        precision: str = "auto",
        threads: int | None = None,
        num_workers: int = 0,
        early_stopping: bool = False,
        patience: int = 5,
        train_size: float = 0.9,
        checkpoint_dir: str | Path | None = None,
        checkpoint_minutes: float | None = 1.0,
        checkpoint_steps: int | None = None,
        resume: bool = False,
        callbacks: Sequence[Callback] = (),
        logger: Logger | bool = False,
        progress_bar: bool = True,
        compile: bool = False,  # the name users of torch know
    ) -> None:
        """Train the model; a second call goes on from the present weights with a new schedule.

        Parameters
        ----------
        max_epochs
            Passes over the cells; None chooses about 400 steps.
        batch_size, learning_rate, seed
            Override the settings. Equal seed, precision and threads give equal weights, for any ``num_workers``.
            ``batch_size="auto"`` halves the batch size, and begins again, as long as memory runs out.
        accelerator, devices, precision
            As in Lightning. ``precision="auto"`` takes bfloat16 where a quick timing favours it.
        threads
            CPU threads; None decides by a quick timing.
        early_stopping, patience, train_size
            Hold out ``1 - train_size`` of the cells, and stop when their weighted objectives have not improved for
            ``patience`` epochs. No labels are used, and a collapsed model does not score well.
        checkpoint_dir
            Directory for the latest checkpoint, written every ``checkpoint_minutes`` or ``checkpoint_steps``, whichever
            comes first, and when the training ends or is stopped. A checkpoint that cannot be written is warned of.
        resume
            Go on with a training that was stopped, in this session or, through ``checkpoint_dir``, in another one. On
            the same machine the result is, bit for bit, that of a training that was not stopped. Settings and data
            have to be the same. Without anything to go on with, the training starts.
        callbacks, logger
            Callbacks of ``pytorch_lightning`` (not of ``lightning``), and its loggers.
        compile
            Compile the network with ``torch.compile``; pays off on GPUs and long trainings.

        Raises
        ------
        genejepa.errors.TrainingDivergedError
            If the loss or a gradient is not finite. The weights are those of 10 to 20 steps before, or of the start.
        genejepa.errors.OutOfMemoryError
            If memory runs out. The weights are those from before this training.
        genejepa.errors.ConfigError
            If ``resume`` finds a training under other settings or on other cells.

        Notes
        -----
        Ctrl-C ends the training after the present step and leaves a usable model. SIGTERM does so, too, writes the
        checkpoint, and exits with code 143.
        """
        given: dict[str, Any] = {
            "max_epochs": max_epochs,
            "batch_size": None if batch_size == "auto" else batch_size,
            "learning_rate": learning_rate,
            "seed": seed,
        }
        train_config = replace(self.config.train, **{k: v for k, v in given.items() if v is not None})
        options = RunOptions(
            accelerator=accelerator,
            devices=devices,
            precision=precision,
            threads=threads,
            num_workers=num_workers,
            early_stopping=early_stopping,
            patience=patience,
            train_size=train_size,
            progress_bar=progress_bar,
            callbacks=callbacks,
            logger=logger,
            compile=compile,
            checkpoint_dir=None if checkpoint_dir is None else Path(checkpoint_dir).expanduser(),
            checkpoint_minutes=checkpoint_minutes,
            checkpoint_steps=checkpoint_steps,
        )
        before = (self.config, self.jepa, self.record)
        self.config = replace(self.config, train=train_config)
        try:
            self._run(options, start=self._start(options) if resume else None, adapt=batch_size == "auto")
        except BaseException:
            if self.record is before[2]:  # nothing was trained under these settings
                self.config, self.jepa = before[:2]
            raise

    def _start(self, options: RunOptions) -> TrainingState | None:
        """State to go on from: of the last training of this session, else of the checkpoint."""
        if self._state is None and options.checkpoint_dir is not None and is_bundle(options.checkpoint_dir):
            return TrainingState.load(options.checkpoint_dir)
        return self._state

    def _run(self, options: RunOptions, *, start: TrainingState | None, adapt: bool) -> None:
        cells = self._training_cells()
        if adapt and start is not None:
            self._set_batch_size(int(start.plan["settings"]["train"]["batch_size"]))
        if self.jepa is None:
            self.jepa = self._started_network(cells)
        elif start is None:
            logger.info("training goes on from the present weights")
        before = {name: tensor.clone() for name, tensor in self.jepa.state_dict().items()}
        while True:
            try:
                result = run_training(
                    self.jepa, cells, self.normalizer, config=self.config, options=options, start=start
                )
                break
            except OutOfMemoryError:
                self.jepa.load_state_dict(before)
                batch_size = min(self.config.train.batch_size, cells.n_obs)
                if not adapt or batch_size < 2 * _SMALLEST_BATCH:
                    raise
            start = None
            logger.warning("memory has run out with batch_size=%d; training begins again with half", batch_size)
            self._set_batch_size(batch_size // 2)
        self._finish(result, options, n_cells=cells.n_obs)

    def _training_cells(self) -> PanelCounts:
        """Cells with counts; the others hold nothing to learn from."""
        if self._counts is None:
            raise NotFittedError(
                "this model was loaded from a file and holds no training cells.",
                fix="make a new `GeneJEPA(adata)` to train again.",
            )
        return self._counts if len(self._cells) == self._counts.n_obs else self._counts.subset(self._cells)

    def _set_batch_size(self, batch_size: int) -> None:
        self.config = replace(self.config, train=replace(self.config.train, batch_size=batch_size))

    def _started_network(self, cells: PanelCounts) -> JEPA:
        """Network whose linear path and value tables begin at the principal axes of the cells."""
        seed = self.config.train.seed
        jepa = self._new_network(seed)
        n_components = max(self.config.model.dim, self.config.model.n_axes)
        with cpu_threads(1):  # sums over several threads round differently, and the caller's number may be any
            axes = principal_axes(cells, self.normalizer, n_components=n_components, seed=seed)
            jepa.start_from_axes(axes, seed=seed)
        return jepa

    def _finish(self, result: RunResult, options: RunOptions, *, n_cells: int) -> None:
        """Keep what the training has left, also where it was stopped, and tell how it was."""
        if result.state.step > 0:
            self.record = TrainingRecord.of(result, n_cells=n_cells)
        can_resume = result.ending not in (Ending.diverged, Ending.broken_off)
        self._state = result.state if can_resume else None
        if options.checkpoint_dir is not None and can_resume:
            try:
                result.state.save(options.checkpoint_dir)
            except OSError as error:  # the model is worth more than its last checkpoint
                message = f"The last checkpoint could not be written; the model is usable.\n{error}"
                warnings.warn(message, CheckpointWarning, stacklevel=4)
        if result.error is not None:
            raise result.error
        if result.ending in (Ending.interrupted, Ending.broken_off):  # last: a warning may be an exception
            _warn_of_interruption(result)
        if result.ending is Ending.terminated:
            raise SystemExit(_EXIT_TERMINATED)

    def _new_network(self, seed: int) -> JEPA:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            batches = self.normalizer.batches
            frequency = self.normalizer.frequency[None] if batches is None else batches.frequency
            log_frequency = torch.from_numpy(np.log(frequency))
            return JEPA(len(self.genes), self.config.model, log_frequency).eval()

    def get_latent_representation(
        self,
        adata: AnnData | str | Path | None = None,
        *,
        layer: str | None = None,
        use_raw: bool = False,
        indices: Sequence[int] | NDArray[np.integer] | NDArray[np.bool_] | None = None,
        gene_mapping: GeneMapping = "names",
        duplicates: Literal["error", "sum"] = "error",
        min_overlap: float = 0.5,
    ) -> NDArray[np.float32]:
        """Cell vectors, (n_obs, embedding_dim), float32, always in 32-bit arithmetic.

        A cell's vector does not depend, to the last bit, on which cells are embedded with it, nor on the order of the
        genes or on further genes. Cells of a backed AnnData are read block by block.

        Parameters
        ----------
        adata
            Cells to embed; None embeds the cells given to the constructor or to :meth:`load`. Genes are matched by
            name, and missing genes count as not measured, not as zero. If the model was trained with a ``batch_key``,
            that column says which batch a cell is from; cells of a batch that the training did not have, or without
            that column, are embedded as they are, with a warning. Cells without counts over the genes of the model all
            get one vector, with a warning.
        layer, use_raw
            Slot of ``adata`` with raw counts; None and False take what is declared for it, else what the training used.
        indices
            Positions of the cells wanted, or a mask; None for all.
        gene_mapping
            ``exact``: equal names. ``names``: further, Ensembl identifiers with and without version, identifiers and
            symbols of human and mouse, names mangled by R or a spreadsheet; only where there is one answer.
            ``orthologs``: further, names in another case, and human and mouse one-to-one orthologs.
        duplicates
            What to do with several columns of one gene: ``error``, or ``sum`` to add them up.
        min_overlap
            Smallest share that the genes found may have in the counts of the training.

        Raises
        ------
        genejepa.errors.NotFittedError
            Before :meth:`train`.
        genejepa.errors.GeneMismatchError
            If too few genes of the panel are present.
        genejepa.errors.DataError
            If the values over the genes of the panel are not counts.
        genejepa.errors.ConfigError
            If a slot is given without ``adata``, although the counts of the training are there.
        """
        self._trained_record()
        matching = Matching(layer, use_raw, gene_mapping, duplicates, min_overlap)
        own = self._own_counts(matching) if adata is None else None
        if own is not None:
            return self.encode_panel(own, indices=indices)
        query = Query(self._given_or_loaded(adata), self._trained(), matching)
        vectors, _ = self._embed(query)
        return vectors if indices is None else vectors[_positions(indices, query.n_obs)]

    def _embed(self, query: Query) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Vectors of all cells, (n_obs, embedding_dim), and which cells have no counts, (n_obs,)."""
        with memory_errors("embedding", fix="embed fewer cells at a time."):
            vectors = np.empty((query.n_obs, self.embedding_dim), dtype=np.float32)
        empty = np.zeros(query.n_obs, dtype=bool)
        start = 0
        for counts in query.blocks():
            rows = slice(start, start + counts.n_obs)
            vectors[rows] = self.encode_panel(counts, keep=query.keep)
            empty[rows] = cell_depth(counts) == 0
            start = rows.stop
        if empty.any():
            warnings.warn(
                f"{int(empty.sum())} of {query.n_obs} cells have no counts over the genes of the model; they all get "
                "the same vector (`embed` marks them in `obs`).",
                DataWarning,
                stacklevel=3,
            )
        return vectors, empty

    def encode_panel(
        self,
        counts: PanelCounts,
        *,
        keep: NDArray[np.bool_] | None = None,
        indices: Sequence[int] | NDArray[np.integer] | NDArray[np.bool_] | None = None,
    ) -> NDArray[np.float32]:
        """Cell vectors, (n, embedding_dim), of counts as :meth:`read_panel` returns them."""
        assert self.jepa is not None
        index = np.arange(counts.n_obs) if indices is None else _positions(indices, counts.n_obs)
        with memory_errors("embedding", fix="embed fewer cells at a time."):
            vectors = encode_cells(self.jepa.encoder, counts, self.normalizer, index=index, keep=keep)
        if n_bad := int((~np.isfinite(vectors)).any(axis=1).sum()):
            raise DataError(
                f"the vectors of {n_bad} of {len(vectors)} cells are not finite: counts or weights are far too large.",
                fix="genejepa.check(adata, model=model), or load another copy of the model.",
            )
        return vectors

    def energy(
        self,
        adata: AnnData | str | Path | None = None,
        *,
        partner: AnnData | str | Path | None = None,
        reference: AnnData | str | Path | None = None,
        n_masks: int = 8,
        **matching: Unpack[MatchingOptions],
    ) -> NDArray[np.float32]:
        """How badly the halves of each cell predict it, (n_obs,): about 1 for a cell like those of the training.

        It is higher for doublets, for kinds of cell that the training did not have, and for mixtures. See
        :mod:`genejepa.energy`.

        Parameters
        ----------
        adata
            Cells to look at; None for those of the training.
        partner
            As many cells: the energy is that of one half of the genes of each cell together with the other half of the
            genes of the partner in the same place. It is low if both are the same cell.
        reference
            Cells that are known to be real; None for those of the training, which a loaded model does not hold.
        n_masks
            Number of ways in which the genes are halved.
        **matching
            ``layer``, ``use_raw``, ``gene_mapping``, ``duplicates``, ``min_overlap`` as in
            :meth:`get_latent_representation`, for all of these cells.

        Raises
        ------
        genejepa.errors.NotFittedError
            Before :meth:`train`, or if there is no reference.
        genejepa.errors.DataError
            If there are not as many partners as cells, if the reference has less than 20 cells, or as in
            :meth:`get_latent_representation`.
        """
        cells, keep = self.read_panel(adata, matching)
        if partner is None:
            return self._energy_function(reference, matching, keep=keep, n_masks=n_masks).cells(cells)
        others, others_keep = self.read_panel(partner, matching)
        if others.n_obs != cells.n_obs:
            raise DataError(
                f"`partner` has {others.n_obs} cells, expected {cells.n_obs}, one for each cell.",
                fix="choose as many partners as there are cells.",
            )
        keep = _both(keep, others_keep)
        return self._energy_function(reference, matching, keep=keep, n_masks=n_masks).pairs(cells, others)

    def surprise(
        self,
        adata: AnnData | str | Path | None = None,
        *,
        reference: AnnData | str | Path | None = None,
        n_masks: int = 8,
        **matching: Unpack[MatchingOptions],
    ) -> AnnData:
        """How much more of each gene a cell has than its other genes let expect, as standard scores.

        Parameters and errors as in :meth:`energy`.

        Returns
        -------
        AnnData with the scores in ``X``, (n_obs, n_measured) float32, dense, for the genes of the model that the cells
        and the reference have; see :meth:`genejepa.energy.EnergyFunction.surprise`.
        """
        import pandas as pd
        from anndata import AnnData

        given = None if adata is None and self._counts is not None else self._given_or_loaded(adata)
        cells, keep = self.read_panel(given, matching)
        function = self._energy_function(reference, matching, keep=keep, n_masks=n_masks)
        names = self._cell_names if given is None else given.obs_names
        genes = np.array(self.genes, dtype=object)[function.keep]
        return AnnData(function.surprise(cells), obs=pd.DataFrame(index=names), var=pd.DataFrame(index=genes))

    def read_panel(
        self, adata: AnnData | str | Path | None, matching: MatchingOptions
    ) -> tuple[PanelCounts, NDArray[np.bool_] | None]:
        """Counts of cells over the panel, and the genes that they have, (n_genes,); None for all.

        ``adata`` and errors as in :meth:`get_latent_representation`.
        """
        self._trained_record()
        own = self._own_counts(Matching(**matching)) if adata is None else None
        if own is not None:
            return own, None
        query = Query(self._given_or_loaded(adata), self._trained(), Matching(**matching))
        return query.counts(), query.keep

    def _own_counts(self, matching: Matching) -> PanelCounts | None:
        """Counts of the training, if they are here."""
        if self._counts is not None and (matching.layer is not None or matching.use_raw):
            raise ConfigError(
                "`layer` or `use_raw` is given without `adata`; the counts of the training are used.",
                fix="pass `adata`, too.",
            )
        return self._counts

    def _energy_function(
        self,
        reference: AnnData | str | Path | None,
        matching: MatchingOptions,
        *,
        keep: NDArray[np.bool_] | None,
        n_masks: int,
    ) -> EnergyFunction:
        from genejepa.energy import EnergyFunction

        if reference is None and self._counts is None:
            raise NotFittedError(
                "this model was loaded from a file and holds no cells to compare with.",
                fix="pass reference=adata with cells that are known to be real, such as those of the training.",
            )
        cells, known_keep = self.read_panel(reference, matching)
        assert self.jepa is not None
        return EnergyFunction(self.jepa, self.normalizer, cells, keep=_both(keep, known_keep), n_masks=n_masks)

    def gene_report(
        self,
        adata: AnnData | str | Path,
        *,
        layer: str | None = None,
        use_raw: bool = False,
        gene_mapping: GeneMapping = "names",
        duplicates: Literal["error", "sum"] = "error",
    ) -> GeneReport:
        """Which genes of the panel ``adata`` has, how each was found, and what other mappings would find.

        Parameters and errors as in :meth:`get_latent_representation`; no values are read.
        """
        matching = Matching(layer, use_raw, gene_mapping, duplicates)
        adata = as_anndata(adata)
        slot = slot_of(adata, self.registration, matching)
        return genes_of(slot.var(adata), self._trained(), matching, slot=slot)

    def embed(
        self,
        adata: AnnData,
        *,
        layer: str | None = None,
        use_raw: bool = False,
        key_added: str = OBSM_KEY,
        gene_mapping: GeneMapping = "names",
        duplicates: Literal["error", "sum"] = "error",
        min_overlap: float = 0.5,
    ) -> None:
        """Write the cell vectors of ``adata`` to ``adata.obsm[key_added]``, and a record to ``adata.uns["genejepa"]``.

        Parameters and errors as in :meth:`get_latent_representation`. Cells without counts over the genes of the
        model, if there are any, are marked in ``adata.obs["genejepa_empty"]``, named after ``key_added``.
        """
        self._trained_record()
        require_writable(adata)
        require_key(key_added)
        query = Query(adata, self._trained(), Matching(layer, use_raw, gene_mapping, duplicates, min_overlap))
        vectors, empty = self._embed(query)
        self._write(adata, vectors, empty=empty, key_added=key_added, gene_overlap=query.report.mass)

    def write_embedding(self, adata: AnnData, *, key_added: str = OBSM_KEY) -> None:
        """Write the vectors of the training cells where :meth:`embed` writes those of other cells.

        Raises
        ------
        genejepa.errors.DataError
            If ``adata`` has other cells than the training, or in another order.
        """
        self._trained_record()
        require_writable(adata)
        require_key(key_added)
        counts = self._counts
        if counts is None or not self._cell_names.equals(adata.obs_names):
            raise DataError(
                f"`obs_names` of {adata.n_obs} cells are not those of the training, which had "
                f"{0 if counts is None else counts.n_obs} cells, in its order.",
                fix="model.embed(adata)",
            )
        self._write(
            adata, self.encode_panel(counts), empty=cell_depth(counts) == 0, key_added=key_added, gene_overlap=1.0
        )

    def _write(
        self,
        adata: AnnData,
        vectors: NDArray[np.float32],
        *,
        empty: NDArray[np.bool_],
        key_added: str,
        gene_overlap: float,
    ) -> None:
        record = dict(adata.uns.get(UNS_KEY, {}))
        own_keys = set(np.atleast_1d(record.get("keys_added", [])).tolist())  # an array, when read from a file
        if key_added in adata.obsm and key_added not in own_keys:
            warnings.warn(
                f"`obsm[{key_added!r}]` was there, not written by genejepa, and is replaced.", DataWarning, stacklevel=3
            )
        record |= {
            "version": __version__,
            "model_id": self.model_id,
            "n_genes": len(self.genes),
            "gene_overlap": gene_overlap,
            "keys_added": sorted(own_keys | {key_added}),
        }
        write_results(adata, vectors, empty=empty, key_added=key_added, record=record)

    def save(self, dir_path: str | Path, *, overwrite: bool = False) -> None:
        """Save the model, without the cells, as a directory of safetensors, JSON and CSV.

        An earlier model there is replaced at once: a reader finds the old one or the new one.

        Raises
        ------
        FileExistsError
            If the directory holds a model and ``overwrite`` is False, or files but no model.
        genejepa.errors.OutOfDiskError
            If the disk is full; an earlier model is as it was.
        """
        save_model(Path(dir_path).expanduser(), self.to_stored(), overwrite=overwrite)

    def to_stored(self) -> StoredModel:
        """What is kept of a trained model."""
        record = self._trained_record()
        assert self.jepa is not None
        config = {
            "version": __version__,
            "settings": self.config.to_dict(),
            "registration": asdict(self.registration),
            "gene_symbols": self.gene_symbols,
            "allow_fractional": self.allow_fractional,
            "training": asdict(record),
        }
        return StoredModel(config, self.genes, self.normalizer, self.jepa.state_dict())

    @classmethod
    def load(cls, dir_path: str | Path, adata: AnnData | None = None) -> GeneJEPA:
        """Load a model that :meth:`save` wrote; nothing in the directory is executed.

        Parameters
        ----------
        adata
            Cells that ``get_latent_representation()`` without arguments shall embed.

        Raises
        ------
        genejepa.errors.ModelFileError
            If the directory is not a complete model, or a byte of it was changed.
        """
        path = Path(dir_path).expanduser()
        return cls.from_stored(load_model(path), path=path, adata=adata)

    @classmethod
    def from_stored(cls, stored: StoredModel, *, path: Path, adata: AnnData | None = None) -> GeneJEPA:
        """Model from what was kept of it, in the directory ``path``; errors as in :meth:`load`."""
        model = cls.__new__(cls)
        try:
            config = stored.config
            model.config = GeneJEPAConfig.from_dict(config["settings"])
            model.registration = Registration.from_dict(config["registration"])
            model.gene_symbols = config["gene_symbols"]
            model.allow_fractional = config["allow_fractional"]
            if not isinstance(model.gene_symbols, str | None) or not isinstance(model.allow_fractional, bool):
                raise ValueError("`gene_symbols` or `allow_fractional` has another type than the one written")
            model.genes = stored.genes
            model.normalizer = stored.normalizer
            model.record = TrainingRecord.from_dict(config["training"])
            model.jepa = model._network_of(stored.weights)
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
            reason = error.problem if isinstance(error, GeneJEPAError) else f"{type(error).__name__}: {error}"
            raise damaged(path, f"its parts do not fit together ({reason})") from error
        model.adata = adata
        model._counts = None
        model._state = None
        return model

    def _network_of(self, weights: dict[str, Tensor]) -> JEPA:
        """Network with given weights; their shapes are compared before memory is taken for it."""
        layers = {name.split(".")[2] for name in weights if name.startswith("encoder.blocks.") and name.count(".") > 2}
        if self.config.model.encoder != "mlp" and self.config.model.n_layers != len(layers):
            raise ValueError(f"there are weights of {len(layers)} layers, expected {self.config.model.n_layers}")
        with torch.device("meta"):
            n_rows = 1 if self.normalizer.batches is None else len(self.normalizer.batches.frequency)
            jepa = JEPA(len(self.genes), self.config.model, torch.empty(n_rows, len(self.genes)))
        jepa.load_state_dict(weights, assign=True)
        jepa = self._new_network(seed=0)
        jepa.load_state_dict(weights)
        return jepa

    def weights_sha256(self) -> str:
        """SHA-256 over the names and bytes of all weights and of the normalisation."""
        self._trained_record()
        assert self.jepa is not None
        arrays = {name: tensor.numpy() for name, tensor in self.jepa.state_dict().items()} | self.normalizer.arrays()
        digest = hashlib.sha256()
        for name, array in sorted(arrays.items()):
            digest.update(name.encode())
            digest.update(array.tobytes())
        return digest.hexdigest()

    def __getstate__(self) -> dict[str, Any]:
        """For copies in memory: cells of a file cannot be copied along, and a copy does without."""
        return self.__dict__ | {"adata": None if self.adata is None or self.adata.isbacked else self.adata}

    def __repr__(self) -> str:
        state = "not trained"
        if self.record is not None:
            state = f"trained on {self.record.n_cells:,} cells in {self.record.seconds:.0f} s"
        return f"GeneJEPA({len(self.genes):,} genes -> {self.embedding_dim}, {state})"

    def _trained_record(self) -> TrainingRecord:
        if self.record is None:
            raise NotFittedError("the model is not trained.", fix="call `model.train()` first.")
        return self.record

    def _trained(self) -> Trained:
        return Trained(self.genes, self.gene_symbols, self.registration, self.allow_fractional, self.normalizer)

    def _given_or_loaded(self, adata: AnnData | str | Path | None) -> AnnData:
        adata = self.adata if adata is None else adata
        if adata is None:
            raise DataError(
                "no cells were given, and a loaded model holds none.",
                fix="pass `adata` here or to `GeneJEPA.load(path, adata)`.",
            )
        return as_anndata(adata)


def _both(one: NDArray[np.bool_] | None, other: NDArray[np.bool_] | None) -> NDArray[np.bool_] | None:
    """Genes that are in two masks; None is all genes."""
    return other if one is None else one if other is None else one & other


def _positions(indices: Sequence[int] | NDArray[np.integer] | NDArray[np.bool_], n_obs: int) -> NDArray[np.int64]:
    """Positions of cells, (n,), given as such, from the end if negative, or as a mask."""
    given = np.asarray(indices)
    given = given if given.size else given.astype(np.int64)
    if given.dtype == np.bool_ and given.shape == (n_obs,):
        return np.flatnonzero(given)
    inside = given.dtype.kind in "iu" and given.ndim == 1 and (given >= -n_obs).all() and (given < n_obs).all()
    if not inside:
        raise ConfigError(
            f"`indices` is {str(indices)[:60]}, expected positions of {n_obs} cells.",
            fix=f"give whole numbers from 0 to {n_obs - 1}, or a mask with a value for every cell.",
        )
    return np.where(given < 0, given + n_obs, given).astype(np.int64)


def _warn_of_interruption(result: RunResult) -> None:
    can_resume = result.ending is Ending.interrupted
    fix = "`train(resume=True)` goes on where it stopped." if can_resume else "call `train()` for a full training."
    state = result.state
    warnings.warn(
        f"Training was interrupted at step {state.step} of {state.total_steps}; the model is usable.\nFix: {fix}",
        TrainingInterruptedWarning,
        stacklevel=5,
    )


def _cells_with_counts(counts: PanelCounts) -> NDArray[np.int64]:
    """Positions of the cells to train on."""
    cells = np.flatnonzero(cell_depth(counts) > 0)
    n_empty = counts.n_obs - len(cells)
    if len(cells) < MIN_CELLS:
        raise _too_few_cells(counts.n_obs, n_empty=n_empty)
    if n_empty:
        warnings.warn(
            f"{n_empty} of {counts.n_obs} cells have no counts over the genes of the model; they are not trained on.",
            DataWarning,
            stacklevel=3,
        )
    return cells


def _too_few_cells(n_obs: int, *, n_empty: int) -> DataError:
    empty = f", {n_empty} of them without counts" if n_empty else ""
    return DataError(
        f"`adata` has {n_obs} cells{empty}; training needs at least {MIN_CELLS}.",
        fix="train on more cells, then embed these with `genejepa.embed`.",
    )
