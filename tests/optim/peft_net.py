"""The small model that the optimizers of Hugging Face's PEFT have trained: fixtures/make_optim.py."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jpeft


FIXTURES = Path(__file__).parents[1] / "fixtures"
FIXTURE = np.load(FIXTURES / "optim/peft.npz")
STEPS = 6
FIELDS = {"lora_A": "a", "lora_B": "b", "lora_magnitude_vector": "magnitude"}
FIELDS |= {"lora_embedding_A": "a", "lora_embedding_B": "b", "base_layer": "bias"}


def net(params, ids):
    dense = lambda x, layer: x @ layer["kernel"] + layer["bias"][None, None]
    return dense(jnp.tanh(dense(params["table"]["embedding"][ids], params["one"])), params["two"])


def base(case):
    """The model's parameters, in a case."""
    array = lambda name: jnp.asarray(FIXTURE[f"{case}/base/{name}"])
    dense = lambda name: {"kernel": array(f"{name}.weight").T, "bias": array(f"{name}.bias")}
    return {"table": {"embedding": array("table.weight")}, "one": dense("one"), "two": dense("two")}


def arrays(case, when):
    """What trains, at the `start` or the `end`: by module, and field or parameter."""
    prefix = f"{case}/{when}/"
    for name in (name.removeprefix(prefix) for name in FIXTURE if name.startswith(prefix)):
        module, kind, *_ = name.split(".")
        yield module, FIELDS[kind], jnp.asarray(FIXTURE[prefix + name]).T


def at(params, module, field):
    """The array of `params` that PEFT has there."""
    if field == "bias":
        return params[module]["bias"].array
    return getattr(params[module]["embedding" if module == "table" else "kernel"], field)


def start(case, tuned):
    """The tree of a method, with the arrays that PEFT started from."""
    for module, field, x in arrays(case, "start"):
        name = "bias" if field == "bias" else "embedding" if module == "table" else "kernel"
        node = jpeft.Free(array=x) if field == "bias" else tuned[module][name].replace(**{field: x})
        tuned = tuned | {module: tuned[module] | {name: node}}
    return tuned


def train(case, tuned, tx):
    """The losses of PEFT's steps, and the tree after them."""
    ids = jnp.asarray(FIXTURE[f"{case}/ids"])
    trainable, frozen = jpeft.partition(tuned)

    @jax.jit
    def step(trainable, state):
        loss = lambda t: jnp.square(jpeft.apply(net, jpeft.combine(t, frozen), ids)).sum() / 2
        value, grads = jax.value_and_grad(loss)(trainable)
        updates, state = tx.update(grads, state, trainable, frozen=frozen)
        return optax.apply_updates(trainable, updates), state, value

    state, losses = tx.init(trainable), []
    for _ in range(STEPS):
        trainable, state, value = step(trainable, state)
        losses.append(value)
    return np.array(losses), jpeft.combine(trainable, frozen)


def check(case, tuned, tx):
    """Losses and arrays are those of PEFT."""
    losses, after = train(case, start(case, tuned), tx)
    np.testing.assert_allclose(losses, FIXTURE[f"{case}/losses"], rtol=1e-5)
    for module, field, x in arrays(case, "end"):
        np.testing.assert_allclose(at(after, module, field), x, rtol=1e-5, atol=1e-5, err_msg=f"{module} {field}")
