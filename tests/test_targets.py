"""What a method touches: patterns, letters, and the errors that keep a mistake from being silent."""

import jax
import jax.numpy as jnp
import pytest

import jpeft
from jpeft._node import Node


def leaf(*shape):
    return jnp.ones(shape)


@pytest.fixture
def params():
    layer = lambda: {"query": {"kernel": leaf(4, 4), "bias": leaf(4)}, "up": {"kernel": leaf(4, 8)}}
    ends = {"embed": {"embedding": leaf(9, 4)}, "lm_head": {"kernel": leaf(4, 9)}}
    return ends | {"layers_0": layer(), "layers_1": layer()}


def nodes(params):
    found = jax.tree_util.tree_leaves_with_path(params, is_leaf=lambda x: isinstance(x, Node))
    return ["/".join(k.key for k in path) for path, x in found if isinstance(x, Node)]


def test_default_is_every_kernel_but_the_head(params):
    assert nodes(jpeft.lora(params, rank=2)) == [f"layers_{n}/{m}/kernel" for n in (0, 1) for m in ("query", "up")]


@pytest.mark.parametrize(
    "targets",
    [
        r".*/query/kernel",
        [r"layers_0/query/.*kernel", r"layers_1/query/kernel"],
        lambda path, x: path.endswith("query/kernel") and x.shape == (4, 4),
        {r".*query/kernel": "io"},
    ],
)
def test_targets(params, targets):
    assert nodes(jpeft.lora(params, rank=2, targets=targets)) == ["layers_0/query/kernel", "layers_1/query/kernel"]


def test_every_pattern_must_match(params):
    with pytest.raises(ValueError, match=r"'\.\*/qery/kernel' matches no parameter") as e:
        jpeft.lora(params, rank=2, targets=[r".*/qery/kernel", r".*/query/kernel", r"nothing"])
    assert "layers_0/query/kernel" in str(e.value), "no near-miss"
    assert "'nothing' matches no parameter" in str(e.value), "only the first fault was reported"
    assert "embed/embedding" in str(e.value), "no name that does exist"


def test_a_pattern_must_match_the_whole_path(params):
    with pytest.raises(ValueError, match="must match the whole name"):
        jpeft.lora(params, rank=2, targets="query")


def test_a_predicate_must_pick_something(params):
    with pytest.raises(ValueError, match="picks no parameter"):
        jpeft.lora(params, rank=2, targets=lambda path, x: False)


def test_options_by_pattern(params):
    tuned = jpeft.lora(params, rank={r".*query.*": 3, r".*": 2}, alpha={r".*up.*": 8.0, ".*": None})
    assert tuned["layers_0"]["query"]["kernel"].a.shape == (4, 3)
    assert tuned["layers_1"]["up"]["kernel"].a.shape == (4, 2)
    assert (tuned["layers_0"]["query"]["kernel"].scale, tuned["layers_0"]["up"]["kernel"].scale) == (1.0, 4.0)


def test_an_option_pattern_must_match(params):
    with pytest.raises(ValueError, match="target of the option `rank`"):
        jpeft.lora(params, rank={r".*qery.*": 3, r".*": 2})
    with pytest.raises(ValueError, match="says nothing of the target 'layers_0/up/kernel'"):
        jpeft.lora(params, rank={r".*query.*": 3})


def test_ambiguous_kernels_raise_with_letters_and_the_call_that_settles_them(params):
    params["heads"] = {"kernel": leaf(4, 2, 2)}
    with pytest.raises(ValueError, match=r"heads/kernel: \(4, 2, 2\)") as e:
        jpeft.lora(params, rank=2)
    assert "jpeft.sites(model" in str(e.value)
    assert "'sio'" in str(e.value)
    tuned = jpeft.lora(params, rank=2, targets={"heads/kernel": "ioo"})
    assert tuned["heads"]["kernel"].b.shape == (2, 4)


@pytest.mark.parametrize("letters", ["io", "ixo", "ioos"])
def test_letters_that_cannot_be(params, letters):
    params["heads"] = {"kernel": leaf(4, 2, 2)}
    with pytest.raises(ValueError, match=f"its axes cannot be '{letters}'"):
        jpeft.lora(params, rank=2, targets={"heads/kernel": letters})


def test_a_model_without_kernels():
    with pytest.raises(ValueError, match="matches no parameter"):
        jpeft.lora({"embed": {"embedding": leaf(3, 4)}})


@pytest.mark.parametrize("late", [jpeft.int8(), jpeft.nf4(), jpeft.unfreeze(targets=r".*/kernel")])
@pytest.mark.parametrize("early", [jpeft.lora(rank=2), jpeft.int8(), jpeft.unfreeze(targets=r"layers.*kernel")])
def test_what_keeps_no_base_cannot_come_second(params, early, late):
    with pytest.raises(ValueError, match="Apply this one first") as e:
        late(early(params))
    assert "layers_0/query/kernel: " in str(e.value)
    assert "layers_1/up/kernel: " in str(e.value), "only the first fault was reported"


def test_an_unknown_option_raises_at_once():
    with pytest.raises(TypeError, match="rnak"):
        jpeft.lora(rnak=3)


def test_an_unknown_module_raises_with_those_there_are(params):
    with pytest.raises(ValueError, match=r"'layers_0/upp' matches no module\. Near: layers_0/up"):
        jpeft.bottleneck(params, targets="layers_0/upp")


def test_a_module_without_features_asks_for_sites(params):
    with pytest.raises(ValueError, match=r"jpeft\.sites"):
        jpeft.bottleneck(params, targets="layers_0")
