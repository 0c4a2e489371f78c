"""A vector added to what a module returns: a bias, and what PEFT calls `lora_bias`."""

from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import jpeft
from jpeft.testing import subject


FILE = Path(__file__).parents[1] / "fixtures" / "additive" / "peft.npz"


def close(found, want, tolerance=1e-5):
    np.testing.assert_allclose(found, want, rtol=0, atol=tolerance * np.abs(want).max())


def test_it_is_a_bias():
    """With the gradient of one, where the module has one."""
    model = subject("encoder")
    tuned = jpeft.beft(model.params)
    freed = jpeft.unfreeze(model.params, targets=".*/value/bias")
    grads, want = (model.slope(*jpeft.partition(tree))[1] for tree in (tuned, freed))
    for n in range(2):
        own, other = (tree[f"layers_{n}"]["attention"]["value"] for tree in (grads, want))
        assert np.abs(other["bias"].array).max() > 0
        close(own["beft"].bias, other["bias"].array)


def test_lora_bias_of_peft():
    """LoRA, and a vector with LoRA's scale."""
    arrays = {k.removeprefix("lora_bias/"): jnp.asarray(x) for k, x in np.load(FILE).items() if k.startswith("lora_")}
    a, b, shift = (arrays[f"p/lora_{name}"] for name in ("A.weight", "B.weight", "B.bias"))
    kernel = jpeft.LoRA(base=arrays["weight"].T, a=a.T, b=b.T, scale=3.0)
    params = {"kernel": kernel, "bias": arrays["bias"], "beft": jpeft.BEFT(bias=shift, scale=3.0)}

    def loss(params):
        y = jpeft.apply(nn.Dense(5), {"params": params}, arrays["x"])
        return jnp.sum(y**2) / 2, y

    grads, y = jax.grad(loss, has_aux=True)(params)
    close(y, arrays["y"])
    close(grads["beft"].bias, arrays["g/lora_B.bias"], 1e-4)
    close(grads["kernel"].a, arrays["g/lora_A.weight"].T, 1e-4)
    close(nn.Dense(5).apply({"params": jpeft.merge(params)}, arrays["x"]), arrays["y"])


def test_a_scale_for_each_module():
    tuned = jpeft.beft(subject("decoder").params, scale={"layers_0/.*": 2.0, ".*": 0.5})
    assert [tuned[f"layers_{n}"]["attention"]["value"]["beft"].scale for n in range(2)] == [2.0, 0.5]
