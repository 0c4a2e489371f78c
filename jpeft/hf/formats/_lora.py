"""LoRA, with DoRA, PiSSA and OLoRA, biases of its own, and experts."""

import numpy as np

from ...additive._beft import BEFT
from ...reparam._dora import DoRA
from ...reparam._lora import LoRA, LoRAFA
from ...reparam._pissa import PiSSA
from .._modules import Module
from ._format import Config, Format, Shapes, Tensors, inward, outward, plain, positive, whole


A, B, BIAS, MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_magnitude_vector"
TABLE_A, TABLE_B = "lora_embedding_A", "lora_embedding_B"

# By these the base itself is changed when the adapter is made: it is not one of the base that it names.
STARTS = (True, False, None, "gaussian", "eva", "orthogonal")

UNUSED = frozenset({"init_lora_weights", "megatron_config", "megatron_core", "loftq_config", "eva_config",
                    "corda_config", "lora_ga_config", "runtime_config", "qalora_group_size"})  # fmt: skip


def scale_of(config: Config) -> float:
    return config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])


def shapes(m: Module, config: Config, tensors: Tensors) -> Shapes:
    r, window = config["r"], m.window
    if m.is_table:
        found = {TABLE_A: (r, m.inputs), TABLE_B: (m.outputs, r)}
    elif m.experts:
        (count,) = m.experts
        ins, outs = (m.outputs, m.inputs) if _former(m, config, tensors) else (m.inputs, m.outputs)
        found = {A: (count * r, ins), B: (outs, r * count)}
    else:
        found = {A: (r, m.channels, *window), B: (m.outputs, r, *[1] * len(window))}
    if config["lora_bias"]:
        found[BIAS] = (m.outputs,)
    if config["use_dora"]:
        found[MAGNITUDE] = (1, m.outputs, 1, 1) if window else (m.outputs,)
    return found


def _former(m: Module, config: Config, tensors: Tensors) -> bool:
    """Whether experts lie as PEFT had them before 0.19: A at the outputs and B at the inputs of a weight (out, in).

    Shapes tell, and where they do not, the version that wrote the file; one that says nothing is of today.
    """
    if m.letters != "eoi":
        return False
    a = tensors.get(A)
    if m.inputs != m.outputs and a is not None and a.ndim == 2:
        return a.shape[1] == m.outputs
    version = str(config.get("peft_version") or "")
    major, _, rest = version.partition(".")
    minor = rest.partition(".")[0]
    return major == "0" and minor.isdecimal() and int(minor) < 19


def read(m: Module, config: Config, tensors: Tensors) -> list:
    scale, dropout = scale_of(config), config["lora_dropout"]
    if m.experts:
        return [LoRA(**_experts(m, config, tensors), scale=scale, dropout=dropout)]
    a, b = (tensors[TABLE_A], tensors[TABLE_B]) if m.is_table else (tensors[A], tensors[B])
    factors = {"a": inward(a), "b": inward(b)}
    if config["use_dora"]:
        nodes: list = [DoRA(**factors, magnitude=tensors[MAGNITUDE].reshape(-1), scale=scale)]
    else:
        nodes = [LoRA(**factors, scale=scale, dropout=dropout)]
    return [*nodes, BEFT(bias=tensors[BIAS], scale=scale)] if config["lora_bias"] else nodes


def _experts(m: Module, config: Config, tensors: Tensors) -> dict[str, np.ndarray]:
    """In the file experts are the slow axis of A's rows and the fast one of B's columns."""
    (count,), r = m.experts, config["r"]
    a = tensors[A].reshape(count, r, -1)
    b = np.moveaxis(tensors[B].reshape(-1, r, count), (2, 1, 0), (0, 1, 2))
    if _former(m, config, tensors):
        a, b = b, a
    return {"a": np.swapaxes(a, 1, 2), "b": b}


def write(m: Module, nodes: list) -> tuple[Tensors, Config]:
    node, *biases = nodes
    fields = {"r": node.a.shape[-1], "scale": node.scale, "use_dora": isinstance(node, DoRA), "lora_bias": bool(biases)}
    fields["lora_dropout"] = getattr(node, "dropout", 0.0)
    a, b = node.a, node.b
    if isinstance(node, PiSSA):  # A B - A0 B0 = [A A0] [B; -B0]
        a, b = np.concatenate([a, node.start_a], axis=-1), np.concatenate([b, -node.start_b], axis=-2)
        fields["r"] *= 2
    if m.experts:
        if not isinstance(node, LoRA | PiSSA) or biases:
            raise ValueError("PEFT has LoRA alone for experts, without DoRA and without biases")
        tensors = {A: np.swapaxes(a, 1, 2).reshape(-1, m.inputs), B: np.moveaxis(b, (0, 1, 2), (2, 1, 0))}
        tensors[B] = tensors[B].reshape(m.outputs, -1)
    elif m.is_table:
        tensors = {TABLE_A: a.T, TABLE_B: b.T}
    else:
        tensors = {A: outward(a, m), B: b.T.reshape(m.outputs, -1, *[1] * len(m.window))}
    if isinstance(node, DoRA):
        tensors[MAGNITUDE] = node.magnitude.reshape(1, -1, 1, 1) if m.window else node.magnitude
    for beft in biases:
        tensors[BIAS] = beft.bias if beft.scale == node.scale else beft.bias * (beft.scale / node.scale)
    return tensors, fields


def settle(fields: dict[str, Config]) -> dict[str, Config]:
    """Scales as alphas. Where they are whole numbers only by the rule of rsLoRA, it was that."""
    rules = {False: lambda r: r, True: lambda r: r**0.5}
    fit = lambda rule: all(whole(x["scale"] * rule(x["r"])) is not None for x in fields.values())
    by = next((by for by, rule in rules.items() if fit(rule)), False)
    alpha = lambda x: plain(x["scale"] * rules[by](x["r"]))
    others = lambda x: {name: y for name, y in x.items() if name != "scale"}
    return {module: {**others(x), "lora_alpha": alpha(x), "use_rslora": by} for module, x in fields.items()}


def check(config: Config) -> list[str]:
    start = config.get("init_lora_weights", True)
    faults = [] if start in STARTS else [
        f"init_lora_weights = {start!r}: the base was changed when the adapter was made. Save it with PEFT's "
        "`path_initial_model_for_weight_conversion`, as an ordinary LoRA of twice the rank"
    ]  # fmt: skip
    return faults + positive(config, "r")


LORA = Format(
    peft_type="LORA",
    nodes=(LoRA, LoRAFA, DoRA, PiSSA),
    bias="lora_only",
    shapes=shapes,
    read=read,
    write=write,
    ends=(A, B, BIAS, MAGNITUDE, TABLE_A, TABLE_B),
    beside=(BEFT,),
    fields={"r": 8, "lora_alpha": 8.0, "use_rslora": False, "use_dora": False, "lora_bias": False, "lora_dropout": 0.0,
            "rank_pattern": {}, "alpha_pattern": {}, "target_parameters": [], "trainable_token_indices": None,
            "ensure_weight_tying": False},
    unused=UNUSED,
    patterns={"r": "rank_pattern", "lora_alpha": "alpha_pattern"},
    check=check,
    settle=settle,
)  # fmt: skip
