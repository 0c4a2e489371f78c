"""Checkpoints of Hugging Face's format: into a model and its parameters."""

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .._apply import sites
from .._lazy import Index, Lazy, read
from .._targets import Sites
from .._tree import takes_sites
from ..models._sharding import AXES, shardings
from . import architectures
from ._errors import FormatError
from ._extra import extra
from ._match import Source, match
from ._names import NOTHING, Architecture
from ._progress import progress
from ._repository import locate, read_bytes, read_json
from ._safetensors import Tensor, checkpoint, most_common


if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Of the fields of a config: how many layers and experts there are, and how wide a layer and a head are.
COUNTS = ("num_hidden_layers", "num_layers", "num_decoder_layers", "n_layer", "n_layers", "num_local_experts",
          "num_experts")  # fmt: skip
WIDTHS = "hidden_size", "d_model", "n_embd", "dim", "head_dim", "d_kv"
# What Python and JAX raise where a value is of no use.
UNUSABLE = TypeError, ValueError, KeyError, IndexError, AttributeError, ArithmeticError


def load(
    name: str | Path,
    *,
    dtype: Any = None,
    quantize: Callable | None = None,
    mesh: Mesh | None = None,
    axes: Mapping[str, str] = AXES,
    task: str | None = None,
    num_labels: int | None = None,
    key: jax.Array | None = None,
    check_finite: bool = False,
    revision: str | None = None,
    **options: Any,
) -> "tuple[nn.Module, dict, Tokenizer | None]":
    """`(model, params, tokenizer)` of a directory, or of a repository of the Hugging Face hub.

    Reads `config.json`, `model.safetensors` or the files that its index names, and `tokenizer.json`. Parameters are
    read one after another, a layer or an expert at a time where they are stacked, and each becomes what it is to be
    before the next is read: beyond the result it takes the memory of two tensors at most.

    **Arguments:**

    - `dtype`: of the parameters, and of what the model computes in. Left out, each is as in the file, and the model
      computes in the type that most of them have, by bytes.
    - `quantize`: a transform that waits for its tree: `jpeft.nf4()`, or a `jpeft.chain` of several. They are given the
      model's `sites`, so that stacked layers and experts need no targets.
    - `mesh`, `axes`: devices to divide the parameters over, as `jpeft.models.shardings` does.
    - `task`, `num_labels`: a head for a task. The parameters of a head, and only these, may be missing in the file:
      then they are initialised from `key`.
    - `key`: `jax.random.key(0)` if left out.
    - `check_finite`: whether NaN and infinity are refused.
    - `revision`: of a repository: a branch, a tag or a commit.
    - `options`: of the model: `scan=True` stacks the layers, `remat` names what a backward pass recomputes; see there.

    **Returns** the tokenizer as its file has it, `None` where there is none.

    **Raises** `FileNotFoundError` for what is not there, `ModuleNotFoundError` with what to install, and `FormatError`,
    a `ValueError`, for files that are damaged or leave the directory, for fields of `config.json` that are not
    understood, and, all at once, for tensors that are missing, unexpected, or of another shape or type.
    """
    directory = locate(name, revision=revision)
    fields, architecture = describe(directory)
    stored = checkpoint(directory)
    own = dtype or most_common(stored.values())
    given = {"head": task, "num_labels": num_labels} | options
    options = {name: x for name, x in given.items() if x is not None}
    try:
        _check_sizes(fields, stored.values())
        model = _build(architecture, fields, dtype=own, param_dtype=own, **options)
        shapes = parameter_shapes(architecture, model)
        head = architecture.head if task else NOTHING
        sources, new = match(architecture, model, shapes, stored, dtype=dtype, head=head)
    except UNUSABLE as error:
        of_ours = isinstance(error, ValueError)
        words = error if of_ours else f"no model can be made of config.json and the options: {error!r}"
        raise FormatError(f"{directory}: {words}") from error
    with progress(f"Reading {directory.name}", sum(x.nbytes for x in stored.values())) as advance:
        divided = shardings(shapes, mesh, axes=axes) if mesh else {}
        reader = _Reader(sources, divided, check_finite, advance)
        initial = _initial(architecture, model, new, key)
        initial = {path: jax.device_put(x, divided.get(path)) for path, x in initial.items()}
        params: Any = unflatten_dict({path: reader.lazy(path) for path in sources} | initial, sep="/")
        if quantize:
            how = {} if key is None else {"key": key}
            if takes_sites(quantize):
                how["sites"] = model_sites(architecture, model, shapes)
            params = quantize(params, **how)
        params = jax.tree.map(read, params)
    if reader.bad:
        lines = [f"{directory} has tensors with NaN or infinity, parts of:", *sorted(reader.bad)]
        raise FormatError("\n  ".join(lines))
    return model, params, load_tokenizer(directory)


