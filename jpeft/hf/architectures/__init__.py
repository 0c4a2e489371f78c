"""What is known of each `model_type`: how its model is built, and where its tensors go."""

from .._names import Architecture
from . import decoders, encoders, t5, vit


ARCHITECTURES: dict[str, Architecture] = {
    **decoders.ARCHITECTURES,
    **encoders.ARCHITECTURES,
    **t5.ARCHITECTURES,
    **vit.ARCHITECTURES,
}
