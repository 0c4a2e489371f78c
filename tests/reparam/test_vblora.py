"""What is known of VB-LoRA in closed form: its mixtures, its one bank, and what is left of it at rest."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal

import jpeft


WEIGHTS = {"up": normal(0, 6, 9), "down": normal(1, 9, 12)}
X = normal(2, 5, 6)


def model(params, x):
    return jnp.tanh(x @ params["up"]) @ params["down"]


def run(params):
    return jpeft.apply(model, params, X)


def tuned(**options):
    """VB-LoRA with a larger bank than it starts with."""
    params = jpeft.vblora(WEIGHTS, targets=".*", **{"rank": 2, "vectors": 8, "length": 3, **options})
    params["jpeft_shared"] = {"vblora_bank": jpeft.Free(array=normal(3, 8, 3))}
    return params


def test_all_vectors_are_a_softmax():
    params = tuned(top=8)
    node, bank = params["up"], params["jpeft_shared"]["vblora_bank"].array
    a = (jax.nn.softmax(node.logits_a) @ bank).reshape(2, 6).T
    b = (jax.nn.softmax(node.logits_b) @ bank).reshape(2, 9)
    np.testing.assert_allclose(jpeft.merge(params)["up"], WEIGHTS["up"] + a @ b, rtol=1e-5, atol=1e-5)


def test_one_vector_each_is_lora_of_rows_of_the_bank():
    params, which = tuned(), {"a": jnp.array([[1, 5], [0, 3]]), "b": jnp.array([[2, 2, 7], [6, 4, 1]])}
    one_hot = {f"logits_{side}": 100 * jax.nn.one_hot(n, 8) for side, n in which.items()}
    params["up"] = params["up"].replace(**one_hot)
    bank = params["jpeft_shared"]["vblora_bank"].array
    a, b = bank[which["a"]].reshape(2, 6).T, bank[which["b"]].reshape(2, 9)
    lora = jpeft.LoRA(base=WEIGHTS["up"], a=a, b=b, scale=1.0)
    np.testing.assert_allclose(run(params), run(params | {"up": lora}), rtol=1e-4, atol=1e-4)


def test_start():
    """The bank is within 0.02, logits are of deviation 0.1, and the model is nearly what it was."""
    params = jpeft.vblora({"w": normal(4, 512, 256)}, targets="w")
    node, bank = params["w"], params["jpeft_shared"]["vblora_bank"].array
    assert bank.shape == (256, 256) and 0.0199 < np.abs(bank).max() <= 0.02
    assert (node.logits_a.shape, node.logits_b.shape) == ((4, 2, 256), (4, 1, 256))
    np.testing.assert_allclose([np.mean(node.logits_a), np.std(node.logits_a)], [0, 0.1], atol=0.01)
    change = jpeft.merge(params)["w"] - node.base
    assert 0 < np.abs(change).max() < 4 * 0.02**2 + 1e-6


def test_only_what_is_chosen_has_gradients():
    """Two logits of a piece, and the vectors of the one bank, whose gradients are those of all nodes together."""
    trainable, frozen = jpeft.partition(tuned())
    loss = lambda t: jnp.sum(run(jpeft.combine(t, frozen)) ** 2)
    gradient = jax.grad(loss)(trainable)
    for name in WEIGHTS:
        for logits in (gradient[name].logits_a, gradient[name].logits_b):
            np.testing.assert_array_equal(np.sum(logits != 0, axis=-1), np.full(logits.shape[:-1], 2))
            np.testing.assert_allclose(jnp.sum(logits, axis=-1), jnp.zeros(logits.shape[:-1]), atol=1e-4)
    assert list(gradient["jpeft_shared"]) == ["vblora_bank"]
    assert np.any(gradient["jpeft_shared"]["vblora_bank"].array != 0)


@pytest.mark.parametrize("top", [2, 3])
def test_at_rest(top, tmp_path):
    """It computes the same, the bank alone trains, and files hold places of vectors, and shares of all but one."""
    params = tuned(top=top, dropout=0.5)
    rest = jpeft.vblora_choices(params)
    np.testing.assert_allclose(run(rest), run(params), rtol=1e-4, atol=1e-4)
    assert [x.shape for x in jax.tree.leaves(jpeft.partition(rest)[0])] == [(8, 3)]
    kept = {n: (x.dtype, x.shape) for n, x in vars(rest["down"]).items() if n.endswith("_b")}
    assert kept == {"choices_b": (jnp.uint8, (2, 4, top)), "shares_b": (jnp.float32, (2, 4, top - 1))}
    jpeft.save(tmp_path / "rest", rest)
    np.testing.assert_array_equal(run(jpeft.restore(tmp_path / "rest", WEIGHTS)), run(rest))


def test_half_precision_chooses_alike():
    """In a bfloat16 model the vectors are those of the merge, also where two logits are one in bfloat16."""
    params = jpeft.vblora({"w": jnp.zeros((64, 64), jnp.bfloat16)}, vectors=64, length=4, targets="w")
    node = params["w"]
    params["w"] = node.replace(logits_a=4 + node.logits_a, logits_b=4 + node.logits_b)
    found = jpeft.apply(lambda params, x: x @ params["w"], params, jnp.eye(64, dtype=jnp.bfloat16))
    want = np.asarray(jpeft.merge(params)["w"], np.float32)
    np.testing.assert_allclose(np.asarray(found, np.float32), want, rtol=0, atol=0.02 * np.abs(want).max())


def test_a_large_bank_has_larger_places():
    params = jpeft.vblora({"w": normal(4, 6, 3)}, vectors=257, length=3, targets="w")
    assert jpeft.vblora_choices(params)["w"].choices_a.dtype == jnp.uint32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 2}, r"does not divide these:\n  down: 9 inputs, 12 outputs, length=2\n  up: 6 inputs, 9 out"),
        ({"top": 1}, "mixes from 2 to vectors=8 vectors, not top=1"),
        ({"top": 9}, "not top=9"),
        ({"rank": 0}, "rank of at least 1"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        tuned(**options)


def test_nothing_to_lay_to_rest():
    with pytest.raises(ValueError, match="no VBLoRA node"):
        jpeft.vblora_choices(jpeft.lora(WEIGHTS, targets=".*"))
