"""Patterns of parameters by their kind, as models usually name them: targets of `unfreeze`."""

from .places import LOGITS


def _within(names: str) -> str:
    """What is in a module of such a name, but in no norm that is called after one."""
    return rf"(?i:(.*/)?(?!\w*norm)\w*({names})\w*/.*)"


NORM = r"(?i:(.*/)?(\w*norm\w*|[lb]n\d*(_\w+)?|\w+_ln)/(scale|bias))"
BIAS = r"(.*/)?bias"  # and so no table of relative positions, though it may be called `relative_attention_bias`
ATTENTION = _within("attention|attn")
CROSS_ATTENTION = _within("(cross|encdec|encoder)_?(attention|attn)")
# BERT calls the second half of its feed-forward blocks no more than the output of a layer
MLP = _within(r"mlp|ffn|feed_?forward|densereludense|intermediate|experts|fc_?\d")
MLP = rf"(?:{MLP}|(.*/)?layer(/\d+)?/output/dense/.*)"
EMBEDDING = r"(?i:(?!.*rel(ative)?_)(.*/)?(\w*embedding|pos_embed\w*|position|class_token|cls))"
HEAD = rf"{LOGITS}/.*"
