"""The form of a base that a saved adapter needs: whether its layers are stacked, its type, and how it is quantized."""

import collections
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jpeft
from jpeft._manifest import class_name
from jpeft._storage import MANIFEST, Json, read


QUANTIZERS = {class_name(jpeft.NF4): jpeft.nf4, class_name(jpeft.Int8): jpeft.int8, class_name(jpeft.Int4): jpeft.int4}


class Base(NamedTuple):
    """What `jpeft.restore` is to be given.

    **Fields:**

    - `scan`: whether the layers are stacked.
    - `dtype`: of the parameters.
    - `quantized`: of kernels that were, by path, the name of the class that holds their codes.
    """

    scan: bool
    dtype: str
    quantized: dict[str, str]

    @classmethod
    def of(cls, adapter: Path) -> "Base":
        """That which the checkpoint was saved with. Raises as `jpeft.restore` does for one that cannot be read."""
        parameters = read(adapter.absolute())[0]["parameters"]
        nodes = {path: _innermost(entry["is"]) for path, entry in parameters.items()}
        dtypes = collections.Counter(entry["dtype"] for entry in parameters.values())
        quantized = {path: node for path, node in nodes.items() if node in QUANTIZERS}
        return cls(any(path.startswith("layers/") for path in parameters), dtypes.most_common(1)[0][0], quantized)

    def quantizer(self, sites: jpeft.Sites) -> Callable[..., Any]:
        """The transform that quantizes what was, as its default does."""

        def quantize(params: Any, *, key: Any = None) -> Any:
            for node in set(self.quantized.values()):
                chosen = lambda path, _, node=node: self.quantized.get(path) == node
                params = QUANTIZERS[node](params, targets=chosen, sites=sites)
            return params

        return quantize


def is_saved(directory: Path) -> bool:
    """Whether `jpeft.save` wrote the directory."""
    return (directory / MANIFEST).is_file()


def _innermost(entry: Json) -> str:
    """The class of what stands in place of the parameter itself, under all that is put on it; `""` for an array."""
    node = ""
    while isinstance(entry, dict) and "node" in entry:
        node, entry = entry["node"], entry["fields"].get("base")
    return node
