"""Do Llama-3.1-8B and 70B fit, with LoRA and QLoRA, on slices of TPU pods? A table, compiled without a TPU.

    python experiments/pods.py --models 8B --topologies v5e:4x4

One step after another, each in a process of its own. With --output every figure is kept as JSON, and what is there
already is not compiled again.
"""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import tyro


LLAMA = {
    "model_type": "llama", "vocab_size": 128256, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "num_key_value_heads": 8,
    "max_position_embeddings": 131072, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
MODELS = {
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
}


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Tell what fine-tuning takes of each chip, and what is sent."""

    models: tuple[str, ...] = tuple(MODELS)
    bases: tuple[str, ...] = ("float", "nf4")
    topologies: tuple[str, ...] = ("v5e:4x4", "v5e:8x8", "v5e:16x16", "v5p:2x4x4", "v6e:4x4")
    """v5p:2x4x4 is the accelerator type v5p-64, whose number counts two cores a chip."""
    target_config: Path | None = None
    """For --topologies cuda:1x1x8: the description of the GPU, of XLA's."""
    mesh: str | None = None
    """data=2,fsdp=8; by default that of `jpeft plan`."""
    rank: int = 16
    batch_size: int | None = None
    """Rows of a step; by default one for each part that the batch is divided into."""
    length: int = 2048
    output: Path = Path("runs/pods")


def main(arguments: Arguments) -> None:
    rows = []
    target = [] if arguments.target_config is None else [f"--target-config={arguments.target_config}"]
    for name in arguments.models:
        directory = arguments.output / name
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.json").write_text(json.dumps(LLAMA | MODELS[name], indent=2))
        for base in arguments.bases:
            for topology in arguments.topologies:
                options = {name: getattr(arguments, name) for name in ("mesh", "rank", "batch_size", "length")}
                options |= {"topology": topology, "base": base}
                given = [f"--{n.replace('_', '-')}={x}" for n, x in options.items() if x is not None]
                path = directory / f"{'_'.join(x.lstrip('-') for x in given)}.json".replace(":", "-")
                if not path.exists():
                    _compile(directory, [*given, *target], path)
                rows.append((f"{name}, {'QLoRA' if base == 'nf4' else 'LoRA'}", json.loads(path.read_text())))
    print(table(rows))


def _compile(directory: Path, given: list[str], path: Path) -> None:
    """Ask `jpeft plan`, and keep its answer; what it says of a failure goes on to this one's reader."""
    command = [sys.executable, "-c", "import sys; from jpeft.cli import main; sys.exit(main())", "plan", str(directory)]
    done = subprocess.run([*command, *given, "--json"], stdout=subprocess.PIPE, text=True)
    if not done.stdout:
        sys.exit(done.returncode)
    path.write_text(done.stdout)


COLUMNS = ("", "chips", "mesh", "rows", "base", "adapters", "optimizer", "temporaries", "code", "total", "of", "fits",
           "/ estimate", "gathered", "reduced", "otherwise sent")  # fmt: skip


def table(rows: list[tuple[str, dict]]) -> str:
    """Markdown: GiB a chip, and what a chip takes part in during a step."""
    lines = [COLUMNS, ("---",) * len(COLUMNS)]
    gib = lambda n: f"{n / 2**30:.2f}"
    for title, p in rows:
        memory, sent = p["memory"], {"all-gather": [0, 0], "all-reduce": [0, 0], "": [0, 0]}
        for x in p["collectives"] or ():
            sums = sent.get(x["kind"], sent[""])
            sums[:] = sums[0] + x["count"], sums[1] + x["bytes"]
        calls = [f"{n:,}: {gib(size)}" if p["collectives"] is not None else "" for n, size in sent.values()]
        kinds = [gib(memory[name]) for name in ("base", "adapters", "optimizer", "temporaries", "code")]
        mesh = " x ".join(str(n) for n in p["mesh"].values())
        fits = "yes" if p["fits"] else f"no, by {gib(p['missing'])}"
        ratio = f"{p['total'] / p['estimate']:.2f}"
        lines.append((title, p["topology"], mesh, str(p["batch_size"]), *kinds, gib(p["total"]), gib(p["hbm"]), fits,
                      ratio, *calls))  # fmt: skip
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
