"""Nodes: what stands in a parameter tree where a method has been applied.

A node is a small formula. A `Leaf` stands *in place of* a parameter and says what that parameter now is; an `Additive`
stands *beside* a module's parameters and says what happens to what flows through the module. Every node is a pytree:
its arrays are leaves, its numbers are static.
"""

import abc
import dataclasses
import enum
import functools
from collections.abc import Callable
from typing import Annotated, Any, Self, dataclass_transform, get_type_hints

import jax
import jax.numpy as jnp
from flax.core import meta
from jax.sharding import NamedSharding, PartitionSpec

from ._division import Division
from ._kernel import STACK, fold, stacked, unfold
from ._mesh import explicit_mesh, sharding_of
from ._shared import SHARED, is_shared, refs, unshare


class Role(enum.Enum):
    """What becomes of a field: it trains, it is an array that does not, or it is a constant of the computation."""

    TRAINABLE = "trainable"
    FROZEN = "frozen"
    STATIC = "static"

    def __getitem__(self, item):
        kind, dims = item if isinstance(item, tuple) else (item, None)
        return Annotated[kind, self, dims]


# `Trainable[jax.Array, "in rank"]`: the array's type and, if given, the meaning of its axes: `in` and `out` are those
# of the kernel, any other name is the method's own. Axes stacked over layers or experts come before them, unnamed.
Trainable = Role.TRAINABLE
Frozen = Role.FROZEN
Static = Role.STATIC


@dataclass_transform(frozen_default=True, kw_only_default=True)
class Node(abc.ABC):  # noqa: B024 - what it asks of a subclass is fields
    """Abstract base of every node: a frozen dataclass and a pytree, each of whose fields declares its role.

    **Raises** `TypeError`, when the class is made, for a field that is not `Trainable[...]`, `Frozen[...]` or
    `Static[...]`.
    """

    roles: dict[str, Role] = dataclasses.field(init=False, repr=False)
    dims: dict[str, tuple[str, ...] | None] = dataclasses.field(init=False, repr=False)

    # What lets nodes of a class be computed together: the axes that zeros may lengthen without any effect, and the
    # arrays that the static number `scale` can be multiplied into.
    grows = ()
    scaled_by = ()

    local = ()  # static fields that tell of the devices of this run: they are not saved

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        cls.roles, cls.dims = {}, {}
        for name, hint in get_type_hints(cls, include_extras=True).items():
            if name in ("roles", "dims"):
                continue
            marks = getattr(hint, "__metadata__", ())
            if not (marks and isinstance(marks[0], Role)):
                raise TypeError(f"`{cls.__name__}.{name}` must be Trainable[...], Frozen[...] or Static[...].")
            cls.roles[name] = marks[0]
            cls.dims[name] = marks[1].split() if len(marks) > 1 and marks[1] is not None else None
        dataclasses.dataclass(frozen=True, kw_only=True, eq=False)(cls)
        arrays = [name for name, role in cls.roles.items() if role is not Role.STATIC]
        jax.tree_util.register_dataclass(cls, arrays, [name for name in cls.roles if name not in arrays])

    def replace(self, **changes) -> Self:
        """The node with some of its fields changed."""
        return dataclasses.replace(self, **changes)

    def parts(self, *roles: Role) -> dict[str, Any]:
        """The fields of the given roles, by name."""
        return {name: getattr(self, name) for name, role in self.roles.items() if role in roles}

    def at_rest(self, task: int | None = None) -> "Node | None":
        """The node of fewer arrays, if there is one, that computes the same in calls without a key; `None` for nothing.

        `task` tells whose, of what is one for every task.
        """
        return self

    def divided(self, division: Division) -> Self:
        """The node with the `NamedSharding` of every array in its place, for a parameter so divided.

        **Raises** `ValueError` for one that cannot be.
        """
        own = self.parts(Role.TRAINABLE, Role.FROZEN)
        one = lambda name, x: division.array(x.shape, self.dims[name])
        return self.replace(**{name: jax.tree.map(functools.partial(one, name), x) for name, x in own.items()})


