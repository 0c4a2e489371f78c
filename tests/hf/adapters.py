"""What tests/fixtures/make_adapters.py has written: tiny models of transformers, and adapters of PEFT on them."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

import jpeft


HERE = Path(__file__).parents[1] / "fixtures" / "adapters"
ARCHITECTURES = sorted(path.stem for path in HERE.glob("*.safetensors") if "-" not in path.stem)
CASES = sorted(path.stem for path in HERE.glob("*-*.safetensors"))
# What is not read, and the reason.
TIED = ["gpt2-lora-embedding", "gpt2-dora-embedding", "t5-lora-embedding", "t5-dora-embedding"]
REFUSED = {**dict.fromkeys(TIED, "the output head is tied to this table"), "t5-prefix": "several layers"}
READ = [case for case in CASES if case not in REFUSED]
WITH_TASKS = ("mpt", "poly", "poly-splits")
STEPS = 10


@functools.cache
def stored(name):
    """The arrays and the metadata of a fixture."""
    with safe_open(HERE / f"{name}.safetensors", "numpy") as file:
        return {key: file.get_tensor(key) for key in list(file.keys())}, file.metadata()


def parts(arrays, prefix):
    return {name.removeprefix(prefix): x for name, x in arrays.items() if name.startswith(prefix)}


def write_base(directory, name):
    """A checkpoint's directory."""
    arrays, metadata = stored(name)
    directory.mkdir(parents=True, exist_ok=True)
    own = {n: x for n, x in arrays.items() if n not in ("logits", "targets") and not n.startswith("inputs/")}
    save_file(own, directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(metadata["config"])
    return directory


def write_adapter(directory, name, tensors=None, **fields):
    """An adapter's directory: that of a case, with other tensors and fields of the config where they are given."""
    directory.mkdir(parents=True, exist_ok=True)
    save_file(adapter(name) if tensors is None else tensors, directory / "adapter_model.safetensors", {"format": "pt"})
    (directory / "adapter_config.json").write_text(json.dumps(config(name) | fields))
    return directory


def adapter(name):
    arrays, _ = stored(name)
    return {n: x for n, x in arrays.items() if n != "logits" and not n.startswith("after/")}


def after(name):
    """The tensors after ten steps: of those that have not changed a fixture has one copy."""
    return adapter(name) | parts(stored(name)[0], "after/")


def config(name):
    return json.loads(stored(name)[1]["adapter_config"])


def read_by_peft(name):
    """The tensors of a case, without the rows for a decoder, which PEFT writes in prompts and never reads."""
    fields, tensors = config(name), adapter(name)
    if fields.get("num_transformer_submodules") == 2:
        tensors["prompt_embeddings"] = tensors["prompt_embeddings"][: fields["num_virtual_tokens"]]
    return tensors


def read_json(path):
    return json.loads(path.read_text())


def read_config(directory):
    return read_json(directory / "adapter_config.json")


def inputs(name):
    """What a model is called with. Where an adapter is of several tasks, of the second."""
    found = {n: jnp.asarray(x) for n, x in parts(stored(name.partition("-")[0])[0], "inputs/").items()}
    return found | ({"task_ids": jnp.ones(2, jnp.int32)} if name.partition("-")[2] in WITH_TASKS else {})


def logits(model, params, given):
    return jpeft.apply(model, {"params": params}, **given)


def steps(model, params, given, targets, rate):
    """The tree after steps of plain gradient descent on the mean squared distance from the targets."""
    trainable, frozen = jpeft.partition(params)

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # ten steps are few
    def step(trainable):
        loss = lambda t: jnp.mean((logits(model, jpeft.combine(t, frozen), given) - targets) ** 2)
        return jax.tree.map(lambda x, g: x - rate * g, trainable, jax.grad(loss)(trainable))

    for _ in range(STEPS):
        trainable = step(trainable)
    return jpeft.combine(trainable, frozen)


def same(found, wanted):
    """That tensors have the same names, shapes, dtypes and bytes."""
    assert found.keys() == wanted.keys()
    for name, x in wanted.items():
        assert (found[name].dtype, found[name].shape) == (x.dtype, x.shape), name
        assert found[name].tobytes() == np.ascontiguousarray(x).tobytes(), name
