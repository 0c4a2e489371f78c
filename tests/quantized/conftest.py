from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
import pytest
from formats import EXACT, FORMATS, Format


@pytest.fixture(params=EXACT)
def exact(request) -> Format:
    """Every format whose constants are not quantized in their turn."""
    return EXACT[request.param]


@pytest.fixture(params=FORMATS)
def form(request) -> Format:
    """Every format."""
    return FORMATS[request.param]


@pytest.fixture(params=["int8", "int4-asymmetric", "nf4"])
def node_class(request) -> Format:
    """A format of every class of node, the one with most arrays."""
    return FORMATS[request.param]


@pytest.fixture
def normal() -> Callable:
    """Standard normal numbers of a shape, the same at every call."""
    return lambda *shape: jnp.asarray(np.random.default_rng(0).standard_normal(shape, np.float32))
