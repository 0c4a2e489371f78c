"""The Llama of fixtures/adapters, and what fixtures/make_prefix.py has written of PEFT on it."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

import jpeft


FIXTURES = Path(__file__).parents[1] / "fixtures"
PEFT = np.load(FIXTURES / "prefix/peft.npz")
IDS, MASK = (jnp.asarray(PEFT[name], jnp.int32) for name in ("ids", "mask"))


def llama(directory, scan=False):
    """The model, its parameters and its sites; `directory` is for its checkpoint."""
    with safe_open(FIXTURES / "adapters/llama.safetensors", "numpy") as file:
        own = [n for n in list(file.keys()) if n.startswith(("model.", "lm_head."))]
        save_file({n: file.get_tensor(n) for n in own}, directory / "model.safetensors", {"format": "pt"})
        (directory / "config.json").write_text(file.metadata()["config"])
    model, params, _ = jpeft.hf.load(directory, scan=scan)
    return model, params, jpeft.sites(model, {"params": params}, IDS)


def stored(case, of="p"):
    """PEFT's parameters (`"p"`) or their gradients (`"g"`) in a case, by the parts of their names from the last."""
    start = f"{case}/{of}/"
    return {name.removeprefix(start): jnp.asarray(PEFT[name]) for name in PEFT.files if name.startswith(start)}


def check(model, params, case, theirs, tolerance=1e-4):
    """That logits and gradients are PEFT's: `theirs(tree)` has the trainable arrays of a tree by PEFT's names."""
    trainable, frozen = jpeft.partition(params)

    def loss(trainable):
        y = jpeft.apply(model, {"params": jpeft.combine(trainable, frozen)}, IDS, MASK)
        return 0.5 * jnp.sum(jnp.where(MASK[..., None] > 0, y**2, 0)), y

    grads, y = jax.jit(jax.grad(loss, has_aux=True))(trainable)
    close(y, PEFT[f"{case}/y"], 1e-5)
    found, wanted = theirs(grads), stored(case, "g")
    assert found.keys() == wanted.keys()
    for name, x in wanted.items():
        close(found[name], x, tolerance)


def close(found, want, tolerance=1e-5):
    """Within `tolerance` of the largest entry."""
    np.testing.assert_allclose(found, want, rtol=0, atol=tolerance * np.abs(want).max())
