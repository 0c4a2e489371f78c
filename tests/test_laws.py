"""Every law, for every row of the table of methods, on float, int8 and nf4 bases, unrolled and scanned.

Scanned float bases and int8 ones are slow tests, but for LoRA.
"""

import pytest
from methods import METHODS

from jpeft.testing import LAWS, cases, subject


def case(method, law, base, scan):
    name = f"{method.name}-{law}-{base}-{'scanned' if scan else 'unrolled'}"
    marks = [pytest.mark.xdist_group(method.name)]
    if (base, scan) in (("float", True), ("int8", False)) and method.name != "lora":
        marks.append(pytest.mark.slow)
    return pytest.param(method, law, base, scan, id=name, marks=marks)


@pytest.mark.parametrize(
    ("method", "law", "base", "scan"), [case(method, *found) for method in METHODS for found in cases(method)]
)
def test_law(method, law, base, scan):
    LAWS[law](method, subject(method.model, scan, base))
