"""The linear start: what it can represent, what it finds, and what it is without."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import Ridge

from genejepa.world.linear import Features, Sample, folds_of, ridge

DIM = 3
ACTIONS = np.eye(2)
DURATIONS = np.array([1.0, 2.0])


@pytest.fixture
def features(rng: np.random.Generator) -> Features:
    return Features.of(rng.normal(1.0, 2.0, (200, DIM)).astype(np.float32), n_actions=2)


def samples(
    features: Features, coefficients: np.ndarray, rng: np.random.Generator, *, noise: float = 0.0
) -> list[Sample]:
    """One transition by each action, with changes that are linear."""
    found = []
    for action, duration in zip(ACTIONS, DURATIONS, strict=True):
        rows = features(rng.normal(1.0, 2.0, (50, DIM)), action, float(duration))
        weight = rng.random(50)
        found.append(Sample(rows, rows @ coefficients + noise * rng.normal(size=(50, DIM)), weight / weight.sum()))
    return found


def penalty(features: Features, strength: float) -> np.ndarray:
    return features.penalty(ACTIONS, DURATIONS, strength=strength)


def test_known_coefficients_are_found(features: Features, rng: np.random.Generator) -> None:
    truth = rng.normal(size=(2 + 2 * DIM, DIM))
    np.testing.assert_allclose(ridge(samples(features, truth, rng), penalty(features, 0.0)), truth, atol=1e-4)


def test_it_is_ridge_regression_of_weighted_pairs(features: Features, rng: np.random.Generator) -> None:
    data = samples(features, rng.normal(size=(2 + 2 * DIM, DIM)), rng, noise=1.0)
    own = penalty(features, 0.3)
    rows, targets, weight = (
        np.concatenate(parts) for parts in zip(*((s.features, s.targets, s.weight) for s in data), strict=True)
    )
    # The same penalty for all, after each feature is divided by the root of its own.
    expected = Ridge(alpha=1.0, fit_intercept=False).fit(rows / np.sqrt(own), targets, sample_weight=weight / 2)
    np.testing.assert_allclose(ridge(data, own), (expected.coef_ / np.sqrt(own)).T, rtol=1e-6, atol=1e-9)


def test_nothing_changes_without_an_action_or_without_time(features: Features, rng: np.random.Generator) -> None:
    states = rng.normal(size=(5, DIM))
    assert not features(states, np.zeros(2), 1.0).any()
    assert not features(states, np.ones(2), 0.0).any()


def test_changes_are_proportional_to_time_and_add_up_over_actions(features: Features, rng: np.random.Generator) -> None:
    states = rng.normal(size=(5, DIM))
    np.testing.assert_allclose(features(states, ACTIONS[0], 3.0), 3 * features(states, ACTIONS[0], 1.0))
    both = features(states, ACTIONS[0] + ACTIONS[1], 1.0)
    np.testing.assert_allclose(both, features(states, ACTIONS[0], 1.0) + features(states, ACTIONS[1], 1.0))


def test_effects_are_those_at_the_mean_state(features: Features) -> None:
    """So that a penalty on what depends on the state leaves the mean effect alone."""
    row = features(features.centre[None], ACTIONS[1], 1.0)[0]
    np.testing.assert_allclose(row, [0, 1, *[0] * (2 * DIM)], atol=1e-12)


def test_a_penalty_shrinks_what_depends_on_the_state_alone(features: Features, rng: np.random.Generator) -> None:
    truth = rng.normal(size=(2 + 2 * DIM, DIM))
    data = samples(features, truth, rng, noise=0.1)
    free, mild, strong = (ridge(data, penalty(features, k)) for k in (0.0, 1.0, 1e6))
    assert np.linalg.norm(mild[2:]) < 0.8 * np.linalg.norm(free[2:])
    np.testing.assert_allclose(strong[2:], 0, atol=1e-4)
    for number, sample in enumerate(data):
        np.testing.assert_allclose(strong[number] * DURATIONS[number], sample.weight @ sample.targets, atol=1e-3)


def test_an_action_that_was_never_seen_does_nothing(features: Features, rng: np.random.Generator) -> None:
    truth = rng.normal(size=(2 + 2 * DIM, DIM))
    without = ridge(samples(features, truth, rng)[:1], penalty(features, 0.0))
    of_second = [1, *range(2 + DIM, 2 + 2 * DIM)]
    assert not without[of_second].any()
    rest = np.setdiff1d(np.arange(2 + 2 * DIM), of_second)
    np.testing.assert_allclose(without[rest], truth[rest], atol=1e-4)


def test_transitions_weigh_the_same_however_many_cells_they_have(features: Features) -> None:
    rows = features(np.tile(features.centre, (100, 1)), ACTIONS[0], 1.0)
    many = Sample(rows, np.ones((100, DIM)), np.full(100, 0.01))
    few = Sample(rows[:2], np.zeros((2, DIM)), np.full(2, 0.5))
    fitted = ridge([many, few], features.penalty(ACTIONS[[0, 0]], np.ones(2), strength=1.0))
    np.testing.assert_allclose(fitted[0], 0.5, atol=1e-3)


def test_very_many_actions_share_how_they_depend_on_the_state(rng: np.random.Generator) -> None:
    states = rng.normal(size=(50, DIM)).astype(np.float32)
    few, many = (Features.of(states, n_actions=n) for n in (512, 513))
    assert few(states, np.eye(512)[0], 1.0).shape == (50, 512 * (1 + DIM))
    assert many(states, np.eye(513)[0], 1.0).shape == (50, 513 + DIM)


def test_states_that_never_vary_have_a_scale() -> None:
    assert Features.of(np.ones((5, DIM), dtype=np.float32), n_actions=1).variance == 1.0


def test_folds_keep_groups_together() -> None:
    assert folds_of(["y", "x", "y", "z", "w"], most=3) == [2, 1, 2, 0, 0]
    assert folds_of(["x", "x"], most=3) == [0, 0]
