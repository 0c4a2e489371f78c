"""Adapters of Hugging Face's PEFT, in and out: every type on every architecture that PEFT has it for."""

import adapters
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapters import ARCHITECTURES, CASES, READ, REFUSED
from safetensors.numpy import load_file

import jpeft
from jpeft import hf


@pytest.fixture
def loaded(request, bases, tmp_path):
    """A case by name, its model, and the tree with its adapter in it."""
    case = request.param
    model, params = bases[case.partition("-")[0]]
    return case, model, hf.load_adapter(adapters.write_adapter(tmp_path / "in", case), params, model=model)


def written(directory, model, params, case):
    """The tensors and the config that a tree's adapter is written as."""
    hf.save_adapter(directory, params, model=model, task_type=adapters.config(case).get("task_type"))
    return load_file(directory / "adapter_model.safetensors"), adapters.read_config(directory)


@pytest.mark.parametrize("loaded", READ, indirect=True)
def test_logits_are_those_of_peft(loaded):
    case, model, params = loaded
    found = adapters.logits(model, params, adapters.inputs(case))
    np.testing.assert_allclose(found, adapters.stored(case)[0]["logits"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("loaded", READ, indirect=True)
def test_in_and_out_is_equal_to_the_byte(loaded, tmp_path):
    case, model, params = loaded
    found, _ = written(tmp_path / "out", model, params, case)
    adapters.same(found, adapters.read_by_peft(case))


@pytest.mark.parametrize("case", REFUSED)
def test_what_peft_does_otherwise_is_refused(case, bases, tmp_path):
    model, params = bases[case.partition("-")[0]]
    with pytest.raises(ValueError, match=REFUSED[case]):
        hf.load_adapter(adapters.write_adapter(tmp_path, case), params, model=model)


CONFIGS = {
    "llama-lora-many": {"r": 2, "lora_alpha": 3, "use_rslora": True},
    "llama-lora-patterns": {"r": 2, "lora_alpha": 3, "alpha_pattern": {"v_proj": 5}, "use_rslora": False},
    "llama-dora": {"use_dora": True},
    "llama-lora-lora-bias": {"lora_bias": True},
    "llama-lora-embedding": {"target_modules": ["embed_tokens", "q_proj", "v_proj"]},
    "llama-lora-tokens": {"trainable_token_indices": {"model.embed_tokens": [3, 5, 9]}},
    "gpt2-lora": {"fan_in_fan_out": True, "target_modules": ["c_attn"]},
    "bert-lora-bias-all": {"bias": "all"},
    "bert-lora-bias-only": {"bias": "lora_only"},
    "bert-lora-modules": {"modules_to_save": ["classifier"], "target_modules": ["query", "value"]},
    "t5-lora-modules": {"modules_to_save": ["decoder.final_layer_norm", "encoder.final_layer_norm"]},
    "mixtral-experts": {"target_parameters": ["down_proj", "gate_up_proj"], "target_modules": ["q_proj"]},
    "llama-adalora": {"init_r": 3, "lora_alpha": 4},
    "llama-vera": {"r": 3, "save_projection": True},
    "llama-loha": {"r": 2, "alpha": 3},
    "llama-lokr-both": {"r": 1, "alpha": 3, "decompose_both": True, "decompose_factor": 4},
    "llama-oft-cayley": {"oft_block_size": 4, "block_share": True, "use_cayley_neumann": False},
    "llama-boft": {"boft_block_size": 4, "boft_n_butterfly_factor": 1},
    "llama-hra": {"r": 4, "apply_GS": False},
    "llama-tokens": {"token_indices": [3, 5, 9]},
    "llama-prompt": {"num_virtual_tokens": 3, "token_dim": 16, "task_type": "CAUSAL_LM"},
    "llama-prefix": {"num_virtual_tokens": 3, "token_dim": 8, "num_attention_heads": 2, "num_layers": 2},
    "t5-prompt": {"task_type": "SEQ_2_SEQ_LM"},
    "llama-mpt": {"num_tasks": 2, "num_ranks": 1},
    "llama-poly-splits": {"r": 2, "n_tasks": 2, "n_skills": 3, "n_splits": 4},
    "llama-shira": {"r": 1},
    "llama-fourierft": {"n_frequency": 6, "scaling": 20, "random_loc_seed": 777},
    "bert-fourierft": {"random_loc_seed": 2024},
    "llama-c3a": {"block_size": 4, "block_size_pattern": {"v_proj": 8}},
    "llama-road-two": {"variant": "road_2", "group_size": 4},
    "llama-road-four": {"variant": "road_4", "group_size": 8},
    "llama-randlora": {"r": 6, "randlora_alpha": 3, "save_projection": True},
    "llama-delora": {"r": 2, "rank_pattern": {"v_proj": 3}},
    "llama-gralora-hybrid": {"r": 4, "alpha": 6, "hybrid_r": 2, "gralora_k": 2},
    "llama-vblora": {"r": 2, "topk": 2, "num_vectors": 5, "vector_length": 8, "save_only_topk_weights": False},
    "llama-vblora-chosen": {"topk": 2, "num_vectors": 5, "save_only_topk_weights": True},
    "llama-tinylora": {"r": 1, "u": 2, "weight_tying": 0.0, "save_projection": True},
    "llama-tinylora-tied": {"r": 2, "u": 3, "target_modules": ["embed_tokens", "q_proj", "v_proj"]},
}


@pytest.mark.parametrize("loaded", CONFIGS, indirect=True)
def test_the_fields_that_matter_are_kept(loaded, tmp_path):
    case, model, params = loaded
    _, config = written(tmp_path / "out", model, params, case)
    assert config | CONFIGS[case] == config


def test_ranks_of_patterns_are_kept(bases, tmp_path):
    model, params = bases["llama"]
    params = hf.load_adapter(adapters.write_adapter(tmp_path / "in", "llama-lora-patterns"), params, model=model)
    _, config = written(tmp_path / "out", model, params, "llama-lora-patterns")
    assert config["rank_pattern"] == {
        r"model\.layers\.1\.self_attn\.q_proj": 3, r"model\.layers\.1\.self_attn\.v_proj": 3
    }  # fmt: skip


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_tree_tells_its_names(name, bases, tmp_path):
    case = next(case for case in CASES if case.startswith(f"{name}-"))
    model, params = bases[name]
    directory = adapters.write_adapter(tmp_path, case)
    given, guessed = hf.load_adapter(directory, params, model=model), hf.load_adapter(directory, params)
    assert jax.tree.structure(given) == jax.tree.structure(guessed)


def test_bert_and_roberta_are_not_told_apart_by_their_trees(bases, tmp_path):
    params = jpeft.lora(bases["bert"][1], rank=2)
    with pytest.raises(ValueError, match=r"bert; roberta.*model="):
        hf.save_adapter(tmp_path / "out", params)


def test_nodes_at_a_table_that_the_file_repeats_stay(bases, tmp_path):
    """PEFT writes a table beside what is put on it: the tree's own stands under the nodes that it has."""
    model, params = bases["llama"]
    path, at = adapters.write_adapter(tmp_path, "llama-lora-embedding"), "embed/embedding"
    sites = jpeft.sites(model, {"params": params}, **adapters.inputs("llama"))
    once = jpeft.lora(params, rank=3, targets=at, sites=sites)
    node = hf.load_adapter(path, once, model=model)["embed"]["embedding"]
    assert (node.a.shape[1], node.base.a.shape[1]) == (2, 3)
    np.testing.assert_array_equal(node.base.base, params["embed"]["embedding"])
    others = jax.tree.map(lambda x: x + 1, params)
    for tree in (jpeft.lora(others, rank=3, targets=at, sites=sites), jpeft.unfreeze(others, targets=at)):
        with pytest.raises(ValueError, match="the file has another embed/embedding"):
            hf.load_adapter(path, tree, model=model)


def test_pruned_adalora_keeps_its_places(bases, tmp_path):
    model, params = bases["llama"]
    tensors = adapters.adapter("llama-adalora")
    names = [(n, f"model.layers.{n}.self_attn.{p}.lora_E") for n in (0, 1) for p in ("q_proj", "v_proj")]
    kept = {name: [True, n == 0, False] for n, name in names}
    for name, mask in kept.items():
        at = f"base_model.model.{name.removesuffix('lora_E')}"
        tensors[f"{at}lora_A"], tensors[f"{at}lora_E"] = tensors[f"{at}lora_A"][mask], tensors[f"{at}lora_E"][mask]
        tensors[f"{at}lora_B"] = np.ascontiguousarray(tensors[f"{at}lora_B"][:, mask])
    directory = adapters.write_adapter(tmp_path / "in", "llama-adalora", tensors, rank_pattern=kept)
    params = hf.load_adapter(directory, params, model=model)
    node = params["layers_1"]["attention"]["query"]["kernel"]
    np.testing.assert_array_equal(node.mask, [True, False, False])
    assert node.scale == 4 / (3 + 1e-5)
    found, config = written(tmp_path / "out", model, params, "llama-adalora")
    adapters.same(found, tensors)
    assert (config["init_r"], config["rank_pattern"]) == (3, kept)


@pytest.mark.parametrize("version", ["0.18.1", "0.21.2"])
def test_experts_of_both_eras(version, bases, tmp_path):
    """Before 0.19 A was at the outputs of the experts' weights, and B at their inputs."""
    model, params = bases["mixtral"]
    tensors = adapters.adapter("mixtral-experts")
    if version < "0.19":
        for name in [name for name in tensors if "experts" in name and "lora_A" in name]:
            other = name.replace("lora_A", "lora_B")
            a, b = tensors[name].reshape(3, 2, -1), tensors[other].reshape(-1, 2, 3)
            tensors[name] = np.ascontiguousarray(np.moveaxis(b, (0, 1, 2), (2, 1, 0)).reshape(6, -1))
            tensors[other] = np.ascontiguousarray(np.moveaxis(a, (0, 1, 2), (2, 1, 0)).reshape(-1, 6))
    directory = adapters.write_adapter(tmp_path, "mixtral-experts", tensors, peft_version=version)
    found = adapters.logits(model, hf.load_adapter(directory, params, model=model), adapters.inputs("mixtral"))
    np.testing.assert_allclose(found, adapters.stored("mixtral-experts")[0]["logits"], rtol=1e-5, atol=1e-5)


def test_experts_one_by_one(bases, tmp_path):
    """As adapters had them for transformers 4: each expert's matrices are modules, gate and up apart."""
    model, params = bases["mixtral"]
    rng, tensors, merged = np.random.default_rng(0), {}, jax.tree.map(np.array, params)
    for e in range(3):
        for name, out, ins in (("w1", 24, 16), ("w3", 24, 16), ("w2", 16, 24)):
            a, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((2, ins), (out, 2)))
            at = f"base_model.model.model.layers.0.block_sparse_moe.experts.{e}.{name}"
            tensors |= {f"{at}.lora_A.weight": a, f"{at}.lora_B.weight": b}
            kernel = merged["layers_0"]["moe"]["experts"]["down" if name == "w2" else "gate_up"][e]
            kernel[:, {"w1": slice(24), "w3": slice(24, 48), "w2": slice(None)}[name]] += 1.5 * (b @ a).T
    own = {"target_parameters": None, "target_modules": ["w1", "w2", "w3"], "layers_to_transform": [0]}
    directory = adapters.write_adapter(tmp_path, "mixtral-experts", tensors, **own)
    params = jpeft.merge(hf.load_adapter(directory, params, model=model))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), params, merged)


