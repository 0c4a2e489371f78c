"""Adapters that libFuzzer makes, led by which lines of ours they reach: loaded, or refused by the documented error.

    pip install -e '.[fuzz]'
    python tests/faults/atheris_adapter.py -runs=100000 /tmp/corpus tests/fixtures/hostile

What begins with `{` is a config, anything else a file of tensors; the other file is that of the seed.
"""

import contextlib
import os
import sys
import tempfile
from pathlib import Path

import atheris


os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.append(str(Path(__file__).parents[1] / "hostile"))

with atheris.instrument_imports(include=["jpeft.hf", "json"]):
    from jpeft import hf

import subjects
from watch import watching


CASE = "llama-lora-patterns"
SECONDS, MEMORY = 2.0, 2**26  # of one case

scratch = Path(tempfile.mkdtemp())
subject = subjects.adapter(scratch)
directory = scratch / "case"
subject.write(CASE, directory)
subject.read(CASE, directory)
config, weights = directory / "adapter_config.json", directory / "adapter_model.safetensors"
whole = {path: path.read_bytes() for path in (config, weights)}


def one(data: bytes) -> None:
    for path, content in whole.items():
        path.write_bytes(content)
    (config if data.startswith(b"{") else weights).write_bytes(data)
    with watching(directory) as watched, contextlib.suppress(hf.AdapterFormatError):
        subject.read(CASE, directory)
    assert watched.faults == [], watched.faults
    assert watched.seconds < SECONDS and watched.peak < MEMORY, watched


if __name__ == "__main__":
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()
