"""Nodes within other nodes, of which nothing trains."""

from typing import Any, Self

import jax

from ._manifest import class_name, classes
from ._node import Frozen, Node, Role, Static, is_node


class Still(Node):
    """A node of which nothing trains: its arrays, and what else makes it."""

    arrays: Frozen[dict[str, Any]]
    kind: Static[str]
    constants: Static[tuple[tuple[str, Any], ...]]

    @classmethod
    def of(cls, node: Node) -> Self:
        still = lambda x: cls.of(x) if is_node(x) else x
        arrays = jax.tree.map(still, node.parts(Role.TRAINABLE, Role.FROZEN), is_leaf=is_node)
        return cls(arrays=arrays, kind=class_name(type(node)), constants=tuple(node.parts(Role.STATIC).items()))

    @property
    def node(self) -> Any:
        return classes()[self.kind](**thawed(self.arrays), **dict(self.constants))


def is_still(x: Any) -> bool:
    return isinstance(x, Still)


def thawed(tree: Any) -> Any:
    """The tree with the nodes themselves in place of their still forms."""
    return jax.tree.map(lambda x: x.node if is_still(x) else x, tree, is_leaf=is_still)