def describe(directory: Path) -> tuple[dict[str, Any], Architecture]:
    """The fields of a directory's `config.json`, and the architecture that they are of."""
    fields = read_json(directory, "config.json")
    if fields is None:
        raise FileNotFoundError(f"{directory} has no config.json: it is no model's directory.")
    model_type, known = fields.get("model_type"), architectures.ARCHITECTURES
    if not isinstance(model_type, str) or model_type not in known:
        raise FormatError(f"{directory} has model_type {model_type!r}; supported: {', '.join(sorted(known))}.")
    return fields, known[model_type]


def _check_sizes(fields: Mapping[str, Any], stored: Collection[Tensor]) -> None:
    """Refuse a `config.json` that is out of proportion to the tensors, before anything of its sizes is made."""
    longest = max((n for tensor in stored for n in tensor.shape), default=0)
    given = {name: x for name, x in fields.items() if type(x) in (int, float)}
    large = {name: given[name] for names, most in ((COUNTS, len(stored)), (WIDTHS, longest)) for name in names
             if given.get(name, 0) > most}  # fmt: skip
    if large:
        raise ValueError(f"config.json says {large}, but there are {len(stored)} tensors, of axes up to {longest}.")


def _build(architecture: Architecture, fields: Mapping[str, Any], **options: Any) -> nn.Module:
    """The model of a `config.json`."""
    if "head" in options and architecture.head == NOTHING:
        raise ValueError(f"{fields['model_type']} has no heads for tasks: leave `task` and `num_labels` out.")
    return architecture.build(fields, **options)


def load_tokenizer(directory: Path) -> "Tokenizer | None":
    """The tokenizer that `tokenizer.json` describes; `None` where there is none."""
    text = read_bytes(directory, "tokenizer.json")
    if text is None:
        return None
    tokenizers = extra("tokenizers")
    try:
        return tokenizers.Tokenizer.from_buffer(text)
    except BaseException as error:  # a panic of the library is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise FormatError(f"{directory / 'tokenizer.json'} describes no tokenizer: {error}") from error


def model_sites(architecture: Architecture, model: nn.Module, shapes: Mapping[str, jax.ShapeDtypeStruct]) -> Sites:
    """What `jpeft.sites` tells of a checkpoint's model, before its tensors are read."""
    return sites(model, {"params": unflatten_dict(shapes, sep="/")}, **architecture.inputs(model))


def parameter_shapes(architecture: Architecture, model: nn.Module) -> dict[str, jax.ShapeDtypeStruct]:
    """The shape and dtype of every parameter of a model, by path."""
    return flatten_dict(jax.eval_shape(_init(architecture, model), jax.random.key(0)), sep="/")


def _init(architecture: Architecture, model: nn.Module) -> Callable[[jax.Array], dict]:
    def init(key):
        inputs = {name: jnp.zeros(x.shape, x.dtype) for name, x in architecture.inputs(model).items()}
        return model.init(key, **inputs)["params"]

    return init


def _initial(architecture: Architecture, model: nn.Module, paths: list[str], key: jax.Array | None) -> dict[str, Any]:
    """The named parameters as the model initialises them; compiled, so that the others are not formed."""
    init = _init(architecture, model)
    pick = lambda key: {path: x for path, x in flatten_dict(init(key), sep="/").items() if path in paths}
    return jax.jit(pick)(jax.random.key(0) if key is None else key) if paths else {}


@dataclasses.dataclass
class _Reader:
    """Makes parameters that wait to be read, and keeps the paths of those that were not finite."""

    sources: Mapping[str, Source]
    shardings: Mapping[str, Any]
    check_finite: bool
    advance: Callable[[int], None]
    bad: set[str] = dataclasses.field(default_factory=set)

    def lazy(self, path: str) -> Lazy:
        source = self.sources[path]
        part = functools.partial(self._part, path, source)
        over = self.shardings[path].spec[: source.depth] if self.shardings else ()
        return Lazy(source.shape, source.dtype, part, source.depth, tuple(over))

    def _part(self, path: str, source: Source, index: Index) -> jax.Array:
        x = source.read(index)
        if self.check_finite and not np.isfinite(x).all():
            self.bad.add(path)
        self.advance(sum(tensor.nbytes for tensor, _ in source.parts[index]))
        if not self.shardings:
            return jax.device_put(x)
        whole = self.shardings[path]
        sharding = NamedSharding(whole.mesh, PartitionSpec(*whole.spec[source.depth :]))
        return jax.make_array_from_callback(x.shape, sharding, lambda at: x[at])
