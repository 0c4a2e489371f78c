"""Some hundred mutated files, the same ones each time. tests/faults/fuzz.py has as many as one likes."""

import shutil

import mutations
import pytest
import subjects
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from watch import watching


COUNTS = {"adapter": 200, "model": 40, "checkpoint": 60}


@pytest.mark.parametrize("kind", subjects.SUBJECTS)
def test_a_mutated_file_is_loaded_or_refused_by_the_documented_error(kind, scratch, tmp_path):
    subject = subjects.SUBJECTS[kind](scratch / kind)
    seeds = subject.seeds[:: max(1, len(subject.seeds) // 8)]
    for seed in seeds:  # what is imported and compiled at first use
        subject.write(seed, tmp_path / "seed")
        subject.read(seed, tmp_path / "seed")
        shutil.rmtree(tmp_path / "seed")
    outcomes = []

    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]
    # Random numbers of a seed that Hypothesis draws: each of them drawn would be too many.
    @settings(max_examples=COUNTS[kind], deadline=None, derandomize=True, database=None, suppress_health_check=checks)
    @given(st.sampled_from(seeds), st.randoms(use_true_random=True))
    def case(seed, rng):
        directory = tmp_path / "case"
        shutil.rmtree(directory, ignore_errors=True)
        subject.write(seed, directory)
        what = mutations.mutate(rng, directory)
        with watching(directory) as watched:
            try:
                subjects.wait(subject.read(seed, directory))
                outcomes.append("loaded")
            except subject.errors as error:
                outcomes.append(type(error).__name__)
        assert watched.faults == [], what
        assert watched.seconds < 5 and watched.peak < 2**26, what

    case()
    # Some mutations do harm, and some do none; a checkpoint's digests see all.
    assert len(set(outcomes)) > (kind != "checkpoint")
