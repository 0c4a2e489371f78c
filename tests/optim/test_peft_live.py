"""PEFT's optimizers, as they are installed, train as the fixtures tell."""

import runpy
import warnings

import numpy as np
import peft_net
import pytest


@pytest.mark.parity
@pytest.mark.parametrize("name", ["lora_plus", "lora_plus_dora", "lora_fa"])
def test_as_in_the_fixtures(name):
    pytest.importorskip("torch")
    pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = runpy.run_path(str(peft_net.FIXTURES / "make_optim.py"))
        found = made["case"](*made["CASES"][name])
    for key, x in found.items():
        np.testing.assert_allclose(x, peft_net.FIXTURE[f"{name}/{key}"], rtol=1e-5, atol=1e-6, err_msg=key)
