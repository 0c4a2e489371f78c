"""From a checkpoint's directory over QLoRA to an adapter's directory, by the script that is to be copied."""

import json
import runpy
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from causal import PAIRS, write_rows
from safetensors.numpy import load_file

import jpeft
from jpeft import hf
from jpeft.hf._load import load_tokenizer


SCRIPT = Path(__file__).parents[2] / "experiments/qlora.py"


@pytest.fixture(scope="module")
def made(tiny_llama, tmp_path_factory):
    """A directory with a checkpoint, rows, and the adapter that the script makes of them."""
    directory = tmp_path_factory.mktemp("qlora")
    (directory / "checkpoint").symlink_to(tiny_llama)
    write_rows(directory / "rows.jsonl", [{"prompt": prompt, "completion": answer} for prompt, answer in PAIRS])
    options = {"rank": 4, "steps": 60, "size": 8, "length": 16, "learning-rate": 0.03}
    paths = [str(directory / name) for name in ("checkpoint", "rows.jsonl", "adapter")]
    before = sys.argv
    sys.argv = [str(SCRIPT), *paths, *(f"--{name}={value}" for name, value in options.items())]
    try:
        with jax.numpy_dtype_promotion("standard"):
            runpy.run_path(str(SCRIPT), run_name="__main__")
    finally:
        sys.argv = before
    return directory


@pytest.fixture(scope="module")
def logits(made):
    """A function of ids: the checkpoint as it was, not quantized, with the adapter."""
    model, base, _ = hf.load(made / "checkpoint")
    params = hf.load_adapter(made / "adapter", base, model=model)
    return jax.jit(lambda ids: jpeft.apply(model, {"params": params}, ids))


def test_the_adapter_has_learned_the_rows(made, logits):
    tokenizer = load_tokenizer(made / "checkpoint")
    rows = [tokenizer.encode(f"{prompt}{answer}<|end|>").ids for prompt, answer in PAIRS]
    starts = [len(tokenizer.encode(prompt).ids) for prompt, _ in PAIRS]
    ids = np.array([row + [0] * (16 - len(row)) for row in rows])
    found = np.argmax(logits(ids), axis=-1)
    for row, start, tokens in zip(rows, starts, found, strict=True):
        assert tokens[start - 1 : len(row) - 1].tolist() == row[start:]


def test_the_adapter_is_of_pefts_form(made):
    assert {path.name for path in (made / "adapter").iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    config = json.loads((made / "adapter/adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 8)
    tensors = load_file(made / "adapter/adapter_model.safetensors")
    assert len(tensors) == 2 * 2 * 7
    assert tensors["base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"].shape == (4, 16)
    assert all(np.any(x) for x in tensors.values())


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers' own names, which PEFT uses
def test_peft_computes_the_same(made, logits):
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    ids = np.random.default_rng(0).integers(0, 300, (4, 16))
    base = transformers.AutoModelForCausalLM.from_pretrained(made / "checkpoint", dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, made / "adapter")
    with torch.no_grad():
        theirs = model(torch.from_numpy(ids)).logits.numpy()
    assert np.abs(logits(ids) - theirs).max() < 1e-5 * np.abs(theirs).max()
