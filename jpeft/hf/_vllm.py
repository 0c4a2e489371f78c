"""What vLLM serves of PEFT's adapters."""

from .formats._format import Config


# The choices for its `--max-lora-rank`: https://github.com/vllm-project/vllm/blob/main/vllm/config/lora.py
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
REASONS = {
    "use_dora": "it has no DoRA: merge it into the model",
    "modules_to_save": "it takes no parameters of the model itself: merge them into it",
    "lora_bias": "it takes no biases: merge them into the model",
    "trainable_token_indices": "it takes no trained tokens: merge them into the model",
    "rank_pattern": "it has one rank for all modules",
    "alpha_pattern": "it has one alpha for all modules",
}


def vllm_faults(config: Config) -> list[str]:
    """Everything in an adapter that vLLM refuses, or would serve as something else."""
    if config["peft_type"] != "LORA":
        return [f"vLLM serves LoRA alone, not {config['peft_type']}: merge it into the model"]
    faults = [f"{name}: {reason}" for name, reason in REASONS.items() if config.get(name)]
    if config.get("bias", "none") != "none":
        faults.append(f"bias: {REASONS['lora_bias']}")
    if config["r"] > RANKS[-1]:
        faults.append(f"r = {config['r']}: it serves ranks up to {RANKS[-1]}")
    for name in {"wte", "wpe", "shared", "embed_positions"} & set(config["target_modules"]):
        faults.append(f"target_modules has {name}: of tables it serves embed_tokens and lm_head")
    return [f"vLLM: {fault}" for fault in faults]
