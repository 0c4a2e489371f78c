"""Adapters of Hugging Face's PEFT: into a tree of parameters, and out of it."""

import functools
import json
import re
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from .._manifest import is_form
from .._node import Additive, Leaf, Node, Reparam, rebox, value
from .._shared import Ref, share
from .._tree import Params, place, put
from ..selective._unfreeze import Free
from . import _mlx, _reading, _writing
from ._adapter_config import fill, pattern_faults
from ._atomic import whole
from ._errors import AdapterFormatError, FormatError
from ._repository import file, foreign, locate, read_json
from ._safetensors import tensors, write
from ._tree import Tree
from ._vllm import vllm_faults
from .formats import FORMATS, WITHIN
from .formats._format import Config, Format


CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
DTYPES = ("float32", "float16", "bfloat16")
INTEGERS = ("uint8", "int16", "int32")
LARGEST_CONFIG, LARGEST_ADAPTER = 2**20, 16 * 2**30  # bytes


def load_adapter(
    name: str | Path, params: Params, *, model: nn.Module | None = None, max_bytes: int = LARGEST_ADAPTER
) -> Params:
    """The tree with the adapter of a directory, or of a repository of the Hugging Face hub, in it.

    Every tensor becomes a node, or a part of one, with the file's numbers in the file's dtype: `save_adapter` writes
    the same tensors. An adapter of separate layers goes into a tree that has them stacked, and one of separate kernels
    into a tree that has them joined, where that is exact. Layers without LoRA get one of zeros there, which has no
    gradient. Adapters of mlx-lm are read, too.

    **Arguments:**

    - `params`: of the model that the adapter is for, quantized or not, with or without other nodes.
    - `model`: tells the names that transformers has for the parameters; left out, the tree's own structure does.
    - `max_bytes`: of the file of tensors; a larger one is refused before it is read.

    **Raises** `FileNotFoundError` where there is no adapter in the safetensors format: a pickle is never read; and
    `AdapterFormatError`, a `ValueError`, for files that are damaged, and with everything that does not fit: fields of
    the config that are not understood or cannot be reproduced, tensors that are missing, unexpected, of another shape
    or dtype, or not finite. What is wrong with `params` or `model` is a plain `ValueError`.
    """
    directory = locate(name)
    try:
        form, filled, arrays, mlx = _read(directory, max_bytes)
    except AdapterFormatError:
        raise
    except FormatError as error:
        raise AdapterFormatError(str(error)) from error
    tree = Tree.of(params, model, [re.sub(r"^base_model\.(model\.)?", "", name) for name in arrays])
    arrays = _mlx.one_by_one(arrays, tree) if mlx else arrays
    found = _reading.read(form, filled, arrays, tree)
    nodes = _reading.nodes_at(found, tree) if not found.faults else {}
    if found.faults:
        raise _refusal(directory, found.faults)
    try:
        params = _placed(params, nodes, found, tree)
        if form.around is not None:
            params = place(params, {"": form.around}, type(form.around).__name__.lower())
        if form.wide is None:
            return params
        return form.wide.put(params, tree, filled, {name: jnp.asarray(x) for name, x in found.wide.items()})
    except ValueError as error:
        raise _refusal(directory, [str(error)]) from None


def _read(directory: Path, max_bytes: int) -> tuple[Format, Config, dict[str, np.ndarray], bool]:
    """The format of an adapter, its config with defaults in it, its tensors, and whether it is of mlx-lm."""
    config = read_json(directory, CONFIG, largest=LARGEST_CONFIG)
    if config is None:
        raise FileNotFoundError(f"{directory} has no {CONFIG}: it is no directory of an adapter.")
    mlx = _mlx.is_mlx(config)
    form, filled, faults = _of_mlx(config) if mlx else _of_peft(directory, config)
    arrays, more = _stored(directory, _mlx.WEIGHTS if mlx else WEIGHTS, form, max_bytes)
    if faults := more + faults:
        raise _refusal(directory, faults)
    return form, filled, arrays, mlx


def _refusal(directory: Path, faults: list[str]) -> AdapterFormatError:
    return AdapterFormatError("\n  ".join([f"{directory} cannot be loaded as it is:", *faults]))


def _of_peft(directory: Path, config: Config) -> tuple[Format, Config, list[str]]:
    """The format of an adapter, its config with defaults in it, and what is wrong there."""
    kind = config.get("peft_type")
    form = FORMATS.get(kind) if isinstance(kind, str) else None
    if form is None:
        raise AdapterFormatError(f"{directory} has peft_type {kind!r}; supported: {', '.join(sorted(FORMATS))}.")
    filled, faults = fill(config, form.fields, form.unused)
    if (bias := filled.get("bias", "none")) not in ("none", "all", form.bias):
        faults.append(f"bias = {bias!r}: it must be one of {['none', 'all', *filter(None, [form.bias])]}")
    faults = faults or pattern_faults(filled, form.patterns, form.fields)
    checked = [form, *filter(None, [WITHIN.get(form.peft_type)])]
    return form, filled, faults or [fault for x in checked for fault in x.check(filled)]


def _of_mlx(config: Config) -> tuple[Format, Config, list[str]]:
    filled, faults = _mlx.own_config(config)
    return (_mlx.FULL if filled["kind"] == "full" else _mlx.MLX), filled, faults


