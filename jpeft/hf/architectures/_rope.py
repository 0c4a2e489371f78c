"""Rotations in `config.json`: `rope_parameters` as transformers 5 writes them, and what version 4 had instead."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ...models._decoder_config import FULL, SLIDING, DecoderConfig
from ...models._rotary import SCALINGS, Dynamic, Scaling
from .._fields import Fields, typed


FIELDS = ("rope_parameters", "rope_theta", "rope_scaling", "partial_rotary_factor", "rope_local_base_freq")


def read(fields: Fields, theta: float, local_theta: float | None) -> tuple[dict[str, Any], list[str]]:
    """The fields of `DecoderConfig` about rotations, and what is not understood.

    `theta` is the default of `rope_theta`, and `local_theta` that of sliding layers, if they have one of their own.
    """
    parameters = fields.get("rope_scaling") or fields.get("rope_parameters") or {}
    if not isinstance(parameters, Mapping):
        return {}, [f"rope_parameters={parameters!r} (no object)"]
    nested = parameters if {FULL, SLIDING} & parameters.keys() else {FULL: parameters}
    general = {"rope_theta": fields.get("rope_theta") or theta}
    general["partial_rotary_factor"] = fields.get("partial_rotary_factor") or 1.0
    ours, faults = _of_layers({**general, **(nested.get(FULL) or {})}, fields)
    if local_theta is not None:
        general["rope_theta"] = fields.get("rope_local_base_freq") or local_theta
        local, more = _of_layers({**general, **(nested.get(SLIDING) or {})}, fields)
        faults += more
        ours["rope_local_base_freq"] = local.pop("rope_theta")
        if local["rope_scaling"] is not None or local["partial_rotary_factor"] != ours["partial_rotary_factor"]:
            faults.append(f"rope_parameters[{SLIDING!r}]={nested[SLIDING]!r} (only another rope_theta)")
    elif nested is parameters:
        faults.append(f"rope_parameters={dict(parameters)!r} (only the same for all layers)")
    return ours, faults


def _of_layers(parameters: Fields, fields: Fields) -> tuple[dict[str, Any], list[str]]:
    """`read`, for the layers that have these parameters."""
    kind = parameters.get("rope_type") or parameters.get("type", "default")
    own = ("rope_theta", "partial_rotary_factor")
    ours: dict[str, Any] = {name: float(parameters[name]) for name in own} | {"rope_scaling": None}
    rest = {name: x for name, x in parameters.items() if name not in (*own, "rope_type", "type") and x is not None}
    faults: list[str] = []
    if isinstance(kind, str) and kind in SCALINGS:
        ours["rope_scaling"], faults = _scaling(SCALINGS[kind], rest, fields)
    elif kind != "default":
        faults = [f"rope_type={kind!r} (only 'default', {', '.join(map(repr, SCALINGS))})"]
    elif rest:
        faults = [f"rope_parameters with {', '.join(rest)} (not with rope_type='default')"]
    return ours, faults


def _scaling(kind: type[Scaling], given: Fields, fields: Fields) -> tuple[Scaling | None, list[str]]:
    required = {field.name: field.default is dataclasses.MISSING for field in dataclasses.fields(kind)}
    values = {name: tuple(x) if isinstance(x, list) else x for name, x in given.items()}
    longest = fields["max_position_embeddings"]
    if kind is Dynamic:
        values["max_position_embeddings"] = longest
    if "original_max_position_embeddings" in required:
        # Phi-3 has it outside, too, and there it counts.
        original = fields.get("original_max_position_embeddings") or values.get("original_max_position_embeddings")
        values["original_max_position_embeddings"] = original or longest
        values.setdefault("factor", longest / (original or longest))
    faults = [f"rope_parameters[{name!r}]={x!r} (not with rope_type={kind.rope_type!r})"
              for name, x in values.items() if name not in required]  # fmt: skip
    faults += [f"rope_parameters without {name} (with rope_type={kind.rope_type!r})"
               for name, needed in required.items() if needed and name not in values]  # fmt: skip
    return None if faults else typed(kind, values), faults


def write(config: DecoderConfig) -> dict[str, Any]:
    """`rope_parameters` of a config, as transformers 5 has them."""
    general: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.partial_rotary_factor != 1.0:
        general["partial_rotary_factor"] = config.partial_rotary_factor
    if config.rope_scaling is not None:
        values = dataclasses.asdict(config.rope_scaling)
        values.pop("max_position_embeddings", None)
        general["rope_type"] = config.rope_scaling.rope_type
        general |= {name: list(x) if isinstance(x, tuple) else x for name, x in values.items() if x is not None}
    if config.rope_local_base_freq is None:
        return general
    return {FULL: general, SLIDING: {"rope_type": "default", "rope_theta": config.rope_local_base_freq}}
