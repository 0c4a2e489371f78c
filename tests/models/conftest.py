import jax
import numpy as np
import pytest


@pytest.fixture(scope="session")
def random_params():
    """A function from a model and its inputs to parameters, none at its start; it compiles no initializer."""

    def random_params(model, *args):
        rng = np.random.default_rng(0)
        shapes = jax.eval_shape(model.init, jax.random.key(0), *args)["params"]
        return jax.tree.map(lambda leaf: rng.normal(0.5, 0.5, leaf.shape).astype(np.float32), shapes)

    return random_params
