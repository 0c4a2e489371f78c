import re
from pathlib import Path

import pytest

from jpeft.cli._arguments import Arguments
from jpeft.cli._causal import Causal
from jpeft.cli._classification import Classification
from jpeft.cli._errors import UserError
from jpeft.cli._methods import METHODS, resolve


PAGE = (Path(__file__).parents[2] / "docs/cli.md").read_text()


def test_the_page_has_every_method_with_its_rates():
    rows = re.findall(r"^\| `([\w-]+)` \| [^|]+ \| (\S+) \| (\S+) \| (yes)? ?\|$", PAGE, re.MULTILINE)
    found = {name: (float(one), float(other), bool(peft)) for name, one, other, peft in rows}
    assert found == {name: (m.classification, m.causal, m.peft) for name, m in METHODS.items()}


def test_the_page_has_every_option():
    section = PAGE.split("\n## Options\n")[1].split("\n## ")[0]
    cells = re.findall(r"^\| (`--.*?`) \|", section, re.MULTILINE)
    options = {name for cell in cells for name in re.findall(r"--[\w-]+", cell)}
    fields = {f"--{name.replace('_', '-')}" for name in vars(Arguments())}
    assert {name for name in options if not name.startswith("--no-")} == fields


def test_defaults_are_those_of_the_method_and_of_the_task():
    arguments = Arguments(method="vera", batch_size=3)
    causal, classification = resolve(arguments, Causal), resolve(arguments, Classification)
    assert (causal.max_length, classification.max_length) == (1024, 64)
    assert (causal.learning_rate, classification.learning_rate) == (4e-3, 1e-2)
    assert causal.batch_size == 3 and causal.rank == 256 and causal.alpha == 512 and causal.base == "nf4"
    assert resolve(Arguments(method="full"), Causal).base == "float"


def test_given_values_stay():
    given = Arguments(rank=4, alpha=1.0, base="int8", learning_rate=0.5, max_length=9, batch_size=2)
    assert resolve(given, Causal) == given


@pytest.mark.parametrize(("given", "message"), [({"method": "lorra"}, "did you mean lora"), ({"base": "nf5"}, "nf4")])
def test_unknown_names_are_told(given, message):
    with pytest.raises(UserError, match=message):
        resolve(Arguments(**given), Causal)
