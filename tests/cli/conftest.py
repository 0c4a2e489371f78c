"""A BERT encoder and a Llama of a few thousand random parameters, and texts that they can learn."""

import json

import jax
import numpy as np
import pytest
from causal import PAIRS, save_llama, write_rows
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors


WORDS = ("apple", "pear", "plum", "iron", "zinc", "lead", "the", "is", "not", "and")
HIDDEN, INNER, LAYERS, POSITIONS = 16, 32, 2, 40


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """A Hugging Face directory."""
    directory = tmp_path_factory.mktemp("model")
    vocabulary = {token: n for n, token in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])]
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "model_type": "bert", "vocab_size": len(vocabulary), "hidden_size": HIDDEN, "num_hidden_layers": LAYERS,
        "num_attention_heads": 2, "intermediate_size": INNER, "max_position_embeddings": POSITIONS,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    save_file(_tensors(len(vocabulary)), directory / "model.safetensors")
    return directory


def _tensors(vocabulary):
    rng = np.random.default_rng(0)
    tensors = {}

    def linear(name, n_in, n_out):
        tensors[f"{name}.weight"] = rng.normal(size=(n_out, n_in)).astype(np.float32) / np.sqrt(n_in, dtype=np.float32)
        tensors[f"{name}.bias"] = np.zeros(n_out, np.float32)

    def norm(name):
        tensors[f"{name}.weight"], tensors[f"{name}.bias"] = np.ones(HIDDEN, np.float32), np.zeros(HIDDEN, np.float32)

    for name, rows in (("word", vocabulary), ("position", POSITIONS), ("token_type", 2)):
        tensors[f"embeddings.{name}_embeddings.weight"] = rng.normal(size=(rows, HIDDEN)).astype(np.float32)
    norm("embeddings.LayerNorm")
    for layer in (f"encoder.layer.{n}" for n in range(LAYERS)):
        for name in ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"):
            linear(f"{layer}.{name}", HIDDEN, HIDDEN)
        linear(f"{layer}.intermediate.dense", HIDDEN, INNER)
        linear(f"{layer}.output.dense", INNER, HIDDEN)
        norm(f"{layer}.attention.output.LayerNorm")
        norm(f"{layer}.output.LayerNorm")
    return tensors


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A file of 60 rows: fruits and metals, among words that tell nothing."""
    rng = np.random.default_rng(1)
    rows = []
    for n in range(60):
        label, own = (("fruit", WORDS[:3]), ("metal", WORDS[3:6]))[n % 2]
        filler = list(rng.choice(WORDS[6:], size=rng.integers(2, 14)))
        rows.append({"text": " ".join([rng.choice(own), *filler]), "label": label})
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory):
    """The directory of a causal model."""
    return save_llama(tmp_path_factory.mktemp("causal") / "llama")


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """A file of 12 prompts and completions."""
    rows = [{"prompt": f"{n}: {prompt}", "completion": answer} for n in range(3) for prompt, answer in PAIRS]
    return write_rows(tmp_path_factory.mktemp("pairs") / "rows.jsonl", rows)


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory):
    """The runs of these tests compile the same few programs again and again."""
    options = {"jax_compilation_cache_dir": str(tmp_path_factory.mktemp("cache")),
               "jax_persistent_cache_min_compile_time_secs": 0.0}  # fmt: skip
    before = {name: getattr(jax.config, name) for name in options}
    for name, value in options.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(autouse=True)
def standard_promotion():
    """Optax's Adam raises a float to the power of an integer array."""
    with jax.numpy_dtype_promotion("standard"):
        yield