class Leaf(Node, meta.AxisMetadata):
    """Stands in place of a parameter. Flax unboxes it wherever a module asks for that parameter."""

    @abc.abstractmethod
    def value(self) -> jax.Array:
        """The parameter that this node stands for."""

    def take(self, fn: Callable[[jax.Array, int], jax.Array], axis: int, drop: bool) -> "Leaf | None":
        """The node of that part of the parameter which `fn(array, axis)` takes; `None` if there is no such node.

        `drop` tells that `fn` removes the axis.
        """
        return None

    def drawn(self, key: jax.Array) -> "Leaf":
        """The node as one call with a key for its randomness sees it, where it has some: its noise drawn."""
        return self

    @property
    def original(self) -> Any:
        """What stood here before: an array, a box or another `Leaf`; `None` if the node does not keep it."""
        return None

    def rebuild(self, parameter: Any) -> "Leaf":
        """The node made whole, over what stands at its place in a base tree: for one read back without its base."""
        return self

    def divided(self, division):
        like = _shape(self).ndim
        one = lambda x: division.like_parameter(x.shape) if x.ndim == like else division.array(x.shape, None)
        return jax.tree.map(one, self)

    def told(self, division: Division) -> "Leaf":
        """The node, told how its parameter is divided."""
        return self

    def spec(self, of: Callable[[Any], PartitionSpec]) -> PartitionSpec:
        """How its parameter is divided, where `of(array)` tells that of its arrays."""
        like = _shape(self).ndim
        return next((of(x) for x in jax.tree.leaves(self) if x.ndim == like), PartitionSpec())

    # Flax's protocol for a boxed parameter.

    def unbox(self):
        if names := refs(self):
            raise ValueError(
                f"A {type(self).__name__} uses {', '.join(names)} of params['{SHARED}'], which a parameter by itself "
                "does not know. Call the model through `jpeft.apply`, or within `jpeft.intercept()`."
            )
        return self.value()

    def replace_boxed(self, val):
        return val

    def add_axis(self, index, params):
        return self

    def remove_axis(self, index, params):
        return self


class Matrix(Leaf):
    """A `Leaf` whose arrays belong to the `(in, out)` matrices of a kernel, one for each place of its stacked axes."""

    axes: Static[str] = "io"  # the letters of the kernel's axes; every array but a base has its stacked axes first

    @property
    def depth(self) -> int:
        """How many axes are stacked."""
        return self.axes.count(STACK)

    def settle(self, w: jax.Array) -> Self:
        """The node, once made, told of the whole kernel that it stands for."""
        return self

    divided = Node.divided

    def take(self, fn, axis, drop):
        if self.axes[axis] != STACK:
            return None
        place = self.axes[:axis].count(STACK)
        cut = lambda x: x if is_shared(x) else fn(x, place)
        arrays = self.parts(Role.TRAINABLE, Role.FROZEN)
        base = arrays.pop("base", None)
        changes = {name: jax.tree.map(cut, x, is_leaf=is_shared) for name, x in arrays.items()}
        if base is not None:
            changes["base"] = take(base, fn, axis, drop)
        if drop:
            changes["axes"] = self.axes[:axis] + self.axes[axis + 1 :]
        return None if base is not None and changes["base"] is None else self.replace(**changes)

    def remove_axis(self, index, params):
        if self.axes[:index].count(STACK) != index or self.axes[index] != STACK:
            raise ValueError(
                f"A {type(self).__name__} with axes {self.axes!r} was sliced along axis {index} by a lifted "
                "transform, which its own arrays do not have there. Call the model through `jpeft.apply`, or within "
                "`jpeft.intercept()`."
            )
        base = {"base": self.base.remove_axis(index, params)} if isinstance(self.original, meta.AxisMetadata) else {}
        return self.replace(axes=self.axes[:index] + self.axes[index + 1 :], **base)

    def each(self, fn: Callable, *args: Any, mapped: list[tuple[int | None, ...]] | None = None) -> Any:
        """`fn(node, *args)` for the node of every matrix, with the stacked axes first in the result.

        `mapped` tells for each stacked axis which of `args` have it: `0` for first, `None` for no. By default all do.
        """
        lone = self.replace(axes=self.axes.replace(STACK, ""))
        node = jax.tree.map(lambda x: None if is_shared(x) else 0, lone, is_leaf=is_shared)
        levels = [(0,) * len(args)] * self.depth if mapped is None else mapped
        run = lambda node, *args: fn(unshare(node), *args)
        return stacked(run, self.depth, [(node, *axes) for axes in levels])(lone, *args)


