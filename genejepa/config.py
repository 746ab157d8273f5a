"""Settings of a model and of its training: frozen dataclasses, validated, with a JSON round trip."""

from __future__ import annotations

import math
import numbers
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from types import UnionType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from genejepa.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Transform = Literal["sqrt", "log1p"]
EncoderKind = Literal["gene_tokens", "mlp"]

_C = TypeVar("_C")
_LARGEST = 1e30
"""No setting is larger; infinity would be accepted by every comparison and break every sum."""
_LARGEST_SEED = 2**63 - 1
"""Model files hold whole numbers of 64 bits with a sign."""
LARGEST_NUMPY_SEED = 2**32 - 1
"""What scikit-learn takes."""


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the networks.

    ``encoder="mlp"`` is the comparison arm of the benchmarks: a 512-512 perceptron over the panel.
    """

    encoder: EncoderKind = "gene_tokens"
    embedding_dim: int = 64
    """Length of the cell vector."""
    n_latents: int = 2
    """Perceiver latents that read the gene tokens."""
    dim: int = 128
    """Width of a gene token and of a latent."""
    n_heads: int = 8
    """Heads of the read-in attention; divides ``dim``."""
    n_layers: int = 1
    """Transformer blocks over the latents."""
    predictor_dim: int = 256
    dropout: float = 0.0
    n_axes: int = 30
    """Principal axes that the linear path of the gene-token encoder starts from; 0 for no linear path."""
    transform: Transform = "sqrt"
    """Variance-stabilising function of the depth-normalised counts."""

    def __post_init__(self) -> None:
        _check_choices(self)
        check_at_least(self, 1, "embedding_dim", "n_latents", "dim", "n_heads", "predictor_dim")
        check_at_least(self, 0, "n_layers", "n_axes")
        check_range(self, 0.0, 0.9, "dropout")
        if self.dim % self.n_heads:
            raise ConfigError(
                f"`n_heads` is {self.n_heads}, which does not divide `dim`={self.dim}.",
                fix="choose `dim` as a multiple of `n_heads`.",
            )


@dataclass(frozen=True)
class MaskConfig:
    """How the panel is cut into gene blocks and which blocks a view may see."""

    n_blocks: int = 16
    """Random blocks of nearly equal size that partition the panel, drawn anew at every step."""
    min_keep: float = 0.3
    max_keep: float = 0.7
    """The first view sees a share of the blocks drawn from U(min_keep, max_keep); the second sees the rest."""
    thinned_fraction: float = 0.5
    """Share of the cells of a step whose views are made from thinned counts; their targets are not thinned. Values of
    which most are fractional are not thinned."""
    min_depth: float = 0.2
    """A thinned cell keeps a share of its molecules drawn log-uniformly from min_depth to 1."""

    def __post_init__(self) -> None:
        check_at_least(self, 2, "n_blocks")
        check_range(self, 0.0, 1.0, "min_keep", "max_keep", "thinned_fraction")
        check_range(self, 1e-3, 1.0, "min_depth")
        if self.min_keep > self.max_keep:
            raise ConfigError(f"`min_keep`={self.min_keep} is above `max_keep`={self.max_keep}.", fix="swap the two.")


@dataclass(frozen=True)
class ObjectiveConfig:
    """Weights of the objectives; a weight of 0 switches one off. See ``docs/objectives.md``."""

    prediction: float = 1.0
    diversity: float = 0.0
    """Keeps vectors apart; the information term does so too, and only a model without it needs this one, about 0.2."""
    invariance: float = 1.5
    depth: float = 0.3
    """Makes the vector of a thinned cell that of the whole one; counts only with ``thinned_fraction`` above 0."""
    information: float = 10.0
    """Weight of the nats per count: of a cell's nats divided by its depth, or by the median depth if that is more, so
    that one weight serves shallow and deep data."""
    alignment: float = 10.0
    """Counts only if there are batches: makes the vectors of every batch spread alike."""
    n_slices: int = 64
    """Random directions along which diversity and alignment compare distributions."""

    def __post_init__(self) -> None:
        weights = ("prediction", "diversity", "invariance", "depth", "information", "alignment")
        check_range(self, 0.0, _LARGEST, *weights)
        check_at_least(self, 1, "n_slices")
        if not any(getattr(self, name) for name in weights):
            raise ConfigError(
                f"{', '.join(f'`{name}`' for name in weights)} are all 0: nothing would be trained.",
                fix="give one of them a weight above 0, such as information=10.",
            )


@dataclass(frozen=True)
class TrainConfig:
    """Optimiser and length of training."""

    batch_size: int = 256
    learning_rate: float = 2e-3
    weight_decay: float = 0.02
    warmup_fraction: float = 0.1
    """Share of the steps over which the learning rate rises linearly; a cosine takes it down afterwards."""
    gradient_clip: float = 1.0
    max_epochs: int | None = None
    """Passes over the cells; None: as many as give about ``target_steps`` steps."""
    target_steps: int = 400
    seed: int = 0

    def __post_init__(self) -> None:
        check_at_least(self, 2, "batch_size")
        check_at_least(self, 1, "target_steps")
        if self.max_epochs is not None:
            check_at_least(self, 1, "max_epochs")
        check_range(self, 0.0, _LARGEST, "learning_rate", "weight_decay", "gradient_clip")
        check_at_least(self, 0, "seed", high=_LARGEST_SEED)
        check_range(self, 0.0, 1.0, "warmup_fraction")


@dataclass(frozen=True)
class GeneJEPAConfig:
    """All settings of a model; what ``config.json`` stores."""

    model: ModelConfig = field(default_factory=ModelConfig)
    masks: MaskConfig = field(default_factory=MaskConfig)
    objectives: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def to_dict(self) -> dict[str, Any]:
        """Nested dictionary of plain JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GeneJEPAConfig:
        """Inverse of :meth:`to_dict`; unknown or missing sections raise :class:`ConfigError`."""
        sections = {f.name: f for f in fields(cls)}
        _check_known(values, sections, where="configuration")
        types = _type_hints(cls)  # type: ignore[arg-type]  # a class is hashable
        return cls(**{name: build(types[name], values.get(name, {})) for name in sections})

    def updated(self, **changes: object) -> GeneJEPAConfig:
        """Copy with single settings changed by name, whichever section holds them.

        Raises
        ------
        ConfigError
            For a name that no section has.
        """
        values = self.to_dict()
        for name, value in changes.items():
            for section in values.values():
                if name in section:
                    section[name] = value
                    break
            else:
                known = sorted(key for section in values.values() for key in section)
                raise ConfigError(f"`{name}` is not a setting of genejepa.", fix=f"use one of: {', '.join(known)}.")
        return type(self).from_dict(values)


