"""Places in a transformer where its hidden states can be reached: patterns of modules, as models usually name them.

Each is a `targets` of methods that stand beside modules. `print(jpeft.sites(model, ...))` shows which modules of a
model they match; for other names, give patterns of your own.
"""

HEADS = ("lm_head", "head", "classifier", "classification_head", "logits", "output_layer", "score")

ATTENTION = r"(.*/)?(\w*[Aa]ttention|\w*attn)(_\d+)?"
FEED_FORWARD = r"(.*/)?(\w*mlp|ffn|feed_forward)(_\d+)?"  # beside it, in parallel, or what it returns

EMBEDDINGS = (
    r"(.*/)?(word|word_embeddings|token|token_embed\w*|tok_embeddings|embed_tokens|embed|embedder|wte|shared)"
)
KEYS_AND_VALUES = r"(.*/)?kv"  # they and the mask pass through it
ATTENTION_OUTPUT = ATTENTION + "/(out|o_proj|out_proj|c_proj|output|wo|dense|o)"
FEED_FORWARD_OUTPUT = FEED_FORWARD + "/(down|down_proj|out|c_proj|fc2|wo|output|dense)"
BLOCK = r"(?!.*block/\d+/layer)(.*/)?(layers|(\w*layer|\w*block|layers|h)s?[_/]\d+)"
FINAL_NORM = r"((model|transformer|decoder)/)?(norm|final_norm|ln_f|final_layer_norm)"  # the last hidden states
LOGITS = rf"(.*/)?({'|'.join(HEADS)})"  # of a head that is tied to the embeddings, they are what the model returns: ""

NAMES = {
    "embeddings": EMBEDDINGS,
    "keys and values": KEYS_AND_VALUES,
    "attention output": ATTENTION_OUTPUT,
    "feed-forward block": FEED_FORWARD,
    "feed-forward output": FEED_FORWARD_OUTPUT,
    "block": BLOCK,
    "last hidden states": FINAL_NORM,
    "logits": LOGITS,
}
