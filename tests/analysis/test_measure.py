"""Ratios are taken round by round, and nothing but the contestants is counted."""

import math

import pytest

from kvmmmu.analysis.measure import LEAST_ROUNDS, quartiles, race, ratios


def test_every_contestant_has_a_sample_in_every_round() -> None:
    samples = race({"": lambda: sum(range(50)), "peer": "sum(r)"}, seconds=0.01, namespace={"r": range(50)})
    assert len(samples[""]) == len(samples["peer"]) >= LEAST_ROUNDS
    assert all(value > 0 for values in samples.values() for value in values)


def test_twice_the_work_takes_about_twice_the_time() -> None:
    samples = race({"": lambda: sum(range(20000)), "peer": lambda: sum(range(10000))}, seconds=0.3)
    assert 1.3 < ratios(samples, "", "peer").median < 3


def test_a_net_sample_of_nothing_is_nothing() -> None:
    net = race({"nothing": "pass", "len": "len('walk')"}, seconds=0.1, net=True)
    assert abs(quartiles(net["nothing"]).median) < 0.3 * quartiles(net["len"]).median


def test_a_ratio_is_taken_within_its_round_and_not_between_averages() -> None:
    # The machine is ten times slower in the second round, for both.
    assert ratios({"": [1.0, 10.0, 1.0], "peer": [2.0, 20.0, 2.0]}, "", "peer").median == 0.5


def test_samples_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="shorter"):
        ratios({"": [1.0, 2.0], "peer": [1.0]}, "", "peer")


def test_quartiles_are_those_of_the_sample() -> None:
    middle = quartiles([5.0, 1.0, 2.0, 3.0, 4.0])
    assert (middle.q1, middle.median, middle.q3) == (2.0, 3.0, 4.0)
    assert math.isclose(quartiles([7.0]).q3, 7.0)
