"""Nothing public is undocumented, and every command in the docs exists."""

import inspect
import os
import re
import shlex
import subprocess
import sys

import pytest
from test_examples import PAGES, ROOT, blocks

import jpeft
import jpeft.algebra
import jpeft.distributed
import jpeft.hf
import jpeft.models
import jpeft.optim
import jpeft.plan


DOCUMENTED = re.findall(r"^::: (jpeft\.\S+)$", "\n".join(page.read_text() for page in PAGES), re.MULTILINE)
PUBLIC = {
    f"{module.__name__}.{name}": x
    for module in (jpeft, jpeft.algebra, jpeft.distributed, jpeft.hf, jpeft.models, jpeft.optim, jpeft.plan)
    for name, x in vars(module).items()
    if not name.startswith("_") and not inspect.ismodule(x)
}
FAMILIES = ("selective", "reparam", "additive", "mixture", "hybrid", "quantized", "optim")


def is_method(x):
    """Whether `x` is what `transform` makes of a function in one of the families."""
    return inspect.isfunction(x) and hasattr(x, "__wrapped__") and x.__module__.split(".")[1] in FAMILIES


def commands():
    """Every command line of the console blocks, whose continued lines are joined."""
    text = "".join(text for page in PAGES for language, _, text in blocks(page) if language == "console")
    return re.findall(r"^\$ (.*)$", text.replace("\\\n", " "), re.MULTILINE)


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_documented_once(name):
    assert DOCUMENTED.count(name) == 1


def test_every_documented_name_exists():
    assert set(DOCUMENTED) - {"jpeft.testing"} <= PUBLIC.keys()


@pytest.mark.parametrize("name", [name for name, x in PUBLIC.items() if is_method(x)])
def test_every_method_has_a_page(name):
    page = ROOT / "docs/methods" / f"{name.removeprefix('jpeft.')}.md"
    assert f"::: {name}\n" in page.read_text()


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text()
    pages = [page.relative_to(ROOT / "docs").as_posix() for page in PAGES if page.name != "README.md"]
    assert [page for page in pages if not re.search(rf"[ :]{re.escape(page)}$", navigation, re.MULTILINE)] == []


def test_links_of_the_readme():
    links = re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / "README.md").read_text())
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_every_make_target_exists():
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    used = {word for line in commands() if line.startswith("make ") for word in line.split()[1:]}
    assert used and used <= set(targets)


@pytest.fixture(scope="module")
def options():
    """The options of every command, by its own help."""
    found = {}
    for command in ("finetune", "generate", "chat", "plan"):
        program = [sys.executable, "-c", "from jpeft.cli import main; main()", command, "--help"]
        wide = os.environ | {"COLUMNS": "200"}
        shown = subprocess.run(program, capture_output=True, text=True, cwd=ROOT, env=wide, check=True)
        found[command] = set(re.findall(r"--[a-z][a-z-]+", shown.stdout)) - {"--help", "--no-resume"}
    return found


def documented(text):
    """The options in the first column of a page's tables."""
    cells = re.findall(r"^\| (`--[^|]*) \|", text, re.MULTILINE)
    return set(re.findall(r"--[a-z-]+", " ".join(cells)))


def test_every_option_is_documented(options):
    finetune, others, plan = re.split("\n## (?:Generate and chat|Plan)\n", (ROOT / "docs/cli.md").read_text())
    assert documented(finetune) == options["finetune"]
    assert documented(others) == options["generate"] | options["chat"]
    assert documented(plan) == options["plan"]


@pytest.mark.parametrize("line", sorted({line for line in commands() if line.startswith("jpeft ")}))
def test_commands_have_options_that_exist(line, options):
    _, command, *rest = shlex.split(line)
    assert {word.partition("=")[0] for word in rest if word.startswith("--")} <= options[command]
