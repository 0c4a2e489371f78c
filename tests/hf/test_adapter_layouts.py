"""Adapters of separate layers and kernels in trees that have them stacked and joined, and back."""

import adapters
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import jpeft
from jpeft import hf


KINDS = {"scan": {"scan": True}, "fused": {"fused": True}, "both": {"scan": True, "fused": True}}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The Llama, its layers stacked, its kernels joined, and both."""
    directory = adapters.write_base(tmp_path_factory.mktemp("layouts"), "llama")
    return {kind: hf.load(directory, **options)[:2] for kind, options in KINDS.items()}


def agrees(model, params, case):
    found = adapters.logits(model, params, adapters.inputs(case))
    np.testing.assert_allclose(found, adapters.stored(case)[0]["logits"], rtol=1e-5, atol=1e-5)


def out(directory, model, params):
    hf.save_adapter(directory, params, model=model)
    return load_file(directory / "adapter_model.safetensors")


STACKED = [
    "lora", "lora-many", "lora-lora-bias", "lora-modules", "lora-embedding", "dora", "adalora", "ia3", "vera", "loha",
    "lokr", "oft", "boft", "hra", "miss", "hira", "beft", "norms", "prefix", "prompt", "shira", "fourierft", "c3a",
    "road", "randlora", "delora", "gralora-hybrid", "vblora", "vblora-chosen", "tinylora",
    "poly", "poly-splits",
]  # fmt: skip


@pytest.mark.parametrize("method", STACKED)
def test_stacked_layers(method, models, tmp_path):
    (model, params), case = models["scan"], f"llama-{method}"
    tuned = hf.load_adapter(adapters.write_adapter(tmp_path / "in", case), params, model=model)
    agrees(model, tuned, case)
    adapters.same(out(tmp_path / "out", model, tuned), adapters.adapter(case))


def test_a_layer_without_lora_gets_zeros_that_stay(models, tmp_path):
    model, params = models["scan"]
    tensors = {name: x for name, x in adapters.adapter("llama-lora").items() if ".layers.1." in name}
    directory = adapters.write_adapter(tmp_path / "in", "llama-lora", tensors, layers_to_transform=[1])
    tuned = hf.load_adapter(directory, params, model=model)
    assert not np.any(tuned["layers"]["attention"]["query"]["kernel"].a[0])
    targets = adapters.stored("llama")[0]["targets"]
    after = adapters.steps(model, tuned, adapters.inputs("llama"), targets, 0.01)
    found = out(tmp_path / "out", model, after)
    assert found.keys() == tensors.keys() and any(np.any(found[name] != tensors[name]) for name in tensors)


@pytest.mark.parametrize("method", ["dora", "hira"])
def test_a_layer_without_another_method_is_refused(method, models, tmp_path):
    model, params = models["scan"]
    tensors = {name: x for name, x in adapters.adapter(f"llama-{method}").items() if ".layers.1." in name}
    directory = adapters.write_adapter(tmp_path, f"llama-{method}", tensors, layers_to_transform=[1])
    with pytest.raises(ValueError, match=r"some of the layers alone.*without `scan`"):
        hf.load_adapter(directory, params, model=model)


def test_vectors_that_layers_share_otherwise_are_refused(models, tmp_path):
    model, params = models["scan"]
    directory = adapters.write_adapter(tmp_path, "llama-tinylora-tied")
    with pytest.raises(ValueError, match=r"different kinds of TinyLoRA"):
        hf.load_adapter(directory, params, model=model)


def test_a_parameter_that_trains_in_one_layer_is_refused(models, bases, tmp_path):
    """Where layers are one array, all of them would train."""
    plain, own = bases["llama"]
    name, ones = "layers.0.input_layernorm", np.ones(16, np.float32)
    tensors = adapters.adapter("llama-lora") | {f"base_model.model.model.{name}.weight": ones}
    directory = adapters.write_adapter(tmp_path, "llama-lora", tensors, modules_to_save=[name])
    layer = hf.load_adapter(directory, own, model=plain)["layers_0"]
    np.testing.assert_array_equal(layer["attention_norm"]["scale"].array, ones)
    model, params = models["scan"]
    with pytest.raises(ValueError, match=r"layers/attention_norm/scale: some of its parts train alone"):
        hf.load_adapter(directory, params, model=model)


def test_layers_of_different_ranks(models, bases, tmp_path):
    """One stack has them where their scale is the same."""
    model, params = models["scan"]
    alphas = {r".*\.1\..*": 4.5}  # of rank 3, as 3 of rank 2
    directory = adapters.write_adapter(tmp_path / "in", "llama-lora-patterns", alpha_pattern=alphas)
    tuned = hf.load_adapter(directory, params, model=model)
    assert tuned["layers"]["attention"]["query"]["kernel"].a.shape == (2, 16, 3)
    adapters.same(out(tmp_path / "out", model, tuned), adapters.adapter("llama-lora-patterns"))
    plain, own = bases["llama"]
    given = adapters.inputs("llama")
    wanted = adapters.logits(plain, hf.load_adapter(directory, own, model=plain), given)
    np.testing.assert_allclose(adapters.logits(model, tuned, given), wanted, rtol=1e-5, atol=1e-5)
    directory = adapters.write_adapter(tmp_path / "other", "llama-lora-patterns")
    with pytest.raises(ValueError, match=r"different scales.*without `scan`"):
        hf.load_adapter(directory, params, model=model)


@pytest.mark.parametrize("kind", ["fused", "both"])
@pytest.mark.parametrize("method", ["lora", "lora-many", "lora-lora-bias"])
def test_joined_kernels(kind, method, models, bases, tmp_path):
    """Ranks add up on the way in; out of it comes an adapter that does the same to separate kernels."""
    (model, params), case = models[kind], f"llama-{method}"
    tuned = hf.load_adapter(adapters.write_adapter(tmp_path / "in", case), params, model=model)
    agrees(model, tuned, case)
    found = out(tmp_path / "out", model, tuned)
    factor = "base_model.model.model.layers.0.self_attn.{}.lora_A.weight"
    np.testing.assert_array_equal(found[factor.format("q_proj")], found[factor.format("v_proj")])
    plain, own = bases["llama"]
    agrees(plain, hf.load_adapter(tmp_path / "out", own, model=plain), case)


@pytest.mark.parametrize("first", ["float32", "bfloat16"])
def test_joined_kernels_keep_their_scales_and_their_digits(first, models, bases, tmp_path):
    """Of two scales, and of two types, one node loses nothing."""
    case, types = "llama-lora-lora-bias", {"q_proj": first, "v_proj": "float32"}
    tensors = {name: x.astype(jnp.dtype(types[name.split(".")[-3]])) for name, x in adapters.adapter(case).items()}
    directory = adapters.write_adapter(tmp_path, case, tensors, alpha_pattern={"v_proj": 7})

    def logits(model, params):
        return adapters.logits(model, hf.load_adapter(directory, params, model=model), adapters.inputs("llama"))

    np.testing.assert_allclose(logits(*models["fused"]), logits(*bases["llama"]), rtol=1e-5, atol=1e-5)


def test_joined_kernels_do_not_tell_whose_they_are(models, tmp_path):
    """Phi-3 has such in its files, under other names; a Llama has none."""
    params = jpeft.lora(models["fused"][1], rank=2)
    with pytest.raises(ValueError, match=r"llama.*phi3.*model="):
        hf.save_adapter(tmp_path / "out", params)


def test_other_methods_at_joined_kernels_are_refused(models, tmp_path):
    model, params = models["fused"]
    with pytest.raises(ValueError, match=r"as one kernel.*without `fused`"):
        hf.load_adapter(adapters.write_adapter(tmp_path / "in", "llama-hira"), params, model=model)
    with pytest.raises(ValueError, match="LoRA alone can be divided"):
        hf.save_adapter(tmp_path / "out", jpeft.hira(params, rank=2, targets=".*qkv/kernel"), model=model)


def test_a_stack_of_experts(tmp_path):
    """Two stacked axes: layers, and experts in them."""
    model, params, _ = hf.load(adapters.write_base(tmp_path / "base", "mixtral"), scan=True)
    tuned = hf.load_adapter(adapters.write_adapter(tmp_path / "in", "mixtral-experts"), params, model=model)
    assert tuned["layers"]["moe"]["experts"]["down"].a.shape == (2, 3, 24, 2)
    found = adapters.logits(model, tuned, adapters.inputs("mixtral"))
    np.testing.assert_allclose(found, adapters.stored("mixtral-experts")[0]["logits"], rtol=1e-5, atol=1e-5)
    adapters.same(out(tmp_path / "out", model, tuned), adapters.adapter("mixtral-experts"))
    jax.tree.map(np.testing.assert_array_equal, jpeft.strip(tuned), params)
