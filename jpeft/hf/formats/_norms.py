"""Tuning of norms: their parameters as they are, under names of their own."""

from ._format import Format


NORMS = Format(peft_type="LN_TUNING", nodes=(), fields={}, on=lambda m: not m.is_weight)
