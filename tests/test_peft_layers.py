"""Methods of one layer against Hugging Face's PEFT, of which `fixtures/make_additive.py` has kept what it computes."""

from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft._node import Role, is_node


ARRAYS = dict(np.load(Path(__file__).parent / "fixtures" / "additive" / "peft.npz"))

# case -> the transform, and for each field of its node PEFT's name of the array
CASES = {
    "ia3_out": (jpeft.ia3(targets="layer", feedforward=None), {"scale": "ia3_l"}),
    "ia3_in": (jpeft.ia3(targets=None, feedforward="layer"), {"scale": "ia3_l"}),
    "oft": (jpeft.oft(block=4), {"generators": "oft_R.weight"}),
    "oft_terms": (jpeft.oft(block=3, terms=7), {"generators": "oft_R.weight"}),
    "oft_exact": (jpeft.oft(block=6, cayley="exact"), {"generators": "oft_R.weight"}),
    "oft_shared": (jpeft.oft(block=4, share=True), {"generators": "oft_R.weight"}),
    "coft": (jpeft.oft(block=4, epsilon=0.2), {"generators": "oft_R.weight"}),
    "boft": (jpeft.boft(block=3), {"z": "boft_R", "scale": "boft_s"}),
    "boft_factors": (jpeft.boft(block=4, factors=3), {"z": "boft_R", "scale": "boft_s"}),
    "hra": (jpeft.hra(rank=4), {"u": "hra_u"}),
    "hra_odd": (jpeft.hra(rank=3, init="random"), {"u": "hra_u"}),
    "hra_orthogonal": (jpeft.hra(rank=4, orthogonal=True), {"u": "hra_u"}),
    "miss": (jpeft.miss(rank=4), {"d": "miss_block"}),
    "miss_rest": (jpeft.miss(rank=3), {"d": "miss_block"}),
    "miss_mini": (jpeft.miss(rank=3, width=2), {"d": "miss_block"}),
    "beft": (jpeft.beft(targets="layer"), {"bias": "beft_bias"}),
    "tokens": (jpeft.tokens(ids=[7, 2, 9], targets="layer/embedding"), {"rows": "trainable_tokens_delta"}),
}


class Layer(nn.Module):
    """The layer of a case, named `layer`."""

    case: str

    @nn.compact
    def __call__(self, x):
        if self.case == "tokens":
            return nn.Embed(11, 6, name="layer")(x)
        bias = f"{self.case}/bias" in ARRAYS
        return nn.Dense(len(ARRAYS[f"{self.case}/weight"]), use_bias=bias, name="layer")(x)


def base_of(case):
    weight = jnp.asarray(ARRAYS[f"{case}/weight"])
    own = {"embedding": weight} if case == "tokens" else {"kernel": weight.T}
    bias = ARRAYS.get(f"{case}/bias")
    return {"layer": own if bias is None else own | {"bias": jnp.asarray(bias)}}


@pytest.mark.parametrize("case", CASES)
def test_layer(case):
    """The fields are PEFT's arrays, but for axes of size one; COFT's gradient in PEFT is not that of its output."""
    method, names = CASES[case]
    start = method(base_of(case))
    nodes = [x for x in jax.tree.leaves(start, is_leaf=is_node) if is_node(x)]
    assert len(nodes) == 1 and set(nodes[0].parts(Role.TRAINABLE)) == set(names)

    def filled(kind):
        arrays = {field: ARRAYS[f"{case}/{kind}/{name}"] for field, name in names.items()}
        return {field: jnp.asarray(x.reshape(getattr(nodes[0], field).shape)) for field, x in arrays.items()}

    set_to = lambda arrays: jax.tree.map(lambda x: x.replace(**arrays) if is_node(x) else x, start, is_leaf=is_node)
    x, y = jnp.asarray(ARRAYS[f"{case}/x"]), ARRAYS[f"{case}/y"]

    def loss(arrays):
        y = jpeft.apply(Layer(case), {"params": set_to(arrays)}, x)
        return jnp.sum(y**2) / 2, y

    (_, found_y), found = jax.jit(jax.value_and_grad(loss, has_aux=True))(filled("p"))
    np.testing.assert_allclose(found_y, y, rtol=0, atol=1e-5 * np.abs(y).max())
    merged = Layer(case).apply({"params": jpeft.merge(set_to(filled("p")))}, x)
    np.testing.assert_allclose(merged, y, rtol=0, atol=1e-5 * np.abs(y).max())
    assert np.abs(Layer(case).apply({"params": base_of(case)}, x) - y).max() > 0.1
    if case == "coft":
        return
    for field, want in filled("g").items():
        np.testing.assert_allclose(found[field], want, rtol=0, atol=1e-4 * np.abs(want).max(), err_msg=field)
