"""X-LoRA: that of PEFT, and what it comes to where a weight is one, or there is one adapter."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

import jpeft
from jpeft._tree import map_nodes, nodes_of
from jpeft.testing import shaken, subject


FIXTURES = Path(__file__).parents[1] / "fixtures"
PEFT = np.load(FIXTURES / "xlora/peft.npz")
IDS = jnp.asarray(PEFT["ids"], jnp.int32)
CASES = {
    "linear": {},
    "deep": {"depth": 3, "width": 5, "temperature": 0.7, "scale": 1.5},
    "top": {"top": 1},
    "top_softmax": {"top": 2, "renormalize": True},
}


@pytest.fixture(scope="module", params=[False, True], ids=["unrolled", "scanned"])
def llama(request, tmp_path_factory):
    """The model, the LoRAs as PEFT has saved them, and its sites."""
    directory = tmp_path_factory.mktemp("llama")
    with safe_open(FIXTURES / "adapters/llama.safetensors", "numpy") as file:
        own = [n for n in list(file.keys()) if n.startswith(("model.", "lm_head."))]
        save_file({n: file.get_tensor(n) for n in own}, directory / "model.safetensors", {"format": "pt"})
        (directory / "config.json").write_text(file.metadata()["config"])
    model, params, _ = jpeft.hf.load(directory, scan=request.param)
    names = ("first", "second", "third")
    trees = [jpeft.hf.load_adapter(FIXTURES / "xlora" / name, params, model=model) for name in names]
    return model, trees, jpeft.sites(model, {"params": params}, IDS)


@pytest.mark.parametrize("case", CASES)
def test_is_that_of_peft(case, llama):
    """Logits, and the gradients of the classifier."""
    model, trees, sites = llama
    tuned = jpeft.xlora(trees, sites=sites, **CASES[case])
    found = {n.removeprefix(f"{case}/p/"): PEFT[n] for n in PEFT.files if n.startswith(f"{case}/p/")}
    numbers = sorted({int(n.partition(".")[0]) for n in found})
    layers = tuple((jnp.asarray(found[f"{n}.weight"]).T, jnp.asarray(found[f"{n}.bias"])) for n in numbers)
    tuned = map_nodes(lambda x: x.replace(layers=layers), tuned, jpeft.XLoRA)
    trainable, frozen = jpeft.partition(tuned)
    assert len(jax.tree.leaves(trainable)) == 2 * len(numbers)  # nothing of the LoRAs

    def loss(trainable):
        y = jpeft.apply_xlora(model, {"params": jpeft.combine(trainable, frozen)}, IDS)
        return 0.5 * jnp.sum(y**2), y

    grads, y = jax.jit(jax.grad(loss, has_aux=True))(trainable)
    close(y, PEFT[f"{case}/y"], 1e-5)
    (node,) = nodes_of(grads, jpeft.XLoRA).values()
    for n, (kernel, bias) in zip(numbers, node.layers, strict=True):
        close(kernel.T, PEFT[f"{case}/g/{n}.weight"], 1e-4)
        close(bias, PEFT[f"{case}/g/{n}.bias"], 1e-4)


def close(found, want, tolerance):
    """Within `tolerance` of the largest entry."""
    np.testing.assert_allclose(found, want, rtol=0, atol=tolerance * max(np.abs(want).max(), 1e-2))


def tuned(count, kind=jpeft.lora, scan=False):
    model = subject("decoder", scan)
    trees = [jpeft.partition(kind(model.params, rank=2, sites=model.sites)) for _ in range(count)]
    return model, [jpeft.combine(shaken(t, jax.random.key(n), 0.3), f) for n, (t, f) in enumerate(trees)]


@pytest.mark.slow
def test_all_weight_on_one():
    """It is that adapter alone; and a single one, that times `scale`."""
    model, trees = tuned(3)
    params = jpeft.xlora(trees, sites=model.sites)
    bias = jnp.array([0.0, 0.0, 100.0])
    params = map_nodes(lambda x: x.replace(layers=((x.layers[0][0], bias),)), params, jpeft.XLoRA)
    found = jpeft.apply_xlora(model.model, {"params": params}, *model.args)
    np.testing.assert_allclose(found, model.run(trees[2]), atol=1e-5)
    halved = jpeft.xlora(trees[:1], scale=0.5, sites=model.sites)
    found = jpeft.apply_xlora(model.model, {"params": halved}, *model.args)
    expected = model.run(map_nodes(lambda x: x.replace(b=x.b / 2), trees[0], jpeft.LoRA))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_weights_are_of_the_model_alone():
    """Not of what adapters make of it: the first pass is without them."""
    model, trees = tuned(2)
    params = jpeft.xlora(trees, depth=2, width=7, sites=model.sites)
    weights = gates(model, params)
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-6)
    assert np.ptp(weights, axis=1).max() > 1e-3  # tokens differ
    expected = jpeft.apply(model.model, {"params": params}, *model.args, adapters=weights)
    np.testing.assert_allclose(jpeft.apply_xlora(model.model, {"params": params}, *model.args), expected, atol=1e-5)


def gates(model, params):
    """Those of a text, by hand: of the last hidden states of the model without adapters."""
    (node,) = nodes_of(params, jpeft.XLoRA).values()
    _, state = model.model.apply({"params": model.params}, *model.args, capture_intermediates=True)
    return node.gates(state["intermediates"]["norm"]["__call__"][0], None)


def test_trains_and_restores(tmp_path):
    model, trees = tuned(2)
    params = jpeft.xlora(trees, sites=model.sites)
    trainable, frozen = jpeft.partition(params)
    run = lambda t: jpeft.apply_xlora(model.model, {"params": jpeft.combine(t, frozen)}, *model.args)
    grads = jax.grad(lambda t: jnp.mean(run(t) ** 2))(trainable)
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(grads))
    assert sum(x.size for x in jax.tree.leaves(trainable)) == (16 + 1) * 2
    jpeft.save(tmp_path / "adapters", params)
    back = jpeft.restore(tmp_path / "adapters", model.params)
    found = jpeft.apply_xlora(model.model, {"params": back}, *model.args)
    np.testing.assert_array_equal(found, jpeft.apply_xlora(model.model, {"params": params}, *model.args))


def test_refuses():
    model, trees = tuned(2)
    for how in ({"depth": 0}, {"top": 3}, {"temperature": 0.0}, {"dropout": 1.0}):
        with pytest.raises(ValueError, match="X-LoRA has at least one layer"):
            jpeft.xlora(trees, sites=model.sites, **how)
    with pytest.raises(ValueError, match="Which module returns the last hidden states"):
        jpeft.xlora(trees, sites=model.sites, targets=["norm", "layers_0"])
    params = jpeft.xlora(trees, sites=model.sites)
    with pytest.raises(ValueError, match="Which adapters"):
        model(params)
    with pytest.raises(ValueError, match="has two caches"):
        jpeft.apply_xlora(model.model, {"params": params}, model.args[0], cache=model.model.init_cache(2, 8))
    with pytest.raises(ValueError, match=r"no XLoRA node.*jpeft\.xlora"):
        jpeft.apply_xlora(model.model, {"params": jpeft.stack(trees)}, *model.args)


@pytest.mark.parametrize("scan", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_most_probable_tokens(scan):
    """Those of the whole text, computed anew for each, behind padding and in pieces."""
    model, trees = tuned(2, scan=scan)
    params, net = {"params": jpeft.xlora(trees, sites=model.sites)}, model.model
    run = jax.jit(lambda ids, mask, caches: jpeft.apply_xlora(net, params, ids, mask, cache=caches))
    anew = jax.jit(lambda ids, mask: jpeft.apply_xlora(net, params, ids, mask))
    ids, mask = jnp.array([[3, 1, 4, 1, 5], [0, 0, 9, 2, 6]]), jnp.array([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    empty, new, found, whole = net.init_cache(2, 12), ids, [], ids
    caches, seen = (empty, empty), mask
    for _ in range(6):
        logits, caches = run(new, seen, caches)
        new, seen = jnp.argmax(logits[:, -1:], -1).astype(jnp.int32), jnp.ones((2, 1), jnp.int32)
        found.append(new)
    for n in range(6):
        longer = jnp.pad(mask, [(0, 0), (0, n)], constant_values=1)
        whole = jnp.concatenate([whole, jnp.argmax(anew(whole, longer)[:, -1:], -1).astype(jnp.int32)], axis=1)
    assert jnp.concatenate(found, axis=1).tolist() == whole[:, 5:].tolist()
    assert len({tuple(row) for row in whole[:, 5:].T.tolist()}) > 2


def test_goes_with_a_prompt_in_the_base():
    """Its positions have weights of their own."""
    model, trees = tuned(2)
    params = jpeft.prompt(jpeft.xlora(trees, sites=model.sites), length=3)
    bias = jnp.array([0.0, 100.0])
    params = map_nodes(lambda x: x.replace(layers=((x.layers[0][0], bias),)), params, jpeft.XLoRA)
    found = jpeft.apply_xlora(model.model, {"params": params}, *model.args)
    alone = jpeft.apply(model.model, {"params": params}, *model.args, adapters=1, allow_unused=True)
    np.testing.assert_allclose(found, alone, atol=1e-5)
