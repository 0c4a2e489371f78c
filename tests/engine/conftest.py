import jax
import pytest


@pytest.fixture(autouse=True)
def quick_compilation():
    """No effort on the machine code of programs that are tiny, or only analysed. XLA's own passes stay as they are."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