class Reparam(Matrix):
    """A kernel as a formula of its frozen base. Subclasses see one `(in, out)` matrix, whatever the kernel's shape."""

    base: Frozen[Any] = None  # the kernel as it was: an array, or a `Leaf` of its own

    @property
    def original(self):
        return self.base

    def rebuild(self, parameter):
        return self.replace(base=parameter)

    def drawn(self, key):
        return self.replace(base=self.base.drawn(key)) if isinstance(self.base, Leaf) else self

    def divided(self, division):
        base = self.base.divided(division) if isinstance(self.base, Leaf) else division.each(self.base)
        return Node.divided(self.replace(base=None), division).replace(base=base)

    def told(self, division):
        return self.replace(base=self.base.told(division)) if isinstance(self.base, Leaf) else self

    def spec(self, of):
        return spec(self.base, of)

    @abc.abstractmethod
    def weight(self, w: jax.Array) -> jax.Array:
        """The matrix that this node makes of its base `w`, both `(in, out)`."""

    def value(self):
        return self.exact().astype(jax.eval_shape(value, self.base).dtype)

    def exact(self) -> jax.Array:
        """The value in float32 at least: small updates are lost in a sum of bfloat16s, so a merge casts last."""
        return unfold(self.of_base(lambda node, w: node.weight(w)), whole(self).shape, self.axes)

    def within(self, dtype: Any) -> "Reparam":
        """The node, without its base, as a computation in `dtype` has it."""
        return cast(self.replace(base=None), dtype)

    def of_base(self, fn: Callable[[Self, jax.Array], jax.Array]) -> jax.Array:
        """`fn(node, w)` for every matrix of the base, in float32 at least, with the stacked axes first."""
        w = widened(self.base.exact() if isinstance(self.base, Reparam) else value(self.base))
        return self.within(w.dtype).each(fn, fold(w, self.axes))


