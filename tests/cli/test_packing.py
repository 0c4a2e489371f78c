import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jpeft.cli._packing import Sequences, pack
from jpeft.cli._samples import Sample


lengths = st.lists(st.integers(1, 10), max_size=40)


@given(lengths)
def test_every_sample_has_one_place(lengths):
    rows = pack(lengths, 10)
    assert sorted(n for row in rows for n in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[n] for n in row) <= 10 for row in rows)


@given(lengths)
def test_no_two_rows_would_fit_into_one(lengths):
    full = [sum(lengths[n] for n in row) for row in pack(lengths, 10)]
    assert all(a + b > 10 for a, b in itertools.combinations(full, 2))


def test_samples_are_put_where_they_fit_best():
    assert pack([3, 6, 2, 5, 4], 10) == [[1, 4], [3, 0, 2]]


@pytest.fixture
def samples():
    """Of 6, 3 and 2 tokens, of which those that are even count."""
    parts = np.split(np.arange(10, 21, dtype=np.int32), [6, 9])
    return [Sample(part, (part % 2 == 0) & (np.arange(len(part)) > 0), "") for part in parts]


def test_a_packed_batch_holds_its_samples(samples):
    sequences = Sequences(samples, 10, packed=True)
    assert sequences.rows == [[0, 1], [2]]
    batch = sequences.batch([0, 1], 3)
    assert batch.input_ids.tolist() == [[*range(10, 19), 0], [19, 20, *[0] * 8], [*range(10, 19), 0]]
    assert batch.segment_ids.tolist() == [[*[1] * 6, *[2] * 3, 0], [1, 1, *[0] * 8], [*[1] * 6, *[2] * 3, 0]]
    labels = [[-100, -100, 12, -100, 14, -100, -100, -100, 18, -100], [-100, 20, *[-100] * 8], [-100] * 10]
    assert batch.labels.tolist() == labels
    assert batch.weights.tolist() == [3, 1, 0]


def test_a_batch_that_is_not_packed_has_a_sample_a_row(samples):
    sequences = Sequences(samples, 8, packed=False)
    batch = sequences.batch([0, 1, 2], 3)
    assert batch.segment_ids.tolist() == [[1] * 6, [1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0]]
    assert batch.weights.tolist() == [2, 1, 1]