def build(cls: type[_C], values: Mapping[str, Any]) -> _C:
    """Make dataclass ``cls`` from a mapping; unknown keys raise :class:`ConfigError`."""
    _check_known(values, {f.name for f in fields(cls)}, where=cls.__name__)  # type: ignore[arg-type]  # a dataclass
    return cls(**values)


@cache
def _type_hints(cls: type) -> dict[str, Any]:
    """Types of the fields; evaluated once, so that reading a model file evaluates nothing."""
    return get_type_hints(cls)


def _check_known(values: Mapping[str, Any], known: object, *, where: str) -> None:
    unknown = sorted(set(values) - set(known))  # type: ignore[call-overload]  # any iterable of names
    if unknown:
        raise ConfigError(
            f"{where} has the unknown entries {unknown}.",
            fix="remove them, or install the version of genejepa that wrote them.",
        )


def _check_choices(config: object) -> None:
    for name, hint in _type_hints(type(config)).items():  # type: ignore[arg-type]  # a class is hashable
        allowed = get_args(hint)
        if allowed and all(isinstance(a, str) for a in allowed):
            check_one_of(config, allowed, name)


def check_entries(cls: type, values: Mapping[str, Any]) -> None:
    """Refuse values, as they come from JSON, that are not those of the fields of a dataclass.

    Raises
    ------
    ValueError
        If an entry is missing, unknown, of another type than its field, or a number that is not finite.
    """
    types = _type_hints(cls)
    if values.keys() != types.keys():
        raise ValueError(f"its entries are {sorted(values)}, expected {sorted(types)}")
    for name, hint in types.items():
        if not _is_of(values[name], hint):
            raise ValueError(f"its entry {name!r} is {str(values[name])[:40]!r}")


def _is_of(value: object, hint: Any) -> bool:
    """Whether a value from JSON has a type; a whole number is a floating-point one, too."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is dict:
        return isinstance(value, dict) and all(_is_of(entry, inner[1]) for entry in value.values())
    if origin is list:
        return isinstance(value, list) and all(_is_of(entry, inner[0]) for entry in value)
    if origin is UnionType:
        return any(_is_of(value, one) for one in inner)
    if hint is float:
        return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]  # a number
    return hint is Any or type(value) is hint


def check_one_of(config: object, allowed: Sequence[str], *names: str) -> None:
    """Refuse values of the named settings that are not among those allowed."""
    for name in names:
        if getattr(config, name) not in allowed:
            choice = ", ".join(map(repr, allowed))
            raise ConfigError(f"`{name}` is {getattr(config, name)!r}.", fix=f"use one of {choice}.")


def at_least(name: str, value: object, low: int, *, high: int | None = None) -> int:
    """Return an argument, or raise :class:`ConfigError` if it is no whole number from ``low`` to ``high``."""
    number = None if isinstance(value, bool) or not isinstance(value, numbers.Integral) else int(value)
    if number is None or number < low or (high is not None and number > high):
        most = "" if high is None else f" and at most {high}"
        raise ConfigError(f"`{name}` is {value!r}.", fix=f"give a whole number of at least {low}{most}.")
    return number


def check_at_least(config: object, low: int, *names: str, high: int | None = None) -> None:
    """Refuse values of the named settings that are no whole numbers from ``low`` to ``high``."""
    for name in names:
        at_least(name, _python_number(config, name), low, high=high)


def check_range(config: object, low: float, high: float, *names: str) -> None:
    """Refuse values of the named settings that are no numbers from ``low`` to ``high``."""
    for name in names:
        value = _python_number(config, name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise ConfigError(f"`{name}` is {value!r}.", fix=f"give a number from {low} to {high}.")


def _python_number(config: object, name: str) -> Any:
    """Value of a setting; a number of numpy becomes one of Python, which JSON can hold, in the dataclass, too."""
    value: Any = getattr(config, name)
    if type(value) in (bool, int, float) or not isinstance(value, numbers.Real):
        return value
    plain = int(value) if isinstance(value, numbers.Integral) else float(value)
    object.__setattr__(config, name, plain)  # it is frozen
    return plain
