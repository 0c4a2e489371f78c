"""What PEFT asks of optimizers: Optax transforms, and transitions between two steps."""

from ._adalora import rank_allocator as rank_allocator
from ._aged_adam import scale_by_aged_adam as scale_by_aged_adam
from ._apollo import apollo as apollo
from ._badam import badam as badam
from ._fira import fira as fira
from ._galore import galore as galore
from ._keep_bounded import keep_bounded as keep_bounded
from ._lisa import lisa as lisa
from ._lora_fa import lora_fa as lora_fa
from ._lora_plus import lora_plus as lora_plus
from ._masked_updates import masked_updates as masked_updates
from ._relora import relora_restart as relora_restart
from ._relora import relora_schedule as relora_schedule
from ._reselect import reselect as reselect
from ._skip_nonfinite import NonFiniteError as NonFiniteError
from ._skip_nonfinite import check_finite as check_finite
from ._skip_nonfinite import skip_nonfinite as skip_nonfinite
from ._switch import block_labels as block_labels
from ._switch import switch as switch
