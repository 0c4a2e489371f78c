"""Reference models in Flax Linen: a causal decoder, an encoder with its heads, T5 and ViT."""

from ._cache import Cache as Cache
from ._decoder import Decoder as Decoder
from ._decoder_config import DecoderConfig as DecoderConfig
from ._encoder import Encoder as Encoder
from ._encoder import EncoderConfig as EncoderConfig
from ._encoder import Encoding as Encoding
from ._files import minilm_directory as minilm_directory
from ._heads import Classifier as Classifier
from ._heads import Embedder as Embedder
from ._layers import stack_layers as stack_layers
from ._sharding import logical_axes as logical_axes
from ._sharding import shardings as shardings
from ._t5 import T5 as T5
from ._t5 import T5Encoder as T5Encoder
from ._t5_cache import T5Cache as T5Cache
from ._t5_layers import T5Config as T5Config
from ._vit import ViT as ViT
from ._vit import ViTConfig as ViTConfig
from ._vit import ViTLayer as ViTLayer
