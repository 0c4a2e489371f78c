"""A checkpoint of any number of processes and devices is restored on any other, bit by bit.

    python tests/faults/topology.py --pairs 4x2:1x8 1x8:4x2
    python tests/faults/topology.py                           # every pair of LAYOUTS

`4x2:1x8` is saved by 4 processes with 2 devices each, and restored by one with 8. Adapter and optimizer state, which
are divided over the devices, must have the bits that were saved, and a loss must be the same to 2e-6.
"""

import argparse
import itertools
import json
import math
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tiny_run import TX, after, digest, trees

import jpeft


sys.path.append(str(Path(__file__).parents[1] / "processes"))
from launcher import run


LAYOUTS = "1x1", "1x4", "1x8", "2x2", "2x4", "4x1", "4x2"


def worker(options: argparse.Namespace) -> None:
    """Save step 1, or restore it; print the digest of what is there then, and a loss."""
    jpeft.distributed.initialize(options.coordinator, options.processes, options.process)
    mesh = Mesh(np.array(jax.devices()), ("fsdp",))
    params, opt_state = placed(trees()[0], mesh)
    with jpeft.CheckpointManager(options.directory) as manager:
        if options.save:
            params, opt_state = jax.tree.map(put, after(1, *trees()), (params, opt_state))
            manager.save(1, params, opt_state)
        else:
            _, params, opt_state, *_ = manager.restore(params, opt_state)
    x = np.random.default_rng(0).normal(size=(8, 64)).astype(np.float32)
    apply = lambda params: jnp.mean(jnp.square(jnp.tanh(x @ params["up"]["kernel"]) @ params["down"]["kernel"]))
    loss = float(jax.jit(lambda params: apply(jpeft.merge(params)))(params))
    whole = multihost_utils.process_allgather((params, opt_state), tiled=True)
    if jax.process_index() == 0:
        print(json.dumps({"digest": digest(whole), "loss": loss}), flush=True)
    jpeft.distributed.barrier("done")


def placed(params: jpeft.Node, mesh: Mesh) -> tuple:
    """`params` and the optimizer's state, divided over the mesh."""
    base = jax.tree.map(lambda x: NamedSharding(mesh, PartitionSpec("fsdp")), jpeft.strip(params))
    params = jpeft.shard(params, jpeft.shardings(params, base, adapter_sharding="inherit"))
    opt_state = TX.init(jpeft.partition(params)[0])
    whole = NamedSharding(mesh, PartitionSpec())
    on_mesh = lambda x: x if isinstance(x.sharding, NamedSharding) else put(x, jax.device_put(x, whole))
    return params, jax.tree.map(on_mesh, opt_state)


def put(x: jax.Array, like: jax.Array) -> jax.Array:
    """`x`, which every process has, divided as `like` is."""
    return jax.make_array_from_callback(x.shape, like.sharding, lambda at: np.asarray(x)[at])


def made(layout: str, directory: Path, scratch: Path, save: bool) -> dict:
    """What the worker printed, in so many processes with so many devices."""
    count, devices = map(int, layout.split("x"))
    flags = ["--directory", directory, *(["--save"] if save else [])]
    ends = run(Path(__file__), *flags, count=count, devices=devices, directory=scratch)
    return json.loads(ends[0].output.splitlines()[-1])


def faults(pair: str, scratch: Path) -> list[str]:
    """What is wrong with a pair."""
    source, target = pair.split(":")
    directory = scratch / source
    if not directory.exists():
        directory.mkdir()
        (directory / "saved.json").write_text(json.dumps(made(source, directory / "run", scratch, True)))
    saved = json.loads((directory / "saved.json").read_text())
    found, expected = made(target, directory / "run", scratch, False), digest(after(1, *trees()))
    different = [f"{pair}: {x['digest']}, not {expected}" for x in (saved, found) if x["digest"] != expected]
    close = math.isclose(found["loss"], saved["loss"], rel_tol=2e-6)
    return different if close else [*different, f"{pair}: the losses {saved['loss']} and {found['loss']}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = [":".join(pair) for pair in itertools.product(LAYOUTS, LAYOUTS)]
    parser.add_argument("--pairs", nargs="+", default=every)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)  # what a process of its own is to do
    parser.add_argument("--save", action="store_true", help=argparse.SUPPRESS)
    for name, kind in (("coordinator", str), ("processes", int), ("process", int)):
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.directory:
        return worker(options)
    wrong = []
    with tempfile.TemporaryDirectory() as scratch:
        for pair in options.pairs:
            wrong += (found := faults(pair, Path(scratch)))
            print(pair, *found or ["ok"], flush=True)
    print(f"pairs: {len(options.pairs)}, wrong: {len(wrong)}")
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
