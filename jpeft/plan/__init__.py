"""Does it fit? A train step, compiled ahead of time for devices that are not there.

No array is made and no device is asked for.
"""

from ._collectives import Collective as Collective
from ._collectives import collectives as collectives
from ._estimate import estimate as estimate
from ._plan import Memory as Memory
from ._plan import Plan as Plan
from ._plan import plan as plan
from ._topology import PlanError as PlanError
from ._topology import Topology as Topology
