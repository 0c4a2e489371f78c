"""Encoders, T5 and ViT against transformers, from what `save_pretrained` has written of small random ones."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file

from jpeft import hf
from jpeft.hf._names import places, to_theirs
from jpeft.hf.architectures import ARCHITECTURES
from jpeft.models import T5, Classifier, Embedder, Encoder


FIXTURES = Path(__file__).parents[1] / "fixtures" / "encoders"
NAMES = sorted(path.name for path in FIXTURES.iterdir())
OUTPUTS = ("logits", "last_hidden_state", "pooler_output")


def architecture(name):
    return ARCHITECTURES[fields(name)["model_type"]]


def fields(name):
    return json.loads((FIXTURES / name / "config.json").read_text())


def expected(name):
    """What it is called with, the labels if there are any, and everything else."""
    arrays = dict(np.load(FIXTURES / name / "expected.npz"))
    inputs = {key.removeprefix("inputs/"): arrays.pop(key) for key in list(arrays) if key.startswith("inputs/")}
    return inputs, inputs.pop("labels", None), arrays


def outputs(model, params, inputs, labels):
    """By the names of transformers' fields."""
    if isinstance(model, T5):
        inputs = inputs | {"decoder_input_ids": model.shift_right(labels)}
    y = jax.jit(model.apply)({"params": params}, **inputs)
    found = {name: getattr(y, name) for name in OUTPUTS if hasattr(y, name)}
    return found or dict.fromkeys(OUTPUTS, y)


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_those_of_transformers(name):
    model, params, _ = hf.load(FIXTURES / name)
    inputs, labels, arrays = expected(name)
    found = outputs(model, params, inputs, labels)
    for field in OUTPUTS:
        if (y := arrays.get(f"outputs/{field}")) is not None:
            kept = np.ones(y.shape[:1], bool)
            if (mask := inputs.get("attention_mask")) is not None and y.shape[:2] == mask.shape:
                kept = mask.astype(bool)  # what stands at padding is nobody's
            assert found[field].shape == y.shape
            np.testing.assert_allclose(found[field][kept], y[kept], atol=1e-5, rtol=1e-5)


def by_module(name, model, tree):
    """A tree of parameters, or of their gradients, by the names in transformers' modules and in their order of axes."""
    flat, found = flatten_dict(tree, sep="/"), {}
    for path, place in places(architecture(name).rows(model), flat).items():
        found[place.row.module.replace("{i}", str(place.layer))] = to_theirs(np.asarray(flat[path]), place.row.letters)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_rows_name_the_parameters_of_transformers_modules(name):
    model, params, _ = hf.load(FIXTURES / name)
    assert set(by_module(name, model, params)) == set(expected(name)[2]["modules"].tolist())
    assert len(by_module(name, model, params)) == len(jax.tree.leaves(params))


@pytest.mark.parametrize("name", ["bert_classification", "t5", "t5_gated", "vit_classification"])
def test_gradients_are_those_of_transformers(name):
    model, params, _ = hf.load(FIXTURES / name)
    inputs, labels, arrays = expected(name)

    def loss(params):
        if isinstance(model, T5):
            return jnp.sum(model.apply({"params": params}, **inputs, labels=labels)) / int(np.sum(labels != -100))
        logits = model.apply({"params": params}, **inputs)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))

    found = by_module(name, model, jax.jit(jax.grad(loss))(params))
    for module, gradient in found.items():
        y = arrays[f"gradients/{module}"]
        assert np.abs(y).max() > 0 or module.endswith(("key.bias", "k_proj.bias"))  # softmax does not see it
        np.testing.assert_allclose(gradient, y, atol=1e-5, rtol=1e-4, err_msg=module)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_saved_is_what_was_loaded(name, tmp_path):
    model, params, _ = hf.load(FIXTURES / name, scan=True)
    hf.save(tmp_path / "model", model, params)
    theirs, ours = (load_file(path / "model.safetensors") for path in (FIXTURES / name, tmp_path / "model"))
    if name == "bert_masked":  # it is the encoder alone that was loaded
        theirs = {key.removeprefix("bert."): x for key, x in theirs.items() if not key.startswith("cls.")}
    assert theirs.keys() == ours.keys()
    for key, x in theirs.items():
        np.testing.assert_array_equal(ours[key], x, err_msg=key)
    written, read = json.loads((tmp_path / "model/config.json").read_text()), fields(name)
    assert hf.load(tmp_path / "model")[0].config == model.config
    if name == "bert_masked":
        assert written.pop("architectures") == ["BertModel"]
    elif name == "t5_gated":
        assert written.pop("tie_word_embeddings") is False  # transformers 5 writes true, with a head in the file
    both = written.keys() & read.keys()
    assert {key: written[key] for key in both} == {key: read[key] for key in both}


CLASSIFIED = fields("bert_classification")


def test_labels_and_the_kind_of_loss_are_kept():
    model = ARCHITECTURES["bert"].build(CLASSIFIED | {"problem_type": "multi_label_classification"})
    assert model.labels == ("bad", "fair", "good") and model.num_labels == 3
    written = ARCHITECTURES["bert"].fields(model)
    assert written["id2label"] == {"0": "bad", "1": "fair", "2": "good"}
    assert written["problem_type"] == "multi_label_classification"
    other = ARCHITECTURES["bert"].build(CLASSIFIED, head="classification", num_labels=2)
    assert ARCHITECTURES["bert"].fields(other)["id2label"] == {"0": "LABEL_0", "1": "LABEL_1"}
    one = ARCHITECTURES["bert"].fields(ARCHITECTURES["bert"].build(CLASSIFIED, head="regression"))
    assert one["problem_type"] == "regression" and one["id2label"] == {"0": "LABEL_0"}


