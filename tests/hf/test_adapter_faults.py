"""What cannot be read or written as it is meant is refused by name, and all of it at once."""

import json

import adapters
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import jpeft
from jpeft import hf


AT = "base_model.model.model.layers.0.self_attn."


@pytest.fixture
def llama(bases):
    return bases["llama"]


@pytest.fixture
def refused(llama, tmp_path):
    """The words with which a case with these tensors and fields of the config is refused."""

    def refused(case="llama-lora", tensors=None, **fields):
        model, params = llama
        with pytest.raises(ValueError) as error:
            hf.load_adapter(adapters.write_adapter(tmp_path, case, tensors, **fields), params, model=model)
        return str(error.value)

    return refused


def test_all_tensors_that_do_not_fit_are_named(refused):
    tensors = adapters.adapter("llama-lora")
    del tensors[f"{AT}q_proj.lora_A.weight"]
    tensors[f"{AT}v_proj.lora_A.weight"] = np.zeros((2, 15), np.float32)
    tensors[f"{AT}v_proj.lora_C.weight"] = np.zeros(3, np.float32)
    tensors[f"{AT}o_proj.lora_A.weight"] = np.zeros((2, 16), np.float32)
    message = refused(tensors=tensors)
    q, v, o = (f"model.layers.0.self_attn.{name}" for name in ("q_proj", "v_proj", "o_proj"))
    assert f"missing: {q}.lora_A.weight" in message
    assert f"shape: {v}.lora_A.weight is (2, 15), expected (2, 16)" in message
    assert f"unexpected: {v}.lora_C.weight" in message
    assert f"missing: {o}.lora_B.weight" in message


def test_a_module_that_is_named_must_be_there(refused):
    tensors = {name: x for name, x in adapters.adapter("llama-lora").items() if "layers.1.self_attn.v" not in name}
    assert "missing: the tensors at model.layers.1.self_attn.v_proj" in refused(tensors=tensors)


def test_experts_that_are_named_must_be_there(bases, tmp_path):
    model, params = bases["mixtral"]
    tensors = {name: x for name, x in adapters.adapter("mixtral-experts").items() if ".base_layer." not in name}
    with pytest.raises(ValueError) as error:
        hf.load_adapter(adapters.write_adapter(tmp_path, "mixtral-experts", tensors), params, model=model)
    wanted = [f"missing: the tensors at model.layers.{i}.mlp.experts.gate_up_proj" for i in (0, 1)]
    assert all(words in str(error.value) for words in wanted)


@pytest.mark.parametrize("ids", ["abc", [[1]], [True], 3])
def test_trained_tokens_must_be_numbers(ids, refused):
    assert "must be integers" in refused("llama-lora-tokens", trainable_token_indices={"embed_tokens": ids})


def test_trained_tokens_of_a_head(refused):
    rows = {"base_model.model.lm_head.token_adapter.trainable_tokens_delta": np.ones((1, 16), np.float32)}
    tensors = adapters.adapter("llama-lora") | rows
    assert "trainable tokens of an output head" in refused(tensors=tensors, trainable_token_indices={"lm_head": [3]})


def test_ranks_must_be_those_of_the_config(refused):
    assert "expected (4, 16)" in refused(r=4)
    assert f"{AT[17:]}v_proj.lora_B.weight is (8, 2), expected (8, 5)" in refused(rank_pattern={"v_proj": 5})


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_numbers_must_be_finite(bad, refused):
    tensors = {name: x.copy() for name, x in adapters.adapter("llama-lora").items()}
    tensors[f"{AT}q_proj.lora_A.weight"][1, 3] = bad
    assert f"not finite: {AT}q_proj.lora_A.weight" in refused(tensors=tensors)


@pytest.mark.parametrize("dtype", ["float64", "int32", "bool"])
def test_dtypes_must_be_those_of_weights(dtype, refused):
    tensors = adapters.adapter("llama-lora")
    tensors[f"{AT}q_proj.lora_A.weight"] = tensors[f"{AT}q_proj.lora_A.weight"].astype(dtype)
    assert f"dtype: {AT}q_proj.lora_A.weight is {dtype}" in refused(tensors=tensors)


