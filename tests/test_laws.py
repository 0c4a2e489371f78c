"""Every law, for every row of the table of methods, on float, int8 and nf4 bases, unrolled and scanned."""

import pytest
from methods import METHODS

from jpeft.testing import LAWS, cases, subject


CASES = [(method, *case) for method in METHODS for case in cases(method)]


@pytest.mark.parametrize(
    ("method", "law", "base", "scan"),
    CASES,
    ids=[f"{m.name}-{law}-{base}-{'scanned' if scan else 'unrolled'}" for m, law, base, scan in CASES],
)
def test_law(method, law, base, scan):
    LAWS[law](method, subject(method.model, scan, base))
