"""A run that goes on from a checkpoint is, bit by bit, the run that never stopped."""

import sys
from functools import partial
from pathlib import Path

import jax
import pytest


sys.path.append(str(Path(__file__).parent / "faults"))

import resume


@pytest.fixture(autouse=True)
def standard_promotion():
    """Optax's Adam raises a float to the power of an integer array."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def parts(found):
    return found["adapter"], found["optimizer"]


@pytest.mark.slow
def test_two_halves_are_a_whole(tmp_path):
    """And no whole where the second half does not go on with the data."""
    train = partial(resume.run, name="adamw", every=2)
    whole = train(steps=4, directory=str(tmp_path / "whole"))
    ends = {}
    for forgetful in (False, True):
        directory = str(tmp_path / f"halves-{forgetful}")
        half = train(steps=2, directory=directory)
        ends[forgetful] = train(steps=4, directory=directory, forgetful=forgetful)
        assert (half["from"], ends[forgetful]["from"]) == (0, 2)
        assert not set(parts(half)) & set(parts(whole))
    assert parts(ends[False]) == parts(whole)
    assert not set(parts(ends[True])) & set(parts(whole))


@pytest.mark.slow
def test_killed_runs_are_whole_ones(capfd):
    """By SIGKILL, in processes of their own; one of them with a transition that changes what does not train."""
    options = ["--steps", "12", "--every", "3", "--kills", "2", "--only", "adafactor", "rank_allocator"]
    assert resume.main(options) == 0, capfd.readouterr().out
