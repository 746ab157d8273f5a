"""The class that owns everything stateful: panel, normalisation, network, training record."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from genejepa._constants import OBSM_KEY, UNS_KEY
from genejepa._version import __version__
from genejepa.config import GeneJEPAConfig
from genejepa.data.axes import principal_axes
from genejepa.data.batches import BatchScaling
from genejepa.data.counts import check_counts, panel_counts, read_counts, slot_name
from genejepa.data.genes import gene_names, resolve_panel
from genejepa.data.matching import match_genes
from genejepa.data.normalization import Normalizer, cell_depth
from genejepa.data.setup import Registration, batch_codes, register, registration_of
from genejepa.encode import encode_cells
from genejepa.errors import DataError, ModelFileError, NotTrainedError, TrainingDivergedError
from genejepa.jepa import JEPA
from genejepa.persistence import StoredModel, load_model, save_model
from genejepa.train.runner import RunOptions, RunResult
from genejepa.train.runner import train as run_training

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd
    from anndata import AnnData
    from numpy.typing import NDArray

    from genejepa._lightning import Callback, Logger
    from genejepa.data.matching import GeneMatch
    from genejepa.data.panel import PanelCounts

logger = logging.getLogger(__name__)

_MIN_CELLS = 4
_BATCHES = "batches."
_BATCH_ARRAYS = ("centre", "gain", "frequency")


@dataclass(frozen=True)
class TrainingRecord:
    """What a finished training leaves in the model file."""

    n_cells: int
    steps: int
    seconds: float
    precision: str
    threads: int
    interrupted: bool
    effective_rank: float
    history: dict[str, list[float | None]]


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
    config
        All settings at once; see :class:`genejepa.config.GeneJEPAConfig`.
    **settings
        Single settings of ``config`` by name, such as ``embedding_dim=32`` or ``information=0``.

    Raises
    ------
    genejepa.errors.DataError
        If the slot does not hold raw counts, or there are fewer than four cells.

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
        adata: AnnData,
        *,
        n_genes: int | None = 2000,
        mask_var: str | NDArray[np.bool_] | None = None,
        gene_symbols: str | None = None,
        config: GeneJEPAConfig | None = None,
        **settings: object,
    ) -> None:
        self.config = (config or GeneJEPAConfig()).updated(**settings)
        self.registration = registration_of(adata)
        self.gene_symbols = gene_symbols
        counts = _checked_counts(adata, self.registration.layer)
        if adata.n_obs < _MIN_CELLS:
            raise DataError(
                f"`adata` has {adata.n_obs} cells; training needs at least {_MIN_CELLS}.",
                fix="train on more cells, then embed these with `genejepa.embed`.",
            )
        columns = resolve_panel(
            adata,
            counts,
            n_genes=n_genes,
            mask_var=mask_var,
            batch_key=self.registration.batch_key,
            gene_symbols=gene_symbols,
        )
        self.adata: AnnData | None = adata
        self.genes: list[str] = gene_names(adata, gene_symbols=gene_symbols)[columns].tolist()
        self.normalizer: Normalizer
        self.jepa: JEPA | None = None
        self.record: TrainingRecord | None = None
        self._counts: PanelCounts | None = panel_counts(counts, columns)
        self.normalizer = Normalizer.fit(self._counts, transform=self.config.model.transform)
        if self.registration.batch_key is not None:
            codes, names = batch_codes(adata, self.registration.batch_key)
            self._counts = replace(self._counts, batch=codes)
            scaling = BatchScaling.fit(self._counts, self.normalizer, tuple(names))
            self.normalizer = replace(self.normalizer, batches=scaling)

    @staticmethod
    def setup_anndata(
        adata: AnnData,
        *,
        layer: str | None = None,
        batch_key: str | None = None,
        labels_key: str | None = None,
    ) -> None:
        """Declare which slots of an AnnData to use; an AnnData set up for scvi-tools needs no declaration.

        Parameters
        ----------
        layer
            Layer with raw counts; None for ``X``.
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
        register(adata, layer=layer, batch_key=batch_key, labels_key=labels_key)

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
        batch_size: int | None = None,
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
        accelerator, devices, precision
            As in Lightning. ``precision="auto"`` takes bfloat16 where a quick timing favours it.
        threads
            CPU threads; None decides by a quick timing.
        early_stopping, patience, train_size
            Hold out ``1 - train_size`` of the cells, and stop when their weighted objectives have not improved for
            ``patience`` epochs. No labels are used, and a collapsed model does not score well.
        callbacks, logger
            Callbacks of ``pytorch_lightning`` (not of ``lightning``), and its loggers.
        compile
            Compile the network with ``torch.compile``; pays off on GPUs and long trainings.

        Notes
        -----
        Ctrl-C ends the training and leaves a usable model.
        """
        given: dict[str, Any] = {
            "max_epochs": max_epochs,
            "batch_size": batch_size,
            "learning_rate": learning_rate,
            "seed": seed,
        }
        train_config = replace(self.config.train, **{k: v for k, v in given.items() if v is not None})
        self.config = replace(self.config, train=train_config)
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
        )
        self._run(options)

    def _run(self, options: RunOptions) -> None:
        if self._counts is None:
            raise NotTrainedError(
                "this model was loaded from a file and holds no training cells.",
                fix="make a new `GeneJEPA(adata)` to train again.",
            )
        seed = self.config.train.seed
        if self.jepa is None:
            self.jepa = self._new_network(seed)
            n_components = max(self.config.model.dim, self.config.model.n_axes)
            axes = principal_axes(self._counts, self.normalizer, n_components=n_components, seed=seed)
            self.jepa.start_from_axes(axes, seed=seed)
        else:
            logger.info("training goes on from the present weights")
        before = {name: tensor.clone() for name, tensor in self.jepa.state_dict().items()}
        try:
            result = run_training(
                self.jepa,
                self._counts,
                self.normalizer,
                config=self.config,
                options=options,
            )
        except TrainingDivergedError:
            self.jepa.load_state_dict(before)
            raise
        self.record = self._make_record(result, n_cells=self._counts.n_obs)

    def _new_network(self, seed: int) -> JEPA:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            batches = self.normalizer.batches
            frequency = self.normalizer.frequency[None] if batches is None else batches.frequency
            log_frequency = torch.from_numpy(np.log(frequency))
            return JEPA(len(self.genes), self.config.model, log_frequency).eval()

    def _make_record(self, result: RunResult, *, n_cells: int) -> TrainingRecord:
        names = list(dict.fromkeys(name for row in result.history for name in row))
        history = {name: [row.get(name) for row in result.history] for name in names}
        last_rank = result.history[-1].get("effective_rank", 0.0) if result.history else 0.0
        return TrainingRecord(
            n_cells=n_cells,
            steps=result.steps,
            seconds=result.seconds,
            precision=result.precision,
            threads=result.threads,
            interrupted=result.interrupted,
            effective_rank=last_rank,
            history=history,
        )

    def get_latent_representation(
        self,
        adata: AnnData | None = None,
        *,
        layer: str | None = None,
        indices: Sequence[int] | NDArray[np.integer] | None = None,
    ) -> NDArray[np.float32]:
        """Cell vectors, (n_obs, embedding_dim), float32, always in 32-bit arithmetic.

        A cell's vector does not depend, to the last bit, on which cells are embedded with it.

        Parameters
        ----------
        adata
            Cells to embed; None embeds the cells given to the constructor or to :meth:`load`. Genes are matched by
            name: order and additional genes do not matter, and missing genes count as not measured, not as zero.
            If the model was trained with a ``batch_key``, that column says which batch a cell is from; cells of a
            batch that the training did not have, or without that column, are embedded as they are, with a warning.
        layer
            Layer with raw counts; None takes what is declared for ``adata``, else what the training used.
        indices
            Positions of the cells wanted; None for all.

        Raises
        ------
        genejepa.errors.NotTrainedError
            Before :meth:`train`.
        genejepa.errors.GeneMismatchError
            If hardly any gene of the panel is present.
        """
        self._trained_record()
        keep = None
        if adata is None and self._counts is not None:
            counts = self._counts
        else:
            counts, match = self._matched_counts(self._given_or_loaded(adata), layer)
            if match.n_matched < len(self.genes):
                keep = match.columns >= 0
        index = np.arange(counts.n_obs) if indices is None else np.asarray(indices)
        assert self.jepa is not None
        return encode_cells(self.jepa.encoder, counts, self.normalizer, index=index, keep=keep)

    def gene_report(self, adata: AnnData) -> GeneMatch:
        """Which genes of the panel ``adata`` has, by name."""
        return match_genes(self.genes, gene_names(adata, gene_symbols=self._symbols_in(adata)).tolist())

    def embed(self, adata: AnnData, *, layer: str | None = None, key_added: str = OBSM_KEY) -> None:
        """Write the cell vectors of ``adata`` to ``adata.obsm[key_added]``, and a record to ``adata.uns``."""
        self.write_embedding(adata, self.get_latent_representation(adata, layer=layer), key_added=key_added)

    def write_embedding(self, adata: AnnData, vectors: NDArray[np.float32], *, key_added: str = OBSM_KEY) -> None:
        """Write vectors of this model, (n_obs, embedding_dim), where :meth:`embed` writes them."""
        adata.obsm[key_added] = vectors
        entry = dict(adata.uns.get(UNS_KEY, {}))
        entry["version"] = __version__
        entry["model_id"] = self.model_id
        entry["n_genes"] = len(self.genes)
        entry["key_added"] = key_added
        adata.uns[UNS_KEY] = entry

    def save(self, dir_path: str | Path, *, overwrite: bool = False) -> None:
        """Save the model, without the cells, as a directory of safetensors, JSON and CSV.

        Raises
        ------
        FileExistsError
            If the directory holds files and ``overwrite`` is False.
        """
        record = self._trained_record()
        assert self.jepa is not None
        tensors = self.jepa.state_dict()
        batches = self.normalizer.batches
        if batches is not None:
            tensors |= {_BATCHES + name: torch.from_numpy(getattr(batches, name)) for name in _BATCH_ARRAYS}
        config = {
            "version": __version__,
            "settings": self.config.to_dict(),
            "registration": asdict(self.registration),
            "gene_symbols": self.gene_symbols,
            "median_depth": self.normalizer.median_depth,
            "batches": None if batches is None else list(batches.names),
            "training": asdict(record),
        }
        numbers = np.stack([self.normalizer.mean, self.normalizer.scale, self.normalizer.frequency], axis=1)
        stored = StoredModel(config, tensors, self.genes, numbers)
        save_model(Path(dir_path), stored, overwrite=overwrite)

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
            If the directory is not a complete model.
        """
        path = Path(dir_path)
        stored = load_model(path)
        model = cls.__new__(cls)
        try:
            config = stored.config
            model.config = GeneJEPAConfig.from_dict(config["settings"])
            model.registration = Registration(**config["registration"])
            model.gene_symbols = config["gene_symbols"]
            model.genes = stored.genes
            mean, scale, frequency = np.ascontiguousarray(stored.gene_numbers.T)
            tensors = dict(stored.tensors)
            batches = None
            if config["batches"] is not None:
                arrays = {name: tensors.pop(_BATCHES + name).numpy() for name in _BATCH_ARRAYS}
                batches = BatchScaling(names=tuple(config["batches"]), **arrays)
            model.normalizer = Normalizer(
                transform=model.config.model.transform,
                median_depth=float(config["median_depth"]),
                mean=mean,
                scale=scale,
                frequency=frequency,
                batches=batches,
            )
            model.record = TrainingRecord(**config["training"])
            model.jepa = model._new_network(seed=0)
            model.jepa.load_state_dict(tensors)
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ModelFileError(
                f"{path} does not fit together: {error}", fix="save the model again, or copy it again."
            ) from error
        model.adata = adata
        model._counts = None
        return model

    def weights_sha256(self) -> str:
        """SHA-256 over the names and bytes of all weights."""
        self._trained_record()
        assert self.jepa is not None
        digest = hashlib.sha256()
        for name, tensor in sorted(self.jepa.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()

    def __repr__(self) -> str:
        state = "not trained"
        if self.record is not None:
            state = f"trained on {self.record.n_cells:,} cells in {self.record.seconds:.0f} s"
        return f"GeneJEPA({len(self.genes):,} genes -> {self.embedding_dim}, {state})"

    def _trained_record(self) -> TrainingRecord:
        if self.record is None:
            raise NotTrainedError("the model is not trained.", fix="call `model.train()` first.")
        return self.record

    def _given_or_loaded(self, adata: AnnData | None) -> AnnData:
        adata = self.adata if adata is None else adata
        if adata is None:
            raise DataError(
                "no cells were given, and a loaded model holds none.",
                fix="pass `adata` here or to `GeneJEPA.load(path, adata)`.",
            )
        return adata

    def _matched_counts(self, adata: AnnData, layer: str | None) -> tuple[PanelCounts, GeneMatch]:
        """Counts of ``adata`` over the panel of the model, and which genes were found."""
        if layer is None:
            layer = registration_of(adata).layer
        if layer is None and self.registration.layer in adata.layers:
            layer = self.registration.layer
        match = self.gene_report(adata)
        panel = panel_counts(_checked_counts(adata, layer), match.columns)
        panel = replace(panel, batch=self._known_batches(adata))
        n_empty = int((cell_depth(panel) == 0).sum())
        if n_empty:
            logger.warning(
                "%d of %d cells have no counts over the genes of the model; they all get the same vector",
                n_empty,
                panel.n_obs,
            )
        return panel, match

    def _known_batches(self, adata: AnnData) -> NDArray[np.int64] | None:
        """Batch of each cell, (n_obs,), -1 for one that the training did not have; None for a model without batches."""
        batches = self.normalizer.batches
        if batches is None:
            return None
        key = registration_of(adata).batch_key or self.registration.batch_key
        if key not in adata.obs:
            logger.warning("`obs` has no column %r: the cells are embedded without batch correction", key)
            return None
        codes = batches.codes(adata.obs[key].astype(str).to_numpy())
        if n_unknown := int((codes < 0).sum()):
            logger.warning(
                "%d of %d cells are of a batch that the training did not have; they are embedded without correction",
                n_unknown,
                adata.n_obs,
            )
        return codes

    def _symbols_in(self, adata: AnnData) -> str | None:
        """The gene-name column of the training data, where ``adata`` has it too."""
        return self.gene_symbols if self.gene_symbols in adata.var else None


def _checked_counts(adata: AnnData, layer: str | None) -> Any:
    counts = read_counts(adata, layer=layer)
    check_counts(counts, slot=slot_name(layer), adata=adata)
    return counts
