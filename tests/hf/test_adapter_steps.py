"""Ten steps of gradient descent give the adapter that PEFT has after them."""

import adapters
import numpy as np
import pytest
from safetensors.numpy import load_file

from jpeft import hf


# A file of P-tuning has what the network made, and one of VB-LoRA at rest what the logits chose: not what trains.
TRAINED = [case for case in adapters.READ if not case.endswith(("p-tuning", "vblora-chosen"))]
CASES = [pytest.param(case, marks=() if case.startswith("llama") else pytest.mark.slow) for case in TRAINED]


@pytest.mark.parametrize("case", CASES)
def test_steps_are_those_of_peft(case, bases, tmp_path):
    name = case.partition("-")[0]
    model, params = bases[name]
    arrays, metadata = adapters.stored(case)
    params = hf.load_adapter(adapters.write_adapter(tmp_path / "in", case), params, model=model)
    targets, rate = adapters.stored(name)[0]["targets"], float(metadata["rate"])
    params = adapters.steps(model, params, adapters.inputs(case), targets, rate)
    hf.save_adapter(tmp_path / "out", params, model=model, task_type=adapters.config(case).get("task_type"))
    found, wanted = load_file(tmp_path / "out" / "adapter_model.safetensors"), adapters.after(case)
    for tensor, x in found.items():
        np.testing.assert_allclose(x, wanted[tensor][: len(x)], rtol=1e-4, atol=1e-4, err_msg=tensor)
    assert max(np.abs(wanted[tensor] - arrays[tensor]).max() for tensor in wanted) > 0.01
