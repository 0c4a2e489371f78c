"""The adapters that we write, loaded by PEFT itself: the same logits, and nothing that it misses or finds too much."""

import warnings

import adapters
import jax
import numpy as np
import pytest

import jpeft
from jpeft import hf


pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def torch_models(tmp_path_factory):
    """A function that makes transformers' model of an architecture."""
    transformers = pytest.importorskip("transformers")
    home = tmp_path_factory.mktemp("torch")

    def make(name):
        directory = adapters.write_base(home / name, name)
        config = adapters.read_json(directory / "config.json")
        return getattr(transformers, config["architectures"][0]).from_pretrained(directory).eval()

    return make


def logits_of_peft(model, directory, given):
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(model, directory).eval()
    told = [str(w.message) for w in caught if "missing" in str(w.message) or "unexpected" in str(w.message)]
    assert not told, told
    given = {name: torch.tensor(np.asarray(x)) for name, x in given.items()}
    given = {name: x.long() if not x.is_floating_point() else x for name, x in given.items()}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = model(**given).logits.numpy()
    return found if found.ndim == 2 else found[:, -6:]


def moved(params):
    """The tree with other numbers in all that trains."""
    trainable, frozen = jpeft.partition(params)
    return jpeft.combine(jax.tree.map(lambda x: 1.1 * x + 0.01, trainable), frozen)


PLACES = ".*(query|value)/kernel"
SIDES = ".*(query|down|up)/kernel"  # square, and narrower on either side
BANK = {"rank": 2, "vectors": 5, "length": 8, "targets": PLACES}
MADE = {
    "shira": jpeft.shira(rank=1, targets=PLACES),
    "c3a": jpeft.c3a(targets=PLACES),
    "road": jpeft.road(targets=".*(query|value)", variant=2, group=8),
    "randlora": jpeft.randlora(rank=6, alpha=3, targets=SIDES),
    "delora": jpeft.delora(rank=2, targets=PLACES),
    "gralora": jpeft.gralora(rank=4, hybrid=1, targets=PLACES),
    "vblora": jpeft.vblora(**BANK),
    "vblora_choices": lambda params: jpeft.vblora_choices(jpeft.vblora(params, **{**BANK, "vectors": 300})),
    "tinylora": jpeft.tinylora(length=3, targets=SIDES),
    "tinylora_shared": jpeft.tinylora(length=3, group="all", targets=SIDES),
    "vera": jpeft.vera(rank=3, targets=SIDES),
}


@pytest.mark.parametrize("method", MADE)
def test_peft_reads_what_is_made_here(method, bases, torch_models, tmp_path):
    model, params = bases["llama"]
    tuned, given = moved(MADE[method](params)), adapters.inputs("llama")
    hf.save_adapter(tmp_path / "out", tuned, model=model, task_type="CAUSAL_LM")
    found = logits_of_peft(torch_models("llama"), tmp_path / "out", given)
    assert np.abs(found - adapters.stored("llama")[0]["logits"]).max() > 1e-3
    np.testing.assert_allclose(adapters.logits(model, tuned, given), found, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", adapters.READ)
def test_peft_reads_what_we_write(case, bases, torch_models, tmp_path):
    name, given = case.partition("-")[0], adapters.inputs(case)
    model, params = bases[name]
    tuned = moved(hf.load_adapter(adapters.write_adapter(tmp_path / "in", case), params, model=model))
    hf.save_adapter(tmp_path / "out", tuned, model=model, task_type=adapters.config(case).get("task_type"))
    found = logits_of_peft(torch_models(name), tmp_path / "out", given)
    np.testing.assert_allclose(adapters.logits(model, tuned, given), found, rtol=1e-5, atol=1e-5)
