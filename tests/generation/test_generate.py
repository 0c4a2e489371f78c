"""`generate` and `stream`, beside what the model says when all of a text is computed anew."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from subject import CONFIG, MODEL, TOKENS, VOCABULARY, letters, params, prompts, recomputed, rows

import jpeft
from jpeft import hf
from jpeft.generation import _decoding
from jpeft.generation._generate import _start
from jpeft.generation._request import request
from jpeft.models import T5, Decoder, T5Config
from jpeft.testing import shaken


COUNT = 9
DECODERS = Path(__file__).parents[1] / "fixtures/decoders"
SITES = jpeft.sites(MODEL, {"params": jax.eval_shape(MODEL.init, jax.random.key(0), TOKENS)["params"]}, TOKENS)
METHODS = {
    "plain": jpeft.chain(),
    "lora on nf4": jpeft.chain(jpeft.nf4(), jpeft.lora(rank=2)),
    "bottleneck on int8": jpeft.chain(jpeft.int8(), jpeft.bottleneck(width=4)),
    "reft": jpeft.chain(
        jpeft.reft(rank=2, positions="f2", sites=SITES), jpeft.reft(rank=2, positions="all", sites=SITES)
    ),
    "invertible": jpeft.invertible(),
    "a bottleneck of blocks": jpeft.bottleneck(placement="block", scale="channel", sites=SITES),
    "adamix and compacter": jpeft.chain(jpeft.adamix(width=4), jpeft.compacter(terms=2, reduction=4)),
    "experts": jpeft.moe_lora(rank=2, experts=3, top=2),
    "one of several tasks": lambda params, key: jpeft.collapse(jpeft.poly(params, rank=2, tasks=2, key=key), task=1),
    "poly": jpeft.poly(rank=2, splits=2),
    "prefix": lambda params, key: jpeft.prefix(params, length=3, key=key, sites=SITES),
    "prefix of a network": lambda params, key: jpeft.prefix(params, length=3, width=4, key=key, sites=SITES),
    "llama adapter": lambda params, key: jpeft.llama_adapter(params, length=3, key=key, sites=SITES),
    "p-tuning of tokens": jpeft.ptuning(length=2, width=5, encoder="lstm", placeholder=int(rows()[0][1])),
    "cpt": jpeft.cpt(ids=[5, 6, 7, 8], types=[1, 2, 3, 4]),
    "intrinsic prompt": lambda params, key: jpeft.intrinsic_prompt(
        params, decoder=((jax.random.normal(key, (4, 48)), jnp.zeros(48)),), length=3, key=key
    ),
    "fusion": lambda params, key: jpeft.fuse([trained(jpeft.bottleneck(params, width=n)) for n in (3, 5)], sites=SITES),
    "arrow": lambda params, key: jpeft.arrow([trained(jpeft.lora(params, rank=n)) for n in (1, 2)], top=1),
    "s4": lambda params, key: jpeft.s4(
        params, rules=[[jpeft.bottleneck(width=4)], [jpeft.lora(rank=2), jpeft.prefix(length=3, sites=SITES)]],
        sizes=[1, 1], key=key, sites=SITES,
    ),
    "mam": lambda params, key: jpeft.mam(params, length=3, prefix_width=None, width=4, key=key, sites=SITES),
    "ladder": lambda params, key: jpeft.ladder(params, model=MODEL, reduction=2, key=key),
    "two prompts and lora": jpeft.chain(jpeft.prompt(length=3), jpeft.lora(rank=2), jpeft.prompt(length=2)),
}


def trained(params):
    """As after training: the start of many methods changes nothing."""
    trainable, frozen = jpeft.partition(params)
    return jpeft.combine(shaken(trainable, jax.random.key(2), size=0.5), frozen)


def tuned(method):
    return trained(METHODS[method](params(), key=jax.random.key(1)))


def made(options=None, /, ids=None, mask=None, own=None, model=MODEL, **more):
    """Of the prompts, with `COUNT` tokens at most."""
    given = prompts() if ids is None else (ids, mask)
    options = {"max_new_tokens": COUNT} | (options or {}) | more
    return jpeft.generate(model, params(model) if own is None else own, *given, **options)


QUICK = ("plain", "lora on nf4", "bottleneck on int8", "reft", "prefix", "cpt", "ladder")  # others run after the rest


@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in METHODS]
)
def test_most_probable_tokens(method):
    own = tuned(method)
    found = made(own=own)
    assert found.tokens.tolist() == [recomputed(MODEL, own, row, COUNT) for row in rows()]
    assert found.lengths.tolist() == [COUNT] * 3
    assert found.text is None
    plain = [recomputed(MODEL, params(), row, COUNT) for row in rows()]
    assert (found.tokens.tolist() == plain) == (method == "plain")


def test_rows_have_tasks():
    tasks = [2, 0, 1]
    trainable, frozen = jpeft.partition(jpeft.mpt(params(), tasks=3, length=3))
    own = jpeft.combine(shaken(trainable, jax.random.key(2), size=0.5), frozen)
    found = made(own=own, task_ids=tasks).tokens.tolist()
    each = zip(rows(), tasks, strict=True)
    assert found == [recomputed(MODEL, jpeft.collapse(own, task=task), row, COUNT) for row, task in each]
    assert found != made(own=own, task_ids=[0, 0, 0]).tokens.tolist()


@pytest.mark.parametrize(("dtype", "scan"), [(jnp.float32, True), (jnp.bfloat16, False)])
def test_other_forms_of_the_model(dtype, scan):
    model = Decoder(CONFIG, scan=scan, dtype=dtype, param_dtype=dtype)
    found = made(model=model).tokens.tolist()
    assert found == [recomputed(model, params(model), row, COUNT) for row in rows()]


@pytest.mark.parametrize("brand", ["gemma2", "gpt2", "llama"])
def test_tokens_are_those_of_transformers(brand):
    directory = DECODERS / brand
    model, own, _ = hf.load(directory)
    expected = np.load(directory / "expected.npz")
    for side in ("left", "right"):
        ids, mask = expected[f"{side}_ids"], expected[f"{side}_mask"]
        assert jpeft.generate(model, own, ids, mask).tokens.tolist() == expected["tokens"].tolist()


def test_encoder_reads_the_prompts():
    config = T5Config(vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2,
                      decoder_start_token_id=3)  # fmt: skip
    model = T5(config)
    shapes = jax.eval_shape(model.init, jax.random.key(0), TOKENS, TOKENS, TOKENS)["params"]
    rng = np.random.default_rng(1)
    own = jpeft.lora(jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), shapes), rank=2)
    own = jax.tree.map(lambda x: x + jnp.asarray(0.1, x.dtype), own)
    logits = jax.jit(lambda ids, written: jpeft.apply(model, {"params": own}, ids, None, written))
    for row, new in zip(rows(), made(own=own, model=model).tokens.tolist(), strict=True):
        written = [config.decoder_start_token_id]
        for _ in range(COUNT):
            padded = np.array([[*written, *[0] * (COUNT - len(written))]])
            written.append(int(jnp.argmax(logits(np.array([row]), padded)[0, len(written) - 1])))
        assert new == written[1:]


CHANCE = {"temperature": 0.8, "top_k": 30, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.2}


@pytest.mark.parametrize("options", [{}, CHANCE], ids=["certain", "chance"])
def test_stream_yields_the_same_tokens(options):
    stop = int(made(options).tokens[1, 5])
    options = options | {"max_new_tokens": COUNT, "stop_tokens": [stop, 60], "pad_token": 59, "tokenizer": letters()}
    whole, pieces = made(options), list(jpeft.stream(MODEL, params(), *prompts(), **options))
    assert np.stack([piece.tokens for piece in pieces], axis=1).tolist() == whole.tokens[:, : len(pieces)].tolist()
    assert np.sum([piece.active for piece in pieces], axis=0).tolist() == whole.lengths.tolist()
    assert tuple(map("".join, zip(*(piece.text for piece in pieces), strict=True))) == whole.text


def test_chance_is_of_the_key_and_the_row():
    wild = CHANCE | {"temperature": 5.0, "top_p": 1.0, "top_k": VOCABULARY}
    one = made(wild, ids=np.ones((3, 5), int))
    assert one.tokens.tolist() == made(wild, ids=np.ones((3, 5), int), key=jax.random.key(0)).tokens.tolist()
    assert one.tokens.tolist() != made(wild, ids=np.ones((3, 5), int), key=jax.random.key(1)).tokens.tolist()
    assert len({*map(tuple, one.tokens.tolist())}) == 3


def test_penalty_is_for_every_token_of_the_row():
    for row, new in zip(rows(), made(repetition_penalty=1e6, max_new_tokens=40).tokens.tolist(), strict=True):
        assert len({*row, *new}) == len({*row}) + len(new)


def test_stop_token_ends_its_row():
    free = made().tokens.tolist()
    stop = free[0][3]
    found = made(stop_tokens=[stop, 60], pad_token=7)
    for row, new, length in zip(free, found.tokens.tolist(), found.lengths, strict=True):
        end = min((row.index(t) + 1 for t in (stop, 60) if t in row), default=COUNT)
        assert length == end
        assert new == row[:end] + [7] * (COUNT - end)
    assert found.lengths[0] < COUNT
    found = made(stop_tokens=[stop, 60])
    assert set(found.tokens[0, int(found.lengths[0]) :].tolist()) == {stop}  # a padding that stops in any case


def test_text_ends_before_what_ended_it():
    tokenizer = letters()
    free = made(tokenizer=tokenizer)
    assert free.text == tuple(tokenizer.decode(row) for row in free.tokens.tolist())
    string = free.text[1][2:5]
    found = made(tokenizer=tokenizer, stop_strings=["#", string])
    assert found.text == tuple(text.split(string)[0] for text in free.text)
    assert found.text[1] != free.text[1]
    ended = found.tokens[1, : int(found.lengths[1])].tolist()  # by the token that completes the string
    assert ended == free.tokens[1, : len(ended)].tolist()
    assert string in tokenizer.decode(ended)
    assert string not in tokenizer.decode(ended[:-1])
    found = made(tokenizer=tokenizer, stop_tokens=[int(free.tokens[1, 2]), 60])
    assert found.text[1] == tokenizer.decode(free.tokens[1, :2].tolist())


@pytest.fixture
def traces(monkeypatch):
    """Counts how often the model is traced."""
    calls = []
    apply = _decoding.apply
    monkeypatch.setattr(_decoding, "apply", lambda *args, **kwargs: (calls.append(1), apply(*args, **kwargs))[1])
    return calls


def test_compiled_once_for_a_shape(traces):
    ids, mask = prompts()
    every = {"max_new_tokens": 6, "stop_tokens": [50]}
    jpeft.generate(MODEL, params(), ids, mask, **every, **CHANCE)
    jpeft.generate(MODEL, params(), ids, mask, **every)  # without chance: another loop, and the same prefill
    list(jpeft.stream(MODEL, params(), ids, mask, **every, **CHANCE))
    made = len(traces)
    other = {"temperature": 1.1, "top_k": 3, "top_p": 0.5, "min_p": 0.0, "repetition_penalty": 1.0}
    jpeft.generate(MODEL, params(), ids[::-1] % 9, mask, **every, **other, key=jax.random.key(5))
    jpeft.generate(MODEL, params(), ids[:, :4], **every | {"stop_tokens": [3]}, pad_to_multiple_of=5)
    list(jpeft.stream(MODEL, params(), ids, mask, **every, **other, pad_token=4))
    assert len(traces) == made
    assert made <= 7  # two prefills, as one has a penalty; two loops, of which JAX may trace each twice; and a step


def test_prompts_of_all_lengths_share_the_loop(traces):
    for length in (2, 9):
        made(ids=jnp.ones((1, length), jnp.int32), mask=None, pad_to_multiple_of=8, cache_length=40)
    before = len(traces)
    made(ids=jnp.ones((1, 2), jnp.int32), mask=None, cache_length=40)
    assert len(traces) == before + 1  # the prefill of a shape of its own


def test_loop_ends_with_the_last_row():
    options = jpeft.generate.__kwdefaults__ | {"stop_tokens": [1, 2], "max_new_tokens": COUNT}
    asked = request(MODEL, params(), *prompts(), **options)
    ended = _start(asked)._replace(done=np.ones(3, bool))
    assert _decoding.loop(MODEL, asked.constants, ended, count=COUNT)[2].steps == 0


def test_quantized_kernels_stay_codes_before_the_loop():
    quantized = jpeft.int8(params())
    asked = request(MODEL, quantized, TOKENS, None, **jpeft.generate.__kwdefaults__)
    compiled = _decoding.loop.lower(MODEL, asked.constants, _start(asked), count=asked.count).compile().as_text()
    kernel = re.compile(r"f32\[(1,)?{},{}\]".format(*quantized["layers_0"]["mlp"]["up"]["kernel"].codes.shape))
    before = compiled.index("\nENTRY")  # the loop's body comes first in the text
    assert kernel.search(compiled, 0, before)
    assert not kernel.search(compiled, before)


def test_faults_are_told_together():
    ids, mask = prompts()
    with pytest.raises(ValueError) as error:
        jpeft.generate(
            MODEL, params(), ids + 40, np.zeros_like(mask), max_new_tokens=0, top_p=1.5, top_k=0, min_p=-0.1,
            repetition_penalty=0.0, stop_strings=["x"], pad_to_multiple_of=0,
        )  # fmt: skip
    told = str(error.value)
    for fault in (
        "rows of padding alone: [0, 1, 2]", "`max_new_tokens` is 0", "`top_p` is 1.5", "`top_k` is 0",
        "`min_p` is -0.1", "`repetition_penalty` is 0.0", "there is no `tokenizer`", "`pad_to_multiple_of` is 0",
        "without a `temperature` above 0",
    ):  # fmt: skip
        assert fault in told


@pytest.mark.parametrize(
    ("ids", "options", "fault"),
    [
        ([1, 2], {}, r"`input_ids` are int64 \(2,\)"),
        ([[]], {}, r"\(1, 0\)"),
        ([[1.0]], {}, "float64"),
        ([[1, VOCABULARY, -1]], {}, rf"vocabulary of {VOCABULARY} does not have: \[-1, {VOCABULARY}\]"),
        ([[1, 2]], {"attention_mask": [[1]]}, r"`attention_mask` is \(1, 1\)"),
        ([[1, 2]], {"max_new_tokens": 79}, "2 tokens and 79 new ones are more than the model's 80 positions"),
        ([[1, 2]], {"max_new_tokens": 9, "cache_length": 9}, "`cache_length` is 9"),
        ([[1, 2]], {"max_new_tokens": 2.5}, "`max_new_tokens` is 2.5"),
        ([[1, 2]], {"stop_tokens": 5}, "`stop_tokens` is 5"),
        ([[1, 2]], {"stop_tokens": [10**12]}, "a sequence of token ids"),
        ([[1, 2]], {"pad_token": -5}, "`pad_token` -5"),
        ([[1, 2]], {"temperature": -1.0}, "`temperature` is -1.0"),
        ([[1, 2]], {"task_ids": [0, 1]}, r"`task_ids` are int64 \(2,\), for \(1,\) rows"),
        ([[1, 2]], {"task_ids": [0.5]}, r"`task_ids` are float64 \(1,\)"),
        ([[1, 2]], {"temperature": float("nan")}, "`temperature` is nan"),
        ([[1, 2]], {"temperature": 1.0, "top_p": 0.0}, "`top_p` is 0.0"),
        ([[1, 2]], {"stop_strings": "ab", "tokenizer": 1}, "a sequence of strings"),
        ([[1, 2]], {"stop_strings": [""], "tokenizer": 1}, "none of them empty"),
    ],
)
@pytest.mark.parametrize("function", [jpeft.generate, jpeft.stream])
def test_fault_is_told(ids, options, fault, function):
    with pytest.raises(ValueError, match=fault):
        function(MODEL, params(), ids, **options)


def test_prompts_take_positions():
    own = jpeft.prompt(params(), length=4)
    with pytest.raises(ValueError, match="2 tokens and 75 new ones, behind 4 of prompts and prefixes, are more than"):
        jpeft.generate(MODEL, own, TOKENS, max_new_tokens=75)


def test_all_positions_can_be_used():
    options = jpeft.generate.__kwdefaults__ | {"max_new_tokens": 4}
    asked = request(MODEL, params(), np.ones((1, 76), int), None, **options)
    assert asked.slots == 79  # the last token is not read


def test_other_models_are_refused():
    with pytest.raises(ValueError, match="Classifier has no `init_cache`"):
        config = jpeft.models.EncoderConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
        jpeft.generate(jpeft.models.Classifier(config, 2), {}, [[1]])


def test_unknown_option_is_refused():
    with pytest.raises(TypeError, match="temprature"):
        jpeft.stream(MODEL, params(), TOKENS, temprature=1.0)
