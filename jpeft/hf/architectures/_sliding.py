"""Which layers of a decoder have a sliding window: every brand says so in a way of its own."""

from collections.abc import Callable
from typing import Any

from ...models._decoder_config import FULL, SLIDING, DecoderConfig
from .._fields import Fields


def windows(fields: Fields) -> dict[str, Any]:
    """Of Qwen: a window for layers from `max_window_layers` on, where windows are to be used."""
    window = fields["sliding_window"] if fields["use_sliding_window"] else None
    first = 0 if window is None else fields["max_window_layers"]
    default = [FULL if window is None or i < first else SLIDING for i in range(fields["num_hidden_layers"])]
    return {"sliding_window": window, "layer_types": tuple(fields["layer_types"] or default)}


def windows_everywhere(fields: Fields) -> dict[str, Any]:
    """Of Qwen's mixtures of experts."""
    return {"sliding_window": fields["sliding_window"] if fields["use_sliding_window"] else None}


def windows_without_rope(fields: Fields) -> dict[str, Any]:
    """Of SmolLM3: every fourth layer does not rotate, and if there is a window, it is of these."""
    count, period = fields["num_hidden_layers"], fields["no_rope_layer_interval"]
    turns = fields["no_rope_layers"] or [int((i + 1) % period != 0) for i in range(count)]
    window = fields["sliding_window"] if fields["use_sliding_window"] else None
    default = [FULL if window is None or turn else SLIDING for turn in turns]
    types = tuple(fields["layer_types"] or default)
    return {"sliding_window": window, "no_rope_layers": tuple(turns), "layer_types": types}


def alternating(period: int) -> Callable[[Fields], dict[str, Any]]:
    """Of Gemma: every `period`-th layer has no window."""

    def derive(fields: Fields) -> dict[str, Any]:
        every = fields.get("sliding_window_pattern") or fields.get("_sliding_window_pattern") or period
        default = [SLIDING if (i + 1) % every else FULL for i in range(fields["num_hidden_layers"])]
        return {"layer_types": tuple(fields["layer_types"] or default)}

    return derive


def use_windows(config: DecoderConfig) -> dict[str, Any]:
    """Whether there are any, which Qwen and SmolLM3 say apart."""
    return {"use_sliding_window": config.sliding_window is not None}
