"""VB-LoRA, with its logits or, where `save_only_topk_weights`, with the vectors that they chose and their shares."""

import numpy as np

from ...reparam._vblora import VBLoRA, VBLoRAChoices
from .._modules import Module
from ._format import Config, Format, Shapes, Shared, Tensors, linear, positive


A, B = "vblora_logits_A", "vblora_logits_B"
BANK = "vblora_vector_bank"
CHOICES, SHARES = "_topk_indices", "_topk_weights"


def shapes(m: Module, config: Config, tensors: Tensors) -> Shapes:
    r, length, top = config["r"], config["vector_length"], config["topk"]
    pieces = {A: (r, m.inputs // length), B: (m.outputs // length, r)}
    last = {CHOICES: top, SHARES: top - 1} if config["save_only_topk_weights"] else {"": config["num_vectors"]}
    return {side + end: (*shape, n) for side, shape in pieces.items() for end, n in last.items()}


def read(m: Module, config: Config, tensors: Tensors) -> list:
    length, vectors = config["vector_length"], config["num_vectors"]
    if m.inputs % length or m.outputs % length:
        raise ValueError(f"vectors of {length} numbers do not divide {m.inputs} inputs and {m.outputs} outputs")
    a = {end: tensors[A + end] for end in ("", CHOICES, SHARES) if A + end in tensors}
    b = {end: np.swapaxes(tensors[B + end], 0, 1) for end in a}
    how = {"bank": None, "dropout": config["vblora_dropout"]}
    if "" in a:
        return [VBLoRA(logits_a=a[""], logits_b=b[""], top=config["topk"], **how)]
    for places in (a[CHOICES], b[CHOICES]):
        if places.dtype.kind not in "iu" or (places < 0).any() or (places >= vectors).any():
            raise ValueError(f"its pieces are not mixed of the {vectors} vectors that there are")
    places = {"choices_a": a[CHOICES], "choices_b": b[CHOICES]}
    return [VBLoRAChoices(**places, shares_a=a[SHARES], shares_b=b[SHARES], **how)]


def write(m: Module, nodes: list) -> tuple[Tensors, Config]:
    (node,) = nodes
    linear(m, "VB-LoRA", conv1d=True)
    chosen = isinstance(node, VBLoRAChoices)
    if chosen:
        a, b = ({CHOICES: _signed(places), SHARES: part} for places, part in
                ((node.choices_a, node.shares_a), (node.choices_b, node.shares_b)))  # fmt: skip
    else:
        a, b = {"": node.logits_a}, {"": node.logits_b}
    r, *_ = next(iter(a.values())).shape
    vectors, length = node.bank.shape
    fields = {"r": r, "topk": a[CHOICES].shape[-1] if chosen else node.top, "vblora_dropout": node.dropout,
              "save_only_topk_weights": chosen, "num_vectors": vectors, "vector_length": length}  # fmt: skip
    tensors = {A + end: x for end, x in a.items()} | {B + end: np.swapaxes(x, 0, 1) for end, x in b.items()}
    return tensors, fields


def _signed(places: np.ndarray) -> np.ndarray:
    """In a type that PEFT has for them."""
    return places.astype(np.int32) if places.dtype == np.uint32 else places


def check(config: Config) -> list[str]:
    faults = positive(config, "r", "topk", "num_vectors", "vector_length")
    top, vectors = config["topk"], config["num_vectors"]
    return [*faults, f"topk = {top}: there are {vectors} vectors"] if top > vectors else faults


def shared(config: Config, modules: list[Module]) -> list[Shared]:
    return [Shared(BANK, "bank", modules, (config["num_vectors"], config["vector_length"]), trains=True)]


VBLORA = Format(
    peft_type="VBLORA",
    nodes=(VBLoRA, VBLoRAChoices),
    bias="vblora_only",
    shapes=shapes,
    read=read,
    write=write,
    ends=tuple(side + end for side in (A, B) for end in ("", CHOICES, SHARES)),
    integers=(A + CHOICES, B + CHOICES),
    fields={"r": 4, "num_vectors": 256, "vector_length": 256, "topk": 2, "vblora_dropout": 0.0,
            "save_only_topk_weights": False},
    unused=frozenset({"init_vector_bank_bound", "init_logits_std"}),
    shared=shared,
    check=check,
)  # fmt: skip
