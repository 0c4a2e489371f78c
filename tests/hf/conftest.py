import dataclasses
import json

import adapters
import pytest
from safetensors.numpy import save_file
from tiny import TINY, Config

from jpeft.hf import architectures, load


@pytest.fixture(autouse=True)
def tiny_architecture(monkeypatch):
    monkeypatch.setitem(architectures.ARCHITECTURES, "tiny", TINY)


@pytest.fixture
def directory(tmp_path):
    """Writes a model directory of the given tensors, with these config fields changed."""

    def write(arrays, **changed):
        save_file(arrays, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(Config()) | changed))
        return tmp_path

    return write


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    """The model and the parameters of every architecture that there are adapters for."""
    directory = tmp_path_factory.mktemp("bases")
    return {name: load(adapters.write_base(directory / name, name))[:2] for name in adapters.ARCHITECTURES}
