"""Which parameters `last_layers` takes for layers, by their names."""

import jax
import jax.numpy as jnp
import pytest

import jpeft
from jpeft._targets import named_leaves


W, V = jnp.ones((4, 4)), jnp.ones(4)
DENSE = {"kernel": W, "bias": V}
STACKED = {"kernel": jnp.ones((3, 4, 4)), "bias": jnp.ones((3, 4))}


def of_last(tree, **options):
    """What trains, by path: its shape."""
    trainable, _ = jpeft.partition(jpeft.last_layers(tree, **options))
    return {name: x.shape for name, node in named_leaves(trainable).items() for x in jax.tree.leaves(node)}


def test_every_stack_has_its_own_last():
    tree = {
        "encoder": {f"layers_{n}": DENSE for n in range(12)},
        "decoder": {f"block_{n}": DENSE for n in range(3)},
        "norm": V,
    }
    want = {"encoder/layers_10", "encoder/layers_11", "decoder/block_1", "decoder/block_2"}
    assert set(of_last(tree, k=2)) == {f"{layer}/{name}" for layer in want for name in DENSE}


@pytest.mark.parametrize(
    ("tree", "trains"),
    [
        ({"h": {str(n): DENSE for n in range(3)}, "ln_f": DENSE}, {"h/2": W.shape}),
        ({"TransformerBlock_0": DENSE, "TransformerBlock_1": DENSE, "Dense_0": DENSE}, {"TransformerBlock_1": W.shape}),
        # blocks within layers are no layers
        ({f"encoderblock_{n}": {"MlpBlock_0": DENSE} for n in range(3)}, {"encoderblock_2/MlpBlock_0": W.shape}),
        (
            {"block": {str(n): {"layer": {"0": DENSE, "1": DENSE}} for n in range(3)}},
            {"block/2/layer/0": W.shape, "block/2/layer/1": W.shape},
        ),
        (
            {"layers": {"block_0": STACKED, "block_1": STACKED}},
            {"layers/block_0": (1, 4, 4), "layers/block_1": (1, 4, 4)},
        ),
        # stacked by `nn.scan`, with a name of Flax's own, whose number is not a layer's
        ({"ScanDecoderLayer_0": STACKED, "Embed_0": {"embedding": W}}, {"ScanDecoderLayer_0": (1, 4, 4)}),
        # a layer that is no stack of them
        ({"layers": STACKED, "output_layer": DENSE, "embedding_layer": {"embedding": W}}, {"layers": (1, 4, 4)}),
    ],
    ids=["h", "class names", "blocks in blocks", "layers in blocks", "blocks in a scan", "Scan", "output_layer"],
)
def test_names_of_layers(tree, trains):
    found = of_last(tree, k=1)
    assert {name.removesuffix("/kernel"): shape for name, shape in found.items() if name.endswith("/kernel")} == trains
    assert len(found) == 2 * len(trains)


def test_names_of_ones_own():
    tree = {"stage1": DENSE, "stage2": DENSE, "layers_0": DENSE}
    assert set(of_last(tree, k=1, pattern=r"(?P<stack>stage)(?P<layer>\d+)/.*")) == {"stage2/kernel", "stage2/bias"}
    assert of_last({"deep": STACKED}, k=2, pattern=r"(?P<stack>deep)/.*") == {
        "deep/kernel": (2, 4, 4),
        "deep/bias": (2, 4),
    }


NUMBERED = {f"layers_{n}": DENSE for n in range(3)}


@pytest.mark.parametrize(
    ("tree", "options", "message"),
    [
        (NUMBERED, {"k": 0}, r"No target is in the layers \[\]: the stacks have \{'layers_': 3\}"),
        (NUMBERED, {"k": 4}, r"has the layers \[-4\]: the stacks have \{'layers_': \[0, 1, 2\]\}"),
        ({"layers": STACKED}, {"k": 4}, r"has the layers \[-4\]: the stacks have \{'layers': \[0, 1, 2\]\}"),
        ({"dense": DENSE}, {"k": 1}, "matches no layer.*There are 2: dense/bias, dense/kernel"),
        (NUMBERED, {"k": 1, "pattern": r"(?P<stack>block)_\d/.*"}, "matches no layer"),
        (NUMBERED, {"k": 1, "pattern": r"layers_\d/.*"}, r"needs a group `\(\?P<stack>"),
        (
            {"layers": STACKED | {"scale": jnp.ones(4)}},
            {"k": 1},
            r"'layers/scale' has 4 places along axis 0, others of 'layers' 3",
        ),
        (jpeft.int8(NUMBERED), {"k": 1}, r"layers_2/kernel: Int8.*Apply this one first"),
        (
            jpeft.int8({"layers": STACKED}, targets={"layers/kernel": "sio"}),
            {"k": 1},
            "layers/kernel: Int8",
        ),
    ],
)
def test_refuses(tree, options, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        jpeft.last_layers(tree, **options)


def test_layers_of_some_stacks():
    """Those that hold no target need not have them."""
    tree = {"encoder": {f"layers_{n}": DENSE for n in range(4)}, "decoder": {f"layers_{n}": DENSE for n in range(2)}}
    trainable, _ = jpeft.partition(jpeft.unfreeze(tree, targets="encoder/.*/kernel", layers=[3, 0, -1]))
    found = {name for name, node in named_leaves(trainable).items() if jax.tree.leaves(node)}
    assert found == {"encoder/layers_0/kernel", "encoder/layers_3/kernel"}
    with pytest.raises(ValueError, match=r"has the layers \[3, -3\]: the stacks have \{'decoder/layers_': \[0, 1\]"):
        jpeft.unfreeze(tree, targets=".*/kernel", layers=[3, 1, -3])
    with pytest.raises(ValueError, match=r"No target is in the layers \[1\]"):
        jpeft.unfreeze(tree, targets="encoder/layers_0/.*", layers=[1])
    with pytest.raises(ValueError, match=r"'norm/scale' matches no parameter"):
        jpeft.unfreeze(tree | {"norm": {"scale": V}}, targets="norm/scale", layers=[1])


def test_nodes_in_other_layers_stay():
    tuned = jpeft.last_layers(jpeft.int8(NUMBERED, targets="layers_[01]/kernel"), k=1)
    assert isinstance(tuned["layers_0"]["kernel"], jpeft.Int8) and isinstance(tuned["layers_2"]["kernel"], jpeft.Free)


@pytest.mark.parametrize("select", [jpeft.last_layers(k=3), jpeft.unfreeze(targets=".*", layers=[0, 1])])
def test_layers_numbered_from_one_have_no_zeroth(select):
    params = {f"layer{n}": {"kernel": jnp.ones((2, 2))} for n in (1, 2)}
    with pytest.raises(ValueError, match=r"the stacks have \{'layer': \[1, 2\]\}"):
        select(params)
    assert jpeft.summary(jpeft.last_layers(params, k=2)).trainable == 8
