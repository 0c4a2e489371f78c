"""A tiny causal checkpoint with random parameters, a byte-level tokenizer and a chat template."""

import json

import jax
import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from jpeft import hf
from jpeft.models import Decoder, DecoderConfig


SPECIAL = ("<s>", "</s>", "<|user|>", "<|assistant|>", "<|end|>")
CORPUS = ("what is the colour of the sky? blue", "what is the colour of grass? green", "sky grass red  \n\n sun night")
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
PAIRS = [("the sky is", " blue"), ("the grass is", " green"), ("the sun is", " red"), ("the night is", " what?")]


def byte_level_tokenizer(vocabulary=300):
    """One that merges letters into words, and begins a text with `<s>`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=list(SPECIAL), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer


def save_tokenizer(directory, tokenizer, *, template=TEMPLATE, end="<|end|>"):
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": end, "chat_template": template}
    (directory / "tokenizer_config.json").write_text(json.dumps({k: x for k, x in config.items() if x is not None}))


def random_params(model, seed=0):
    """No zeros and no ones, which would hide what a norm or a bias does; and a head that can be sure of a token."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 2), np.int32))["params"]
    rng = np.random.default_rng(seed)

    def one(path, x):
        centre = 1.0 if path[-1].key == "scale" else 0.0
        deviation = 1.0 if path[0].key in ("embed", "lm_head") else x.shape[0] ** -0.5
        return (centre + deviation * rng.normal(size=x.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(one, shapes)


def save_llama(directory, *, hidden=16, layers=2, positions=64, seed=0):
    """Write a new directory of a Llama that transformers would load, and its tokenizer."""
    tokenizer = byte_level_tokenizer()
    config = DecoderConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=hidden, intermediate_size=2 * hidden,
        num_hidden_layers=layers, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=positions,
    )  # fmt: skip
    model = Decoder(config)
    hf.save(directory, model, random_params(model, seed))
    save_tokenizer(directory, tokenizer)
    return directory


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
