"""A model with everything that a checkpoint can ask of the names: layers, experts, joined files, heads tied and new."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jpeft.hf._names import Architecture, Row, linear, norm, table


@dataclasses.dataclass(frozen=True)
class Config:
    vocab_size: int = 12
    hidden_size: int = 8
    num_hidden_layers: int = 3
    num_experts: int = 2
    tie_word_embeddings: bool = False
    model_type: str = "tiny"


class Norm(nn.Module):
    param_dtype: Any

    @nn.compact
    def __call__(self, x):
        own = lambda name: self.param(name, nn.initializers.ones, x.shape[-1:], self.param_dtype).astype(x.dtype)
        return x * own("scale")[None, None] + own("bias")[None, None]


class Layer(nn.Module):
    config: Config
    param_dtype: Any

    @nn.compact
    def __call__(self, x):
        d, e = self.config.hidden_size, self.config.num_experts
        normal = nn.initializers.normal(0.1)
        x = Norm(self.param_dtype, name="norm")(x)
        q, k, v = jnp.split(nn.Dense(2 * d, name="qkv", param_dtype=self.param_dtype)(x), [d, d + d // 2], axis=-1)
        x += nn.Dense(d, name="out", param_dtype=self.param_dtype)(q + jnp.concatenate([k, v], axis=-1))
        up = self.param("up", normal, (e, d, 4 * d), self.param_dtype)
        return x + jnp.mean(jnp.einsum("bsd,edf->bsef", x, up), axis=2)[..., :d]


class Tiny(nn.Module):
    config: Config
    scan: bool = False
    num_labels: int = 0
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, input_ids):
        config = self.config
        embed = nn.Embed(config.vocab_size, config.hidden_size, name="embed", param_dtype=self.param_dtype)
        x = embed(input_ids)
        if self.scan:
            step = lambda layer, x: (layer(x), None)
            length = config.num_hidden_layers
            loop = nn.scan(step, variable_axes={"params": 0}, split_rngs={"params": True}, length=length)
            x = loop(Layer(config, self.param_dtype, name="layers"), x)[0]
        else:
            for i in range(config.num_hidden_layers):
                x = Layer(config, self.param_dtype, name=f"layers_{i}")(x)
        if self.num_labels:
            return nn.Dense(self.num_labels, name="head", param_dtype=self.param_dtype)(x)
        if config.tie_word_embeddings:
            return embed.attend(x)
        return nn.Dense(config.vocab_size, use_bias=False, name="lm_head", param_dtype=self.param_dtype)(x)


def build(fields, *, head=None, **options):
    return Tiny(Config(**{k: x for k, x in fields.items() if k not in ("dtype", "architectures")}), **options)


def rows(model):
    d, layer = model.config.hidden_size, "model.h.{i}."
    q, k, v = (f"{layer}{name}" for name in ("q_proj", "k_proj", "v_proj"))
    qkv = (dataclasses.replace(row, sizes=(d, d // 2, d // 2)) for row in linear("layers_{i}/qkv", q, k, v))
    experts = tuple(f"{layer}experts.{{e}}.{name}.weight" for name in ("w1", "w3"))
    return (
        *table("embed", "model.wte"),
        *norm("layers_{i}/norm", f"{layer}ln"),
        *qkv,
        *linear("layers_{i}/out", f"{layer}o_proj", letters="io"),
        Row("layers_{i}/up", experts, "oi"),
        *linear("lm_head", "lm_head"),
        *linear("head", "score"),
    )


TINY = Architecture(
    build=build,
    rows=rows,
    fields=lambda model: dataclasses.asdict(model.config),
    prefix="model.",
    ignored=r".*\.bias_buffer|score\..*",
    aliases={r"\.gamma$": ".weight"},
    tied={"lm_head.weight": "model.wte.weight"},
    head=r"head/.*",
)


def random_params(model, seed=0, dtype=np.float32):
    """Parameters of a model, none at its start."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0.5, 0.5, x.shape), dtype), shapes)


def random_tensors(config=Config(), seed=0, dtype=np.float32):
    """Every tensor of a checkpoint, by hand: linear weights are (out, in), those of `o_proj` (in, out)."""
    d = config.hidden_size
    shapes = {"model.wte.weight": (config.vocab_size, d), "lm_head.weight": (config.vocab_size, d)}
    for i in range(config.num_hidden_layers):
        sizes = {"q_proj": (d, d), "k_proj": (d // 2, d), "v_proj": (d // 2, d), "o_proj": (d, d), "ln": (d,)}
        shapes |= {f"model.h.{i}.{name}.weight": shape for name, shape in sizes.items()}
        shapes |= {f"model.h.{i}.{name}.bias": shape[:1] for name, shape in sizes.items()}
        shapes |= {f"model.h.{i}.experts.{e}.{name}.weight": (2 * d, d) for e in (0, 1) for name in ("w1", "w3")}
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    rng = np.random.default_rng(seed)
    return {name: rng.normal(0.5, 0.5, shape).astype(dtype) for name, shape in shapes.items()}
