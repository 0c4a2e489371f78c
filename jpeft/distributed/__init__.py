"""Many processes, as JAX runs them: they start together, wait for each other, and end together."""

from ._end import PEER_FAILED as PEER_FAILED
from ._end import PREEMPTED as PREEMPTED
from ._initialize import initialize as initialize
from ._together import barrier as barrier
from ._together import compile as compile
from ._together import preempted as preempted