@pytest.mark.parametrize(
    ("name", "task", "shape", "new"),
    [
        ("bert_masked", "classification", (3, 5), {"pooler", "head"}),
        ("bert_bare", "classification", (3, 5), {"head"}),
        ("roberta_bare", "regression", (3, 1), {"pooler", "head"}),
        ("distilbert_tokens", "tokens", (2, 9, 3), set()),
        ("bert_tokens", "embedding", (3, 16), set()),
        ("vit_bare", "classification", (2, 5), {"head"}),
    ],
)
def test_another_head(name, task, shape, new):
    count = shape[-1] if task in ("classification", "tokens") else None
    model, params, _ = hf.load(FIXTURES / name, task=task, num_labels=count)
    y = jax.eval_shape(model.apply, {"params": params}, **expected(name)[0])
    assert y.shape == shape and y.dtype == jnp.float32
    stored = load_file(FIXTURES / name / "model.safetensors").values()
    sums = {float(np.abs(x).sum(dtype=np.float64)) for x in stored}
    for module in ("pooler", "head"):
        if module in params:
            kernel = np.abs(np.asarray(params[module]["kernel"])).sum(dtype=np.float64)
            assert (not np.isclose(list(sums), kernel, rtol=1e-9).any()) == (module in new)


def test_a_masked_language_models_encoder_has_no_head():
    model, params, _ = hf.load(FIXTURES / "bert_masked")
    assert isinstance(model, Encoder) and set(params) == {"embeddings", "layers_0", "layers_1"}


def test_old_files(tmp_path):
    """Of norms with other names, and with a buffer and a pooler that the class of the file does not have."""
    tensors = load_file(FIXTURES / "bert_masked" / "model.safetensors")
    old = {key.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): x for key, x in tensors.items()}
    old |= {"bert.embeddings.position_ids": np.arange(14)[None], "bert.pooler.dense.bias": np.ones(16, np.float32)}
    old |= {"cls.seq_relationship.bias": np.ones(2, np.float32)}
    save_file(old, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(fields("bert_masked")))
    jax.tree.map(np.testing.assert_array_equal, hf.load(tmp_path)[1], hf.load(FIXTURES / "bert_masked")[1])


@pytest.mark.parametrize(
    ("name", "changed", "match"),
    [
        ("bert_bare", {"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key'"),
        ("bert_bare", {"is_decoder": True, "alibi": True, "window": 8}, "(?s)is_decoder=True.*alibi.*window=8"),
        ("bert_bare", {"pruned_heads": {"0": [1]}}, "pruned_heads"),
        ("bert_bare", {"hidden_act": "mish"}, "hidden_act='mish'"),
        ("bert_bare", {"architectures": ["BertForQuestionAnswering"]}, "BertForQuestionAnswering.*BertForMaskedLM"),
        ("distilbert_tokens", {"hidden_size": 16}, "hidden_size=16"),
        ("t5", {"feed_forward_proj": "gated-mish"}, "gated-mish"),
        ("t5", {"relative": 1, "is_decoder": True}, "(?s)is_decoder=True.*relative=1"),
        ("t5", {"architectures": ["T5ForQuestionAnswering"]}, "T5ForQuestionAnswering"),
        ("vit_bare", {"image_size": 9}, "image_size"),
        ("vit_bare", {"use_mask_token": True, "qk_norm": True}, "(?s)use_mask_token.*qk_norm"),
        ("vit_bare", {"architectures": ["ViTForMaskedImageModeling"]}, "ViTForMaskedImageModeling"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(name, changed, match):
    with pytest.raises(ValueError, match=match):
        architecture(name).build(fields(name) | changed)


@pytest.mark.parametrize(("name", "task"), [("bert_bare", "summary"), ("t5", "classification"), ("vit_bare", "tokens")])
def test_an_unknown_task_is_refused(name, task):
    with pytest.raises(ValueError, match=f"'{task}' is no task"):
        architecture(name).build(fields(name), head=task)


def test_transformers_has_no_classifier_of_means():
    model = ARCHITECTURES["bert"].build(CLASSIFIED)
    with pytest.raises(ValueError, match="mean"):
        ARCHITECTURES["bert"].fields(Classifier(model.config, 3, "mean"))
    assert ARCHITECTURES["bert"].fields(Embedder(model.config))["architectures"] == ["BertModel"]


def test_flan_t5_as_transformers_4_has_it():
    """Its file says that embeddings are not tied, and nothing of a scale."""
    given = {k: x for k, x in fields("t5_gated").items() if k not in ("scale_decoder_outputs", "dense_act_fn")}
    config = ARCHITECTURES["t5"].build(given | {"tie_word_embeddings": False, "n_positions": 512}).config
    assert not config.tie_word_embeddings and not config.scale_decoder_outputs and config.activation == "gelu_new"
    assert config == ARCHITECTURES["t5"].build(fields("t5_gated")).config


def test_roberta_has_fewer_positions_than_its_table():
    model, params, _ = hf.load(FIXTURES / "roberta_bare")
    with pytest.raises(ValueError, match=r"15 tokens.* is 14"):
        model.apply({"params": params}, jnp.zeros((1, 15), jnp.int32))
