"""jpeft: parameter-efficient fine-tuning, as functions from a parameter tree to a parameter tree."""

from ._apply import Coverage as Coverage
from ._apply import UnusedNodeError as UnusedNodeError
from ._apply import apply as apply
from ._apply import coverage as coverage
from ._apply import intercept as intercept
from ._apply import sites as sites
from ._node import Additive as Additive
from ._node import Branch as Branch
from ._node import Frozen as Frozen
from ._node import Leaf as Leaf
from ._node import Node as Node
from ._node import Reparam as Reparam
from ._node import Static as Static
from ._node import Trainable as Trainable
from ._tree import attach as attach
from ._tree import chain as chain
from ._tree import combine as combine
from ._tree import labels as labels
from ._tree import merge as merge
from ._tree import partition as partition
from ._tree import strip as strip
from ._tree import transform as transform
from ._tree import wrap as wrap
from .reparam._lora import LoRA as LoRA
from .reparam._lora import lora as lora
