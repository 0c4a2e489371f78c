"""The types of adapters, one file each: their tensors, their fields, and the nodes that they are."""

from ..._node import Node
from ...additive._prefix import Shift
from ...additive._room import Room
from ...additive._tasks import Tasks
from ...additive._template import Template
from ._adalora import ADALORA
from ._beft import BEFT_
from ._boft import BOFT_
from ._c3a import C3A_
from ._cpt import CONTEXT
from ._delora import DELORA
from ._format import Format
from ._fourierft import FOURIERFT
from ._gralora import GRALORA
from ._hira import HIRA
from ._hra import HRA_
from ._ia3 import IA3_
from ._loha import LOHA
from ._lokr import LOKR
from ._lora import LORA
from ._miss import MISS
from ._mpt import MULTITASK
from ._norms import NORMS
from ._oft import OFT_
from ._poly import POLY
from ._prefix import PREFIX
from ._prompt import P_TUNING, PROMPT
from ._randlora import RANDLORA
from ._road import ROAD
from ._shira import SHIRA
from ._tinylora import TINYLORA
from ._tokens import TOKENS, TOKENS_WITHIN
from ._vblora import VBLORA
from ._vera import VERA


_ALL = (
    LORA, ADALORA, IA3_, VERA, LOHA, LOKR, OFT_, BOFT_, HRA_, MISS, HIRA, BEFT_, C3A_, ROAD,
    RANDLORA, DELORA, GRALORA, TINYLORA, VBLORA, FOURIERFT, SHIRA, NORMS, TOKENS, PROMPT, P_TUNING, PREFIX, MULTITASK,
    POLY, CONTEXT,
)  # fmt: skip

# By the name of their type.
FORMATS: dict[str, Format] = {form.peft_type: form for form in _ALL}

# By the nodes that they write.
WRITERS: dict[type[Node], Format] = {node: form for form in _ALL for node in form.nodes}

# Types that others may hold: LoRA with trainable tokens.
WITHIN: dict[str, Format] = {LORA.peft_type: TOKENS_WITHIN}

# What other nodes need in the model around them, and which is in no file.
SILENT = (Room, Template, Shift, Tasks)
