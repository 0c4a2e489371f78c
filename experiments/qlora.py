"""QLoRA (https://arxiv.org/abs/2305.14314) in one file, to copy and to change.

    python experiments/qlora.py CHECKPOINT ROWS ADAPTER

CHECKPOINT is a Hugging Face directory of a causal model, ROWS a JSON Lines file of {"prompt": ..., "completion": ...},
ADAPTER a new directory that PEFT loads: `PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(CHECKPOINT),
ADAPTER)`. `jpeft finetune` does the same with packing, evaluation, conversations and resuming.
"""

import argparse
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jpeft
from jpeft import hf


IGNORED = -100  # a label that is not to be learned


def read(path, tokenizer, end, length):
    """Tokens, labels and mask (rows, length): the completion and its end are learned, the prompt is not."""
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    tokens, labels, mask = np.zeros((3, len(rows), length), np.int32)
    labels[:] = IGNORED
    for n, row in enumerate(rows):
        prompt = tokenizer.encode(row["prompt"]).ids
        completion = [*tokenizer.encode(row["completion"], add_special_tokens=False).ids, end]
        both = (prompt + completion)[:length]
        tokens[n, : len(both)], mask[n, : len(both)] = both, 1
        labels[n, len(prompt) : len(both)] = both[len(prompt) :]
    return {"input_ids": tokens, "labels": labels, "attention_mask": mask}


def batches(data, size, steps, seed):
    """Random rows for every step."""
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        rows = rng.choice(len(data["labels"]), size)
        yield {name: x[rows] for name, x in data.items()}


def train(checkpoint, rows, *, rank=8, steps=100, size=8, length=256, learning_rate=2e-4, seed=0):
    """`(model, params, losses)`: the checkpoint, its parameters quantized and with LoRA, and the loss of every step."""
    # The kernels are quantized as they are read: the model is never in memory as a whole.
    model, base, tokenizer = hf.load(checkpoint, quantize=jpeft.nf4())
    params = jpeft.lora(base, rank=rank, alpha=2 * rank, key=jax.random.key(seed))
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(optax.warmup_cosine_decay_schedule(0.0, learning_rate, steps // 10, steps)),
    )
    print(jpeft.summary(params, tx))
    trainable, frozen = jpeft.partition(params)
    opt_state = tx.init(trainable)

    def loss(trainable, frozen, batch):
        """The mean over the tokens to be learned; the model returns the loss of each."""
        losses = jpeft.apply(model, {"params": jpeft.combine(trainable, frozen)}, **batch)
        return losses.sum() / jnp.maximum((batch["labels"] != IGNORED).sum(), 1)

    @functools.partial(jax.jit, donate_argnames=("trainable", "opt_state"))
    def step(trainable, opt_state, frozen, batch):
        value, gradients = jax.value_and_grad(loss)(trainable, frozen, batch)
        updates, opt_state = tx.update(gradients, opt_state, trainable)
        return optax.apply_updates(trainable, updates), opt_state, value

    end = tokenizer.token_to_id(json.loads((Path(checkpoint) / "tokenizer_config.json").read_text())["eos_token"])
    data, losses = read(rows, tokenizer, end, length), []
    for n, batch in enumerate(batches(data, size, steps, seed), start=1):
        trainable, opt_state, value = step(trainable, opt_state, frozen, batch)
        losses.append(float(value))
        if n % 10 == 0:
            print(f"step {n}: loss {np.mean(losses[-10:]):.4f}")
    return model, jpeft.combine(trainable, frozen), losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("checkpoint", "rows", "adapter"):
        parser.add_argument(name, type=Path)
    for name, default in {"rank": 8, "steps": 100, "size": 8, "length": 256, "learning_rate": 2e-4, "seed": 0}.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    arguments = vars(parser.parse_args())
    adapter = arguments.pop("adapter")
    checkpoint, rows = arguments.pop("checkpoint"), arguments.pop("rows")
    model, params, _ = train(checkpoint, rows, **arguments)
    hf.save_adapter(
        adapter, params, model=model, base_model_name_or_path=str(checkpoint.resolve()), task_type="CAUSAL_LM"
    )
