"""How much memory `jpeft.hf.load` takes beyond its result.

    python benchmarks/load_memory.py [directory]

Writes a checkpoint of TinyLlama's shapes, 2.2 GB of bfloat16 in two files, and loads it in a fresh process for each
way to load. `baseline` is what the process holds before, having loaded a model of two layers of width 64 in the same
way: the interpreter, the libraries, and what JAX has compiled so far. `beyond` is the highest resident set while
loading, less the baseline and the bytes of the result; `tensors` is that in largest tensors of the file.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np


LAYERS, WIDTH, MLP, VOCABULARY, HEADS, GROUPS = 22, 2048, 5632, 32000, 32, 4
LIMIT = 2.0  # largest tensors
MODES = {
    "plain": {},
    "float32": {"dtype": "float32"},
    "nf4": {"quantize": True},
    "scanned": {"scan": True},
    "scanned nf4": {"scan": True, "quantize": True},
    "scanned nf4, lora": {"scan": True, "quantize": True, "lora": True},
}


def write_checkpoint(directory: Path, layers: int, width: int, mlp: int, vocabulary: int, heads: int, groups: int):
    """A Llama of random numbers that repeat themselves: what they are does not matter here."""
    from ml_dtypes import bfloat16
    from safetensors.numpy import save_file

    directory.mkdir(parents=True, exist_ok=True)
    block = np.random.default_rng(0).normal(0, 0.02, 1 << 20).astype(bfloat16)
    array = lambda *shape: np.resize(block, shape)
    narrow = width // heads * groups
    shapes = {"q_proj": (width, width), "k_proj": (narrow, width), "v_proj": (narrow, width), "o_proj": (width, width)}
    shapes = {f"self_attn.{name}": shape for name, shape in shapes.items()}
    shapes |= {"mlp.gate_proj": (mlp, width), "mlp.up_proj": (mlp, width), "mlp.down_proj": (width, mlp)}
    shapes |= {"input_layernorm": (width,), "post_attention_layernorm": (width,)}
    names = {f"model.layers.{i}.{name}.weight": shape for i in range(layers) for name, shape in shapes.items()}
    top = {"model.embed_tokens.weight": (vocabulary, width), "lm_head.weight": (vocabulary, width)}
    top["model.norm.weight"] = (width,)
    half = len(names) // 2
    files = {
        "model-00001-of-00002.safetensors": dict(list(names.items())[:half]),
        "model-00002-of-00002.safetensors": dict(list(names.items())[half:]) | top,
    }
    for file, own in files.items():
        save_file({name: array(*shape) for name, shape in own.items()}, directory / file)
    index = {"metadata": {}, "weight_map": {name: file for file, own in files.items() for name in own}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "model_type": "llama", "num_hidden_layers": layers, "hidden_size": width, "intermediate_size": mlp,
        "vocab_size": vocabulary, "num_attention_heads": heads, "num_key_value_heads": groups, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "tie_word_embeddings": False, "hidden_act": "silu", "max_position_embeddings": 2048,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))


def measure(large: str, small: str, mode: str) -> None:
    """Load, in this process, and print what it took."""
    import jax

    import jpeft
    import jpeft.hf

    options = dict(MODES[mode])
    axes = {".*layers/.*kernel": "sio"} if options.get("scan") else ".*layers_.*kernel"
    transforms = [jpeft.nf4(targets=axes)] if options.pop("quantize", False) else []
    transforms += [jpeft.lora(rank=8, targets=axes)] if options.pop("lora", False) else []
    quantize = jpeft.chain(*transforms) if transforms else None

    def load(directory):
        return jax.block_until_ready(jpeft.hf.load(directory, quantize=quantize, **options)[1])

    load(small)
    baseline = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark to the present
    start = time.perf_counter()
    params = load(large)
    seconds = time.perf_counter() - start
    result = sum(x.nbytes for x in jax.tree.leaves(params))
    print(json.dumps({"baseline": baseline, "peak": memory("VmHWM"), "result": result, "seconds": seconds}))


def memory(field: str) -> int:
    """Bytes, from this process' status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def main(directory: Path) -> None:
    large, small = directory / "large", directory / "small"
    if not (large / "config.json").exists():
        write_checkpoint(large, LAYERS, WIDTH, MLP, VOCABULARY, HEADS, GROUPS)
        write_checkpoint(small, 2, 64, 128, 96, 4, 2)
    size = sum(file.stat().st_size for file in large.glob("*.safetensors"))
    largest = 2 * VOCABULARY * WIDTH
    print(f"checkpoint {size / 1e9:.2f} GB, largest tensor {largest / 1e6:.0f} MB, limit {LIMIT} of them\n")
    print(f"{'mode':<20}{'baseline MB':>12}{'result MB':>12}{'peak MB':>12}{'beyond MB':>12}{'tensors':>9}{'s':>7}")
    beyond = {}
    for mode in MODES:
        command = [sys.executable, __file__, "--measure", str(large), str(small), mode]
        found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        over = found["peak"] - found["baseline"] - found["result"]
        # A tensor counts as large as it becomes: of float32, if it is cast to that.
        beyond[mode] = over / largest / (2 if MODES[mode].get("dtype") == "float32" else 1)
        numbers = [found["baseline"], found["result"], found["peak"], over]
        print(f"{mode:<20}" + "".join(f"{x / 1e6:>12.0f}" for x in numbers), end="")
        print(f"{beyond[mode]:>9.2f}{found['seconds']:>7.1f}", flush=True)
    assert max(beyond.values()) <= LIMIT, "loading takes more memory than it should"


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(*sys.argv[2:])
    elif sys.argv[1:]:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as directory:
            main(Path(directory))
