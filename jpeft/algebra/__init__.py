"""Adapter algebra: sums and differences of trees that were tuned on one base."""

from ._combine import Combined as Combined
from ._pruned import dare as dare
from ._pruned import magnitude_prune as magnitude_prune
from ._pruned import ties as ties
from ._sums import cat as cat
from ._sums import linear as linear
from ._sums import subtract as subtract
from ._sums import svd as svd
