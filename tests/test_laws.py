"""Every law, for every row of the table of methods, on float, int8 and nf4 bases, unrolled and scanned.

Of some methods, of every family one or two, a part of the laws on one base are quick tests: nf4 and scanned, where the
method can be on it.
"""

import pytest
from methods import METHODS

from jpeft.testing import LAWS, cases, subject


SOME = ("lora", "vera", "bitfit", "houlsby", "prompt", "stack")
SLOW = ("unboxes", "freezes", "scans", "maps", "compiles", "keeps_dtypes")


assert {method.name for method in METHODS} >= set(SOME)


def case(method, law, base, scan):
    name = f"{method.name}-{law}-{base}-{'scanned' if scan else 'unrolled'}"
    marks = [pytest.mark.xdist_group(method.name)]
    on_float = "nf4" in method.exceptions
    quick = (base, scan) == (("float", False) if on_float else ("nf4", True)) and law not in SLOW
    if not quick or method.name not in SOME:
        marks.append(pytest.mark.slow)
    return pytest.param(method, law, base, scan, id=name, marks=marks)


@pytest.mark.parametrize(
    ("method", "law", "base", "scan"), [case(method, *found) for method in METHODS for found in cases(method)]
)
def test_law(method, law, base, scan):
    LAWS[law](method, subject(method.model, scan, base))
