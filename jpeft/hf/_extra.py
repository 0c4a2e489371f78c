"""The libraries that only this bridge needs."""

import importlib
from types import ModuleType


def extra(name: str) -> ModuleType:
    """The module `name`. **Raises** a `ModuleNotFoundError` that says how to install what it belongs to."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f'{error}: pip install "jpeft[hf]"', name=error.name) from error