FIELDS = [
    ("llama-lora", {"layer_replication": [[0, 1], [0, 2]]}, "some layers of its base several times"),
    ("llama-lora", {"use_qalora": True}, "use_qalora = True: QALoRA"),
    ("llama-lora", {"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
    ("llama-lora", {"kasa_config": {"beta": 1}}, "KaSA"),
    ("llama-lora", {"something_new": 3}, "something_new = 3: this field is not understood"),
    ("llama-lora", {"something_new": 0}, "something_new = 0: this field is not understood"),
    ("llama-lora", {"init_lora_weights": "pissa"}, "path_initial_model_for_weight_conversion"),
    ("llama-lora", {"r": "2"}, "r = '2'"),
    ("llama-lora", {"r": True}, "r = True"),
    ("llama-lora", {"r": 0}, "must be positive"),
    ("llama-lora", {"rank_pattern": [1]}, "rank_pattern"),
    ("llama-loha", {"rank_pattern": {"q_proj": 0}}, "rank_pattern['q_proj'] = 0: it must be positive"),
    ("llama-hra", {"r": 0}, "r = 0: it must be positive"),
    ("llama-miss", {"init_weights": "mini", "mini_r": 0}, "mini_r = 0: it must be positive"),
    ("llama-lora", {"rank_pattern": {"(?!a).*": 2}}, "in linear time"),
    ("llama-lora", {"alpha_pattern": {"q_proj(": 2}}, "no regular expression"),
    ("llama-lora", {"target_modules": [3]}, "a list of names"),
    ("llama-lora", {"target_parameters": [3]}, "a list of names"),
    ("llama-lora", {"lora_alpha": float("nan")}, "NaN is no finite number"),
    ("llama-lora", {"lora_alpha": float("inf")}, "Infinity is no finite number"),
    ("llama-lora", {"lora_alpha": 10**400}, "a number of 401 digits"),
    ("llama-lora", {"alpha_pattern": {"q_proj": True}}, "must be a number"),
    ("llama-lora", {"lora_dropout": 1.0}, "from 0 to below 1"),
    ("llama-lora", {"bias": "vera_only"}, "bias = 'vera_only'"),
    ("llama-lora", {"bias": 5}, "bias = 5"),
    ("llama-lora", {"exclude_modules": ["q_proj"]}, "unexpected: the tensors at model.layers.0.self_attn.q_proj"),
    ("llama-lora", {"layers_to_transform": [1]}, "unexpected: the tensors at model.layers.0.self_attn.v_proj"),
    ("llama-adalora", {"init_r": 10**13}, "expected (10000000000000, 16)"),
    ("llama-vera", {"save_projection": False}, "only torch's random generator"),
    ("llama-randlora", {"save_projection": False}, "only torch's random generator"),
    ("llama-tinylora", {"save_projection": False}, "only torch's random generator"),
    ("llama-randlora", {"r": 4}, "shape: base_model.randlora_A is (6, 1, 16), expected (4, 1, 16)"),
    ("llama-vera", {"r": 4}, "shape: base_model.vera_B is (16, 3), expected (16, 4)"),
    ("llama-vblora", {"num_vectors": 6}, "shape: base_model.vblora_vector_bank is (5, 8), expected (6, 8)"),
    ("llama-vblora-chosen", {"num_vectors": 4}, "not mixed of the 4 vectors"),
    ("llama-vblora", {"topk": 6}, "topk = 6: there are 5 vectors"),
    ("llama-vblora", {"vector_length": 7}, "vectors of 7 numbers do not divide"),
    ("llama-tinylora", {"weight_tying": 0.5}, "unexpected: base_model.tinylora_v.7"),
    ("llama-tinylora", {"weight_tying": 1.5}, "from 0 to 1"),
    ("llama-c3a", {"block_size": 0}, "block_size = 0: it must be positive"),
    ("llama-c3a", {"block_size_pattern": {"v_proj": -8}}, "block_size_pattern['v_proj'] = -8: it must be positive"),
    ("llama-c3a", {"block_size_pattern": {"v_proj": 16}}, "expected (0, 1, 16)"),
    ("llama-road", {"variant": "road_3"}, "one of road_1, road_2, road_4"),
    ("llama-road", {"group_size": 7}, "group_size = 7: it must be even"),
    ("llama-road", {"group_size": 6}, "groups of 6 do not divide 16 outputs"),
    ("llama-gralora", {"gralora_k": 0}, "gralora_k = 0: it must be positive"),
    ("llama-gralora", {"hybrid_r": -1}, "must not be negative"),
    ("llama-fourierft", {"n_frequency": 0}, "n_frequency = 0: it must be positive"),
    ("llama-boft", {"boft_n_butterfly_factor": 2}, "CUDA extension"),
    ("llama-miss", {"init_weights": "bat"}, "a variant that is not understood"),
    ("llama-poly", {"poly_type": "other"}, "poly_type = 'other': 'poly' alone is known"),
    ("llama-poly", {"n_splits": 0}, "n_splits = 0: it must be positive"),
    ("llama-adalora", {"rank_pattern": {"a": [True]}}, "must be 3 truth values"),
    ("llama-tokens", {"token_indices": [3, 5, 64]}, "different ones of 64"),
    ("llama-tokens", {"token_indices": [3, 3, 5]}, "different ones"),
    ("llama-prefix", {"num_attention_heads": 3}, "must divide token_dim"),
    ("llama-prompt", {"num_virtual_tokens": -1}, "must be positive"),
    ("llama-oft", {"num_cayley_neumann_terms": 1}, "must be above 1"),
    ("llama-oft", {"num_cayley_neumann_terms": 10**9}, "1000 at most"),
]


@pytest.mark.parametrize(("case", "fields", "words"), FIELDS)
def test_fields_that_cannot_be_reproduced(case, fields, words, refused):
    assert words in refused(case, **fields)


def test_entries_must_be_those_of_the_kernel(refused):
    tensors = adapters.adapter("llama-shira")
    tensors[f"{AT}v_proj.shira_indices"] = tensors[f"{AT}v_proj.shira_indices"] + np.int32([[8], [0]])
    assert "its entries are not all of a matrix of 8 outputs and 16 inputs" in refused("llama-shira", tensors)


def test_what_a_file_repeats_must_be_the_same(refused):
    tensors = adapters.adapter("llama-randlora")
    tensors[f"{AT}v_proj.randlora_A"] = tensors[f"{AT}v_proj.randlora_A"] + 1
    assert f"{AT}v_proj.randlora_A is another than base_model.randlora_A" in refused("llama-randlora", tensors)


def test_all_fields_are_named(refused):
    message = refused(use_qalora=True, another=[1], arrow_config={"top_k": 1})
    assert all(name in message for name in ("use_qalora", "another", "arrow_config"))


@pytest.mark.parametrize("kind", ["XLORA", None, ["LORA"], 3])
def test_types_that_are_not_known(kind, refused):
    assert "supported: ADALORA" in refused(peft_type=kind)


def test_a_bias_or_a_saved_module_must_be_there(bases, tmp_path):
    model, params = bases["bert"]
    directory = adapters.write_adapter(tmp_path, "bert-lora", bias="lora_only", modules_to_save=["classifier"])
    with pytest.raises(ValueError) as error:
        hf.load_adapter(directory, params, model=model)
    assert "missing: bert.encoder.layer.0.attention.self.query.bias" in str(error.value)
    assert "missing: classifier.weight" in str(error.value)


def test_a_parameter_that_nothing_asks_for(bases, tmp_path):
    model, params = bases["bert"]
    directory = adapters.write_adapter(tmp_path, "bert-lora-modules", modules_to_save=None)
    with pytest.raises(ValueError, match=r"unexpected: classifier\.weight"):
        hf.load_adapter(directory, params, model=model)


def test_pickles_are_never_read(llama, tmp_path):
    model, params = llama
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapters.config("llama-lora")))
    with pytest.raises(FileNotFoundError, match=r"no adapter_model\.safetensors"):
        hf.load_adapter(tmp_path, params, model=model)
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(FileNotFoundError, match=r"adapter_model\.bin, .* pickles, which run any code"):
        hf.load_adapter(tmp_path, params, model=model)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"peft_type": "LORA", "peft_type": "LORA"}', "[" * 100_000])
