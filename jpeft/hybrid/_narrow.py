"""A model of the same kind, some times narrower."""

import dataclasses

import flax.linen as nn


# The widths of a model, by their names in its config.
WIDTHS = ("hidden_size", "intermediate_size", "moe_intermediate_size", "head_dim", "d_model", "d_kv", "d_ff")


def narrowed(model: nn.Module, reduction: int) -> nn.Module:
    """`model`, every width of whose `config` is divided by `reduction`. It has as many layers and heads.

    **Raises** `ValueError` for a model without a config of known widths, and, with all of them, for widths that it does
    not divide.
    """
    config = getattr(model, "config", None)
    known = {f.name for f in dataclasses.fields(config)} if dataclasses.is_dataclass(config) else set()
    widths = {name: getattr(config, name) for name in WIDTHS if name in known and getattr(config, name) is not None}
    if not widths:
        raise ValueError(
            f"What is narrow in a narrow {type(model).__name__}? Its field `config` is to be a dataclass that has some "
            f"of {', '.join(WIDTHS)}."
        )
    if reduction < 1 or any(size % reduction for size in widths.values()):
        raise ValueError(f"`reduction` {reduction} does not divide all widths of the model: {widths}.")
    narrow = dataclasses.replace(config, **{name: size // reduction for name, size in widths.items()})
    return model.clone(config=narrow, parent=None, name=None)
