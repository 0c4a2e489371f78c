import importlib.metadata
import itertools
import os

import jax
import pytest


# Most of the tests' time is compiling, and their programs are small: they need not be fast.
jax.config.update("jax_disable_most_optimizations", True)
if importlib.metadata.version("jaxlib").startswith("0.10."):  # another XLA may not know the flag, and ends the process
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_use_fusion_emitters=false"

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


TESTS = itertools.count(1)


@pytest.fixture(autouse=True)
def programs():
    """What was compiled takes gigabytes, and maps of memory, of which a process has so many: beyond them it crashes."""
    yield
    if next(TESTS) % 100 == 0:
        jax.clear_caches()


@pytest.fixture(scope="module", autouse=True)
def memory():
    """What a file has compiled is of no use to the next."""
    yield
    jax.clear_caches()


@pytest.hookimpl(tryfirst=True)  # before xdist reads the marks
def pytest_collection_modifyitems(items):
    """Where tests run in several processes, those of a file share one, and what is compiled in it."""
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.path.as_posix()))