def test_a_config_that_is_none(text, llama, tmp_path):
    model, params = llama
    adapters.write_adapter(tmp_path, "llama-lora")
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(ValueError, match="adapter_config"):
        hf.load_adapter(tmp_path, params, model=model)


def test_files_out_of_the_directory(llama, tmp_path):
    model, params = llama
    adapters.write_adapter(tmp_path / "one", "llama-lora")
    (tmp_path / "two").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "two" / name).symlink_to(tmp_path / "one" / name)
    with pytest.raises(ValueError, match="link out of its directory"):
        hf.load_adapter(tmp_path / "two", params, model=model)


def test_every_cut_of_a_file_is_refused(llama, tmp_path):
    model, params = llama
    path = adapters.write_adapter(tmp_path, "llama-lora") / "adapter_model.safetensors"
    whole = path.read_bytes()
    for size in (0, 7, 8, 100, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="damaged"):
            hf.load_adapter(tmp_path, params, model=model)


def test_another_models_adapter(llama, tmp_path):
    model, params = llama
    with pytest.raises(ValueError, match=r"unexpected: transformer\.h\.0\.attn\.c_attn\.lora_A\.weight"):
        hf.load_adapter(adapters.write_adapter(tmp_path, "gpt2-lora"), params, model=model)


def sparse(params, count):
    """The tree with so many entries of one kernel to train."""
    path = "layers_0", "attention", "query", "kernel"
    mask = {path[0]: {path[1]: {path[2]: {path[3]: np.arange(256).reshape(16, 16) < count}}}}
    return jpeft.sparse(params, mask=mask)


