"""Structured terms against Hugging Face's PEFT on a torch layer: outputs, merged weights, and all gradients."""

import jax.numpy as jnp
import pytest
from peft_layers import adapted, check_gradients, check_merged, check_outputs, fields, of_case, same, turned

import jpeft


def exchanged(x):
    """Blocks `(out, in, ...)` as `(in, out, ...)`."""
    return x.swapaxes(0, 1)


CIRCULANT = {"c": ("c3a_kernel", exchanged)}
CASES = {
    "fourierft": (jpeft.fourierft, {"frequencies": 20, "scale": 150.0}, {"c": ("fourierft_spectrum", same)}),
    "c3a": (jpeft.c3a, {"block": 4}, CIRCULANT),
    "c3a_odd": (jpeft.c3a, {"block": 3}, CIRCULANT),
    "qalora": (
        jpeft.qalora,
        {"rank": 3, "alpha": 6, "group": 4, "pooling": "peft"},
        {"a": ("lora_A.weight", turned), "b": ("lora_B.weight", turned)},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_layer(case):
    transform, options, places = CASES[case]
    arrays = of_case("structured/peft.npz", case)
    model, params, name, x, y = adapted(arrays, transform, options, places)
    if "adapter/indices" in arrays:
        rows, columns = arrays["adapter/indices"]  # (out, in)
        (shared,) = params["jpeft_shared"]
        params["jpeft_shared"] = {shared: jnp.asarray(columns * y.shape[-1] + rows)}
    check_outputs(model, params, x, y)
    check_merged(model, params, x, y)
    check_gradients(model, params, name, x, fields(arrays, "gradient", places))
