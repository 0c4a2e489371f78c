"""Reference models in Flax Linen: BERT's encoder, a Llama-like decoder, and a reader of Hugging Face directories."""

from ._decoder import Decoder as Decoder
from ._decoder import DecoderConfig as DecoderConfig
from ._encoder import Classifier as Classifier
from ._encoder import Encoder as Encoder
from ._encoder import EncoderConfig as EncoderConfig
from ._files import load as load
from ._files import minilm_directory as minilm_directory
from ._layers import stack_layers as stack_layers
