"""Nothing is unpickled, and nothing in a file is run as code: neither at import nor when things are loaded."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import jpeft


PACKAGE = Path(jpeft.__file__).parent
MODULES = {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "yaml", "torch", "msgpack"}
CALLS = {"eval", "exec", "compile", "__import__"}
KEYWORDS = {"allow_pickle", "trust_remote_code"}


def uses(tree):
    """What a module uses of what runs code, or may."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from (x.name for x in names if x.name.partition(".")[0] in MODULES)
            case ast.ImportFrom(module=str(name), level=0) if name.partition(".")[0] in MODULES:
                yield name
            case ast.Call(func=ast.Name(id=name)) if name in CALLS:
                yield name
            case ast.Call(func=ast.Attribute(attr="load", value=ast.Name(id=("np" | "jnp" | "numpy") as name))):
                yield f"{name}.load"
            case ast.keyword(arg=name) if name in KEYWORDS:
                yield name


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_no_module_uses_what_runs_code(path):
    assert list(uses(ast.parse(path.read_text()))) == []


BAD = ("import pickle", "from torch import load", "eval('1')", "np.load(x)", "f(allow_pickle=True)", "import yaml.a")


@pytest.mark.parametrize("text", BAD)
def test_such_uses_are_seen(text):
    assert list(uses(ast.parse(text)))


SCRIPT = """
import sys, tempfile
from pathlib import Path

seen = []
sys.addaudithook(lambda event, args: seen.append((event, args)) if event in ("pickle.find_class",) else None)
import jpeft, jpeft.hf
imported = list(seen)
seen.clear()
sys.path[:0] = sys.argv[1:]
import subjects
scratch = Path(tempfile.mkdtemp())
for kind, seed in (("model", "llama"), ("adapter", "llama-lora"), ("checkpoint", "lora")):
    subject = subjects.SUBJECTS[kind](scratch / kind)
    subject.write(seed, scratch / seed)
    seen.clear()
    subject.read(seed, scratch / seed)
    assert not seen, (kind, seen)
assert not imported, imported
import pickle
pickle.loads(pickle.dumps(Path))
assert seen, "the hook sees nothing"
"""


def test_importing_and_loading_never_unpickle():
    command = [sys.executable, "-c", SCRIPT, str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