def _stored(directory: Path, name: str, form: Format, max_bytes: int) -> tuple[dict[str, np.ndarray], list[str]]:
    """The tensors of an adapter's file, and those that are not of a dtype that the format has, or not finite."""
    path = file(directory, name)
    if path is None:
        raise FileNotFoundError(f"{directory} has no {name}.{foreign(directory)}")
    if (size := path.stat().st_size) > max_bytes:
        raise AdapterFormatError(f"{path} has {size} bytes: {max_bytes} at most are read. Pass `max_bytes=` for more.")
    found = tensors(path)
    dtypes = {n: (*DTYPES, *(INTEGERS if n.endswith(form.integers) else ())) for n in found}
    faults = [f"dtype: {n} is {x.dtype}, expected one of {', '.join(dtypes[n])}" for n, x in found.items()
              if str(x.dtype) not in dtypes[n]]  # fmt: skip
    arrays = {} if faults else {n: x.read() for n, x in found.items()}
    faults += [f"not finite: {n}" for n, x in arrays.items() if not np.isfinite(x.astype(np.float32)).all()]
    return arrays, faults


def _placed(params: Params, nodes: dict[str, list[Node]], found: _reading.Reading, tree: Tree) -> Params:
    """The tree with nodes and arrays in it."""
    params, refs = share(params, **jax.tree.map(jnp.asarray, found.shared)) if found.shared else (params, {})
    ready = lambda node: _refilled(node, refs)
    new = {path: _reading.array(tree.leaves[path], group) for path, group in _reading.by_path(found.plain).items()}
    train = {m.path for m in found.declared}
    frozen = {path: x for path, x in new.items() if path not in train and not _is(tree.leaves[path], x)}
    held = [path for path in frozen if isinstance(tree.leaves[path], Leaf) and not is_form(tree.leaves[path])]
    if held:
        raise ValueError(f"the file has another {', '.join(held)} than what the nodes in the tree are over, or train")
    kept = {path: functools.partial(_unchanged, x=x) for path, x in frozen.items()}
    params = put(params, kept, over_nodes=True)
    free = {path: lambda old, x=x: Free(array=rebox(old, jnp.asarray(x))) for path, x in new.items() if path in train}
    params = put(params, free)
    own = {path: node for path, several in nodes.items() for node in several if not isinstance(node, Additive)}
    params = put(params, {path: lambda old, n=n: _over(ready(n), old) for path, n in own.items()}, over_nodes=True)
    for path, several in nodes.items():
        for node in several:
            if isinstance(node, Additive):
                params = place(params, {path.rpartition("/")[0]: ready(node)}, type(node).__name__.lower())
    return params


def _refilled(node: Node, refs: dict[str, Ref]) -> Node:
    """The node in JAX's arrays, with the names that shared ones have in the tree."""
    is_ref = lambda x: isinstance(x, Ref)
    return jax.tree.map(lambda x: refs[x.name] if is_ref(x) else jnp.asarray(x), node, is_leaf=is_ref)


def _over(node: Any, old: Any) -> Node:
    return node.replace(base=old) if isinstance(node, Reparam) else node


def _unchanged(old: Any, x: np.ndarray) -> Any:
    return rebox(old, jnp.asarray(x))


def _is(leaf: Any, x: np.ndarray) -> bool:
    """Whether a parameter, or what nodes are over, is this array, as far as its dtype tells."""
    while isinstance(leaf, Reparam):
        leaf = leaf.base
    base = np.asarray(value(leaf))
    return bool(np.array_equal(base, x.astype(base.dtype)))


def save_adapter(
    directory: str | Path,
    params: Params,
    *,
    model: nn.Module | None = None,
    for_vllm: bool = False,
    base_model_name_or_path: str | None = None,
    task_type: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write the adapter that the nodes of a tree are: `adapter_config.json` and `adapter_model.safetensors`.

    PEFT and what reads its format load it. Parameters that train themselves go with it: as biases, or with the modules
    that they are of. `PiSSA` nodes become the LoRA of twice the rank that they amount to.

    **Arguments:**

    - `model`: as for `load_adapter`.
    - `for_vllm`: refuse what vLLM does not serve.
    - `base_model_name_or_path`, `task_type`: what the config says of the model, such as `"CAUSAL_LM"`; PEFT needs the
      type for prompts, where it is found out if it is left out.
    - `overwrite`: replace an adapter that is at `directory`, with everything beside it there.

    **Raises** `FileExistsError` for what is there already, and `ValueError`, all at once, for nodes that PEFT or vLLM
    does not have, and for what differs between modules where PEFT has one for all.
    """
    out = _writing.write(params, Tree.of(params, model), task_type)
    faults = out.faults or (vllm_faults(out.config) if for_vllm else [])
    if faults:
        raise ValueError("\n  ".join(["This tree has no adapter of PEFT's format:", *faults]))
    given = {"base_model_name_or_path": base_model_name_or_path, "inference_mode": True}
    with whole(directory, mark=CONFIG, overwrite=overwrite) as new:
        write(new / WEIGHTS, out.tensors)
        (new / CONFIG).write_text(json.dumps(out.config | given, indent=2, sort_keys=True) + "\n")