def test_what_peft_does_not_have(llama, tmp_path):
    model, params = llama
    query, out = ".*query/kernel", tmp_path / "out"
    lora = jpeft.lora(params, rank=2, targets=query)
    cases = {
        "one type, and the nodes here are of HIRA, LORA": jpeft.hira(lora, rank=2, targets=".*value/kernel"),
        "LoRA over Free": jpeft.lora(jpeft.unfreeze(params, targets=query), rank=2, targets=query),
        "LoRA, IA3; PEFT has one": jpeft.ia3(lora, targets=".*query", feedforward=None),
        "IA3, BEFT; PEFT has one": jpeft.beft(jpeft.ia3(params, targets=".*query"), targets=".*query"),
        "LoRA over LoRA": jpeft.lora(lora, rank=2, targets=".*query/kernel"),
        "Bottleneck is nothing that PEFT has": jpeft.bottleneck(lora, width=2),
        "nothing trains": params,
        "no adapter is there": jpeft.unfreeze(params, targets="layers_0/mlp/up/kernel"),
        "31 entries train: PEFT has a multiple of 32": sparse(params, 31),
        "SHiRA for linear maps alone": jpeft.sparse(params, mask={"norm": {"scale": np.ones(16, bool)}}),
        "none below 10000 makes these": jpeft.fourierft(params, frequencies=6, targets=query),
        "wide: PEFT has one randlora_B": jpeft.randlora(params, rank=6, targets=".*(query|value)/kernel"),
        "here others share vectors": jpeft.tinylora(
            params, length=2, group={query: "all", ".*": None}, targets=".*(query|value)/kernel"
        ),
        "2 factors": jpeft.boft(params, block=4, factors=2, targets=".*query/kernel"),
    }
    for words, tree in cases.items():
        with pytest.raises(ValueError, match=words):
            hf.save_adapter(out, tree, model=model)
    assert not out.exists()


def test_what_vllm_does_not_serve(llama, tmp_path):
    model, params = llama
    tuned = jpeft.chain(
        jpeft.dora(rank={".*query/kernel": 2, ".*": 513}, targets=".*(query|value)/kernel"),
        jpeft.unfreeze(targets="lm_head/kernel"),
    )(params)
    with pytest.raises(ValueError) as error:
        hf.save_adapter(tmp_path / "out", tuned, model=model, for_vllm=True)
    assert all(f"vLLM: {name}" in str(error.value) for name in ("use_dora", "modules_to_save", "rank_pattern"))
    hf.save_adapter(tmp_path / "out", jpeft.lora(params, rank=2), model=model, for_vllm=True)
    with pytest.raises(ValueError, match="LoRA alone, not HIRA"):
        hf.save_adapter(tmp_path / "other", jpeft.hira(params, rank=2), model=model, for_vllm=True)


def test_an_adapter_is_replaced_on_request_alone(llama, tmp_path):
    model, params = llama
    hf.save_adapter(tmp_path / "out", jpeft.lora(params, rank=2), model=model)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        hf.save_adapter(tmp_path / "out", jpeft.lora(params, rank=3), model=model)
    hf.save_adapter(tmp_path / "out", jpeft.lora(params, rank=3), model=model, overwrite=True)
    assert adapters.read_config(tmp_path / "out")["r"] == 3
    save_file({"x": np.zeros(3, np.float32)}, tmp_path / "other.safetensors")
    with pytest.raises(FileExistsError, match=r"no adapter_config\.json"):
        hf.save_adapter(tmp_path, jpeft.lora(params, rank=2), model=model, overwrite=True)


def test_a_tree_that_is_nobodys(tmp_path):
    params = jpeft.lora({"dense": {"kernel": jnp.ones((3, 4))}}, rank=1)
    hf.save_adapter(tmp_path / "out", params)  # names of their own: those of its paths
    with pytest.raises(ValueError, match="pass `model=`"):
        hf.save_adapter(tmp_path / "other", jpeft.lora({"kernel": jnp.ones((3, 4))}, rank=1))
