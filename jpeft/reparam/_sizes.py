"""How large kernels are, for methods that must know all of them before the first is wrapped."""

from .._kernel import folded
from .._node import whole
from .._targets import Option, Sites, Targets, kernels, named_leaves, options
from .._tree import Params


def sizes(params: Params, targets: Targets | None, sites: Sites | None) -> dict[str, tuple[int, ...]]:
    """Inputs and outputs of every targeted kernel, by name."""
    leaves = named_leaves(params)
    axes = kernels(params, targets, sites)
    return {name: folded(whole(leaves[name]).shape, letters)[-2:] for name, letters in axes.items()}


def check_divides(params: Params, targets: Targets | None, sites: Sites | None, **given: Option) -> None:
    """**Raises** `ValueError`, with every path, for kernels with inputs or outputs that an option does not divide.

    `given` is the option, by its name: one number, or a mapping from patterns to numbers.
    """
    ((option, _),) = given.items()
    found = sizes(params, targets, sites)
    numbers = {name: x[option] for name, x in options(given, list(found)).items()}
    wrong = [
        f"  {name}: {d_in} inputs, {d_out} outputs, {option}={numbers[name]}"
        for name, (d_in, d_out) in found.items()
        if numbers[name] < 1 or d_in % numbers[name] or d_out % numbers[name]
    ]
    if wrong:
        raise ValueError(
            f"`{option}` must divide the inputs and the outputs of every kernel, and does not divide these:\n"
            + "\n".join(wrong)
            + f"\nTake another `{option}`, or leave them out of `targets`."
        )