class Branch(Reparam):
    """A `Reparam` that can also act on activations, without forming its matrix."""

    @abc.abstractmethod
    def branch(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        """`x @ (self.weight(w) - w)` for every `w`: `(..., in)` -> `(..., out)`, linear in `x`.

        `key` is there when dropout is on. Only `x @ matrix` is promised to be fast: where the kernel is looked up or
        convolved with, `x` is an operand that multiplies without being formed.
        """


class Amplified(Reparam):
    r"""A `Reparam` of the form $(W + D)\,\mathrm{diag}(g)$, that can act on activations without forming its matrix.

    Only $g$ may depend on $W$.
    """

    @abc.abstractmethod
    def branch(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        """`x @ D`, as a `Branch` has it."""

    @abc.abstractmethod
    def gain(self, w: jax.Array) -> jax.Array:
        """`g (out,)`: what every output is multiplied with, where the base is `w (in, out)`."""


class Additive(Node):
    """Stands beside a module. Subclasses override one of these."""

    innermost = False  # whether it acts inside of all others, whenever it was attached
    ahead = 0  # how many positions it puts before those of a model's tokens

    @property
    def random(self) -> bool:
        """Whether it draws random numbers, where a call is given a `"dropout"` key: where it has dropout."""
        return bool(getattr(self, "dropout", 0))

    def inputs(self, *args: jax.Array) -> tuple[jax.Array, ...]:
        """What the module is called with."""
        return args

    def output(self, y: Any, *args: jax.Array) -> Any:
        """What the module returns, where it made `y` of `args`."""
        return y

    def around(self, call: Callable, key: jax.Array | None, *args: Any, **kwargs: Any) -> Any:
        """The call as a whole, for what `inputs` and `output` cannot say.

        `key` is there where the call of the model has one, and the node is `random`.
        """
        args = self.inputs(*args)
        return self.output(call(*args, **kwargs), *args)


class Affine(Additive):
    """An `Additive` that makes another affine map of the one it stands beside: it can be merged into its weights."""

    axes: Static[str] = "io"  # the letters of the kernel's axes; every array has the stacked ones first

    @abc.abstractmethod
    def merged(self, w: jax.Array, bias: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
        """The kernel `(in, out)` and the bias `(out,)`, where there is one, that the module would have to have.

        **Raises** `ValueError` where there are none.
        """


def cast(tree: Any, dtype: Any) -> Any:
    """The tree with its floating-point arrays in `dtype`."""
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def widened(x: jax.Array) -> jax.Array:
    """In float32 at least."""
    return x.astype(jnp.float32) if jnp.finfo(x.dtype).bits < 32 else x


def is_node(x: Any) -> bool:
    return isinstance(x, Node)


def is_param(x: Any) -> bool:
    """Whether `x` stands where Flax has one parameter: a node, or a box such as `nn.Partitioned`."""
    return isinstance(x, Node | meta.AxisMetadata)


def value(x: Any) -> jax.Array:
    """The array that `x` is, or stands for."""
    if isinstance(x, Leaf):
        return x.value()
    return value(x.unbox()) if isinstance(x, meta.AxisMetadata) else x


def whole(x: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype of the parameter that `x` is or stands for, and on explicit axes its sharding."""
    while isinstance(x, Reparam):
        x = x.base
    mesh = explicit_mesh(x)
    if mesh is None:
        return jax.eval_shape(value, x)
    over = NamedSharding(mesh, spec(x, lambda a: jax.typeof(a).sharding.spec))
    return jax.ShapeDtypeStruct(_shape(x).shape, _shape(x).dtype, sharding=over)


def _shape(x: Any) -> jax.ShapeDtypeStruct:
    """`whole`, of arrays whose types tell of no mesh."""
    return jax.eval_shape(value, jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), x))


def spec(x: Any, of: Callable[[Any], PartitionSpec]) -> PartitionSpec:
    """How the parameter that `x` is or stands for is divided, where `of(array)` tells that of its arrays."""
    return x.spec(of) if isinstance(x, Leaf) else of(jax.tree.leaves(x)[0])


def sharding(x: Any) -> NamedSharding | None:
    """That of the parameter which `x` is or stands for, as its arrays have it; `None` where they are on no mesh.

    Of an array that is traced it is known where the axes of its mesh are explicit.
    """
    on = [found for found in map(sharding_of, jax.tree.leaves(x)) if isinstance(found, NamedSharding)]
    return NamedSharding(on[0].mesh, spec(x, lambda a: sharding_of(a).spec)) if on else None


def rebox(x: Any, new: Any) -> Any:
    """`new` in the box, such as `nn.Partitioned`, that stood where `x` stands, if one did."""
    while isinstance(x, Leaf):
        x = x.original
    return x.replace_boxed(new) if isinstance(x, meta.AxisMetadata) else new


def take(x: Any, fn: Callable, axis: int, drop: bool) -> Any:
    """`fn(array, axis)` of an array, a box or a `Leaf`; `None` where a `Leaf` has no such part."""
    if isinstance(x, Leaf):
        return x.take(fn, axis, drop)
    return fn(value(x), axis)
