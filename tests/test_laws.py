"""Every law, for every row of the table of methods, on float, int8 and nf4 bases, unrolled and scanned.

Of most methods the cases on one base are a part of the quick tests: nf4 and scanned, where the method can be on it.
"""

import pytest
from methods import METHODS

from jpeft.testing import LAWS, cases, subject


def case(method, law, base, scan):
    name = f"{method.name}-{law}-{base}-{'scanned' if scan else 'unrolled'}"
    marks = [pytest.mark.xdist_group(method.name)]
    quick = ("float", False) if "nf4" in method.exceptions else ("nf4", True)
    if (base, scan) != quick and law != "keeps_dtypes" and method.name not in ("lora", "bitfit", "prompt"):
        marks.append(pytest.mark.slow)
    return pytest.param(method, law, base, scan, id=name, marks=marks)


@pytest.mark.parametrize(
    ("method", "law", "base", "scan"), [case(method, *found) for method in METHODS for found in cases(method)]
)
def test_law(method, law, base, scan):
    LAWS[law](method, subject(method.model, scan, base))
