"""Where the parameters of encoders are, of what our and their names begin with."""

from .._names import Row, linear, norm, table


Rows = tuple[Row, ...]


def bert_rows(ours: str, theirs: str) -> Rows:
    """Of BERT's encoder, and RoBERTa's."""
    embeddings, layer, block = f"{theirs}embeddings", f"{ours}layers_{{i}}", f"{theirs}encoder.layer.{{i}}"
    return (
        *table(f"{ours}embeddings/word", f"{embeddings}.word_embeddings"),
        *table(f"{ours}embeddings/position", f"{embeddings}.position_embeddings"),
        *table(f"{ours}embeddings/token_type", f"{embeddings}.token_type_embeddings"),
        *norm(f"{ours}embeddings/norm", f"{embeddings}.LayerNorm"),
        *linear(f"{layer}/attention/query", f"{block}.attention.self.query"),
        *linear(f"{layer}/attention/key", f"{block}.attention.self.key"),
        *linear(f"{layer}/attention/value", f"{block}.attention.self.value"),
        *linear(f"{layer}/attention/out", f"{block}.attention.output.dense"),
        *norm(f"{layer}/attention_norm", f"{block}.attention.output.LayerNorm"),
        *linear(f"{layer}/mlp/up", f"{block}.intermediate.dense"),
        *linear(f"{layer}/mlp/down", f"{block}.output.dense"),
        *norm(f"{layer}/mlp_norm", f"{block}.output.LayerNorm"),
    )


def distilbert_rows(ours: str, theirs: str) -> Rows:
    """Of DistilBERT's encoder, whose tokens have no types."""
    embeddings, layer, block = f"{theirs}embeddings", f"{ours}layers_{{i}}", f"{theirs}transformer.layer.{{i}}"
    return (
        *table(f"{ours}embeddings/word", f"{embeddings}.word_embeddings"),
        *table(f"{ours}embeddings/position", f"{embeddings}.position_embeddings"),
        *norm(f"{ours}embeddings/norm", f"{embeddings}.LayerNorm"),
        *linear(f"{layer}/attention/query", f"{block}.attention.q_lin"),
        *linear(f"{layer}/attention/key", f"{block}.attention.k_lin"),
        *linear(f"{layer}/attention/value", f"{block}.attention.v_lin"),
        *linear(f"{layer}/attention/out", f"{block}.attention.out_lin"),
        *norm(f"{layer}/attention_norm", f"{block}.sa_layer_norm"),
        *linear(f"{layer}/mlp/up", f"{block}.ffn.lin1"),
        *linear(f"{layer}/mlp/down", f"{block}.ffn.lin2"),
        *norm(f"{layer}/mlp_norm", f"{block}.output_layer_norm"),
    )
