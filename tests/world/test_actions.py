"""Names, combinations and doses of actions as vectors; what was not seen is warned of or refused."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from sklearn.linear_model import Ridge

from genejepa.errors import ConfigError, ExtrapolationWarning, MissingKeyError
from genejepa.world.actions import Action, ActionSpace, mixture_weights

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray


def space_of(
    *names: str, doses: tuple[float, ...] = (), has_time: bool = False, genes: Mapping[str, NDArray[Any]] | None = None
) -> ActionSpace:
    """Space of some names, each with each dose."""
    known = [Action.parse(name, control="ctrl", dose=dose) for name in names for dose in doses or (None,)]
    return ActionSpace.of(known, has_time=has_time, gene_vectors=dict(genes or {}))


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("stim", ("stim",)),
        (" stim ", ("stim",)),
        ("A+B", ("A", "B")),
        ("B+A", ("A", "B")),
        ("B + A", ("A", "B")),
        ("C+A+B", ("A", "B", "C")),
        ("A+A", ("A",)),
        ("A+ctrl", ("A",)),
        ("ctrl+A", ("A",)),
        ("ctrl", ()),
        (" ctrl ", ()),
        ("ctrl+ctrl", ()),
        ("Ctrl", ("Ctrl",)),
        ("CD3+", ("CD3+",)),
        ("CD3+ ", ("CD3+",)),
        ("+", ("+",)),
    ],
)
def test_names(name: str, parts: tuple[str, ...]) -> None:
    assert Action.parse(name, control="ctrl").parts == parts


def test_a_control_may_be_called_anything() -> None:
    assert Action.parse("mock+vehicle", control="mock+vehicle") == Action()
    assert Action.parse("", control="") == Action()
    assert Action.parse("ctrl", control=None).parts == ("ctrl",)


def test_the_control_has_no_dose() -> None:
    assert Action.parse("ctrl", control="ctrl", dose=3.0) == Action()
    assert Action.parse("A+ctrl", control="ctrl", dose=3.0) == Action(("A",), 3.0)


def test_actions_are_told_by_their_names() -> None:
    assert str(Action()) == "control"
    assert str(Action(("A", "B"))) == "A+B"
    assert str(Action(("A",), 0.5)) == "A (0.5)"


def test_vectors_of_combinations_are_sums() -> None:
    space = space_of("A", "B", "A+B", "C+ctrl", "ctrl")
    assert space.names == ("A", "B", "C")
    np.testing.assert_array_equal(space.encode(Action()), [0, 0, 0])
    np.testing.assert_array_equal(space.encode(Action(("B",))), [0, 1, 0])
    np.testing.assert_array_equal(space.encode(Action(("A", "B"))), [1, 1, 0])


def test_time_passes_under_every_action() -> None:
    space = space_of("A", has_time=True)
    assert space.dim == 2
    np.testing.assert_array_equal(space.encode(Action()), [1, 0])
    np.testing.assert_array_equal(space.encode(Action(("A",))), [1, 1])


def test_levels_of_doses() -> None:
    """0 at dose 0, 1 at the largest dose of that action, and more for more."""
    space = space_of("A", doses=(1.0, 10.0, 100.0))
    levels = [space.encode(Action(("A",), dose)).item() for dose in (0.0, 0.3, 1.0, 10.0, 100.0)]
    assert levels[0] == 0
    assert levels[-1] == pytest.approx(1)
    assert np.diff(levels).min() > 0.01
    assert levels[3] == pytest.approx(np.log(11) / np.log(101))


def test_each_action_has_its_own_largest_dose() -> None:
    known = [Action(("A",), 2.0), Action(("B",), 50.0), Action(("A", "B"), 2.0)]
    space = ActionSpace.of(known, has_time=False, gene_vectors={})
    np.testing.assert_allclose(space.encode(Action(("A", "B"), 2.0)), [1.0, np.log(3) / np.log(51)])


def test_a_dose_above_the_largest_is_warned_of() -> None:
    space = space_of("A", doses=(1.0, 5.0))
    with pytest.warns(ExtrapolationWarning, match="dose 6 of 'A' is above the largest one seen, 5"):
        level = space.encode(Action(("A",), 6.0)).item()
    assert level == pytest.approx(np.log(7) / np.log(6))


def test_doses_that_are_all_zero_do_nothing() -> None:
    space = space_of("A", doses=(0.0,))
    assert space.encode(Action(("A",), 0.0)).item() == 0
    with pytest.warns(ExtrapolationWarning, match="above the largest one seen, 0"):
        assert np.isfinite(space.encode(Action(("A",), 1.0))).all()


@pytest.mark.parametrize("dose", [np.nan, np.inf, -1.0, -np.inf, "1", True, [1.0]])
def test_impossible_doses(dose: Any) -> None:
    with pytest.raises(ConfigError, match=r"`dose` is .*, expected a finite number of at least 0"):
        space_of("A", doses=(1.0,)).encode(Action(("A",), dose))


@pytest.mark.parametrize("dose", [np.float32(1), np.int64(1), 1])
def test_numbers_of_all_kinds_are_doses(dose: Any) -> None:
    assert space_of("A", doses=(1.0,)).encode(Action(("A",), dose)).item() == pytest.approx(1)


def test_a_dose_is_needed_where_there_are_doses_and_only_there() -> None:
    with pytest.raises(ConfigError, match=r"(?s)no dose is given for 'A', expected one.*Fix: pass `dose`"):
        space_of("A", doses=(1.0,)).encode(Action(("A",)))
    with pytest.raises(ConfigError, match=r"(?s)dose 2.0 is given.*there was no `dose_key`.*Fix: leave `dose` out"):
        space_of("A").encode(Action(("A",), 2.0))
    np.testing.assert_array_equal(space_of("A", doses=(1.0,)).encode(Action()), [0])


def test_a_combination_that_was_not_seen_is_warned_of() -> None:
    space = space_of("A", "B", "C", "A+B")
    space.encode(Action.parse("B+A", control="ctrl"))  # seen: no warning
    with pytest.warns(ExtrapolationWarning, match=r"the combination 'A\+C' was not seen"):
        vector = space.encode(Action(("A", "C")))
    np.testing.assert_array_equal(vector, [1, 0, 1])


def test_a_part_that_was_never_seen_alone_is_warned_of() -> None:
    space = space_of("A+B", "C")
    with pytest.warns(ExtrapolationWarning, match="'A' was seen in combinations only"):
        space.encode(Action(("A",)))


def test_unknown_actions_are_refused_with_a_suggestion() -> None:
    with pytest.raises(MissingKeyError, match=r"(?s)'stimm'.*found 'other', 'stim'; did you mean 'stim'\?"):
        space_of("stim", "other").encode(Action(("stimm",)))
    with pytest.raises(MissingKeyError, match="no action is known, because there was no `action_key`"):
        space_of(has_time=True).encode(Action(("stim",)))


@pytest.fixture
def genes(rng: np.random.Generator) -> dict[str, NDArray[np.float64]]:
    """Vectors of six genes, of which ``g5`` has that of ``g0``."""
    vectors = rng.normal(size=(6, 8))
    vectors[5] = vectors[0]
    return {f"g{number}": vector for number, vector in enumerate(vectors)}


def test_an_unseen_gene_is_a_mixture_of_the_known_ones(genes: dict[str, NDArray[np.float64]]) -> None:
    space = space_of("g0", "g1", "g2", "g3", genes=genes)
    with pytest.warns(ExtrapolationWarning, match="'g4' was never perturbed; its effect is a mixture .* 4 other genes"):
        vector = space.encode(Action(("g4",)))
    assert vector.sum() == pytest.approx(1)
    with pytest.warns(ExtrapolationWarning, match="'g5' was never perturbed"):
        twin = space.encode(Action(("g5",)))
    assert twin.argmax() == 0
    with pytest.warns(ExtrapolationWarning, match="never perturbed") as warned:
        pair = space.encode(Action(("g1", "g5")))
    assert len(warned) == 1
    np.testing.assert_allclose(pair, twin + np.eye(4)[1])


def test_an_unseen_gene_has_doses_like_the_known_ones(rng: np.random.Generator) -> None:
    """Weights may be negative; a dose is a number whatever they are, and the largest dose is that without doses."""
    for _ in range(50):
        genes = {f"g{number}": vector for number, vector in enumerate(rng.normal(size=(5, 8)))}
        doses = np.array([1.0, 1.0, 1.0, 1000.0])
        space = replace(space_of("g0", "g1", "g2", "g3", genes=genes), largest_dose=doses, has_doses=True)
        with pytest.warns(ExtrapolationWarning, match="never perturbed"):
            plain = space_of("g0", "g1", "g2", "g3", genes=genes).encode(Action(("g4",)))
        with pytest.warns(ExtrapolationWarning, match="never perturbed"):
            dosed = space.encode(Action(("g4",), 1.0))
        np.testing.assert_allclose(dosed, plain * [1, 1, 1, np.log(2) / np.log(1001)])
        with pytest.warns(ExtrapolationWarning) as caught:
            space.encode(Action(("g4",), 1001.0))
        assert "dose 1001 of 'g4' is above the largest one seen, 1000" in str(caught[-1].message)


def test_what_is_no_gene_among_genes_is_refused(genes: dict[str, NDArray[np.float64]]) -> None:
    with pytest.raises(MissingKeyError):
        space_of("g0", "g1", genes=genes).encode(Action(("drug",)))
    with pytest.raises(MissingKeyError):
        space_of("g0", "g1", "drug", genes=genes).encode(Action(("g4",)))
    with pytest.raises(MissingKeyError):  # one gene tells nothing about others
        space_of("g0", genes=genes).encode(Action(("g4",)))


def test_weights_are_those_of_ridge_regression(rng: np.random.Generator) -> None:
    known, new, targets = rng.normal(size=(7, 4)), rng.normal(size=4), rng.normal(size=(7, 3))
    weights = mixture_weights(known, new, ridge=0.5)
    scale = np.square(known - known.mean(0)).sum() / 7
    told = Ridge(alpha=0.5 * scale).fit(known, targets).predict(new[None])[0]
    np.testing.assert_allclose(weights @ targets, told)
    assert weights.sum() == pytest.approx(1)


def test_weights_at_the_ends(genes: dict[str, NDArray[np.float64]]) -> None:
    """Without a penalty a gene with the vector of a known one has its effect; with a large one, the mean effect."""
    known = np.stack([genes[f"g{number}"] for number in range(4)])
    np.testing.assert_allclose(mixture_weights(known, genes["g5"], ridge=1e-9), [1, 0, 0, 0], atol=1e-6)
    np.testing.assert_allclose(mixture_weights(known, genes["g5"], ridge=1e9), 0.25, atol=1e-6)
    np.testing.assert_allclose(mixture_weights(known[[0, 0]], genes["g4"], ridge=1.0), 0.5)