@pytest.mark.parametrize("method", [jpeft.pissa, jpeft.olora])
def test_a_start_from_the_kernel_becomes_lora_of_twice_the_rank(method, bases, tmp_path):
    model, params = bases["llama"]
    tuned = method(params, rank=2, alpha=3, targets=".*(query|value)/kernel")
    move = lambda x: x + 0.1 if x is not None else None
    trainable, frozen = jpeft.partition(tuned)
    tuned = jpeft.combine(jax.tree.map(move, trainable), frozen)
    found, config = written(tmp_path / "out", model, tuned, "llama-lora")
    assert config["r"] == 4 and {x.shape for name, x in found.items() if "lora_A" in name} == {(4, 16)}
    again = hf.load_adapter(tmp_path / "out", params, model=model)
    given = adapters.inputs("llama")
    np.testing.assert_allclose(
        adapters.logits(model, again, given), adapters.logits(model, tuned, given), rtol=1e-5, atol=1e-5
    )


def test_paths_of_flax_models(bases, tmp_path):
    """Trees of transformers' Flax models have its names for paths."""
    shapes = {"q_proj": (16, 16), "v_proj": (16, 8)}
    attention = lambda: {name: {"kernel": jnp.ones(shape)} for name, shape in shapes.items()}
    layers = {str(n): {"self_attn": attention()} for n in (0, 1)}
    params = {"model": {"layers": layers, "norm": {"scale": jnp.ones(16)}}}
    params = hf.load_adapter(adapters.write_adapter(tmp_path / "in", "llama-lora"), params)
    assert isinstance(params["model"]["layers"]["1"]["self_attn"]["v_proj"]["kernel"], jpeft.LoRA)
    hf.save_adapter(tmp_path / "out", params)
    adapters.same(load_file(tmp_path / "out" / "adapter_model.safetensors"), adapters.adapter("llama-lora"))


def test_over_a_quantized_base_in_bfloat16(bases, tmp_path):
    """The adapter has the dtype of its file, whatever the base is."""
    model, params = bases["llama"]
    base = jpeft.nf4(jax.tree.map(lambda x: x.astype(jnp.bfloat16), params), block=16)
    tuned = hf.load_adapter(adapters.write_adapter(tmp_path / "in", "llama-lora"), base, model=model)
    node = tuned["layers_0"]["attention"]["query"]["kernel"]
    assert isinstance(node.base, jpeft.NF4) and node.a.dtype == jnp.float32
    found, _ = written(tmp_path / "out", model, tuned, "llama-lora")
    adapters.same(found, adapters.adapter("llama-lora"))
