"""PEFT's Arrow: which of its LoRAs every token takes, and how much of them."""

from pathlib import Path

import adapters
import numpy as np
import pytest
from safetensors import safe_open

import jpeft
from jpeft import hf


HERE = Path(__file__).parents[1] / "fixtures/arrow/arrow.safetensors"


@pytest.fixture(scope="module", params=[False, True], ids=["unrolled", "scanned"])
def trees(request, tmp_path_factory):
    """The model, trees of tasks, and general ones."""
    directory = adapters.write_base(tmp_path_factory.mktemp("base"), "llama")
    model, params, _ = hf.load(directory, scan=request.param)
    arrays, config = stored()

    def read(name):
        own = adapters.parts(arrays, f"{name}/")
        path = adapters.write_adapter(tmp_path_factory.mktemp(name), "llama-lora", own, **config)
        return hf.load_adapter(path, params, model=model)

    return model, [read(f"task_{n}") for n in range(4)], [read(f"general_{n}") for n in range(2)]


def stored():
    with safe_open(HERE, "numpy") as file:
        arrays = {name: file.get_tensor(name) for name in list(file.keys())}
        return arrays, {"target_modules": ["down_proj", "q_proj", "v_proj"]}


@pytest.mark.parametrize("subtracted", [False, True])
def test_logits_are_those_of_peft(trees, subtracted):
    model, tasks, general = trees
    mixed = jpeft.arrow(tasks, top=2, temperature=0.5, general=general if subtracted else ())
    found = adapters.logits(model, mixed, adapters.inputs("llama"))
    expected = stored()[0]["subtracted" if subtracted else "logits"]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
