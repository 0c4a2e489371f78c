"""Fine-tuning on any number of devices, in any number of processes: one file, to copy and to change.

    python experiments/train_pjit.py --model CHECKPOINT --data TEXT --output RUN

CHECKPOINT is a Hugging Face directory of a causal model, or its name on the hub; TEXT a text file, or an .npy file of
token ids. The same command goes on with a run that was interrupted. On a pod it is started once for every process,
with the same arguments, and RUN on a file system that all of them see: docs/pods.md. RUN holds

    checkpoints/      what is needed to go on, as `jpeft.CheckpointManager` writes it
    metrics.jsonl     a row for every --log-every updates
    adapter/          at the end, the adapter as PEFT loads it

Exit codes: 0, the last step is done; 75, saved after a SIGTERM, to be started again; 69, another process failed;
anything else, this one did, and what it printed tells why. In all cases the last step that was saved is whole.
"""

import dataclasses
import functools
import json
import math
import sys
import time
from pathlib import Path

import grain.python as grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jpeft


@dataclasses.dataclass(frozen=True)
class Arguments:
    model: str
    """directory of a checkpoint, or its name on the Hugging Face hub"""
    data: Path
    """a text file, or an .npy file of token ids"""
    output: Path
    """directory of the run; one with saved steps goes on after the last of them"""
    mesh: str = "data=-1"
    """sizes of "data", "fsdp", "tensor" and "expert"; -1 is what the devices leave: data=2,fsdp=-1,tensor=4"""
    method: str = "lora"
    """a transform of jpeft"""
    options: str = '{"rank": 8, "alpha": 16}'
    """what it is given, in JSON"""
    adapter_sharding: str = "tensor"
    """"tensor": no adapter is gathered; "inherit": less memory"""
    quantize: str | None = None
    """nf4, int8 or int4: what the base becomes while it is read"""
    remat: str | None = None
    """"full" or "dots": what the backward pass does not recompute"""
    steps: int = 1000
    """updates"""
    batch: int = 8
    """rows in a microbatch, over all processes"""
    accumulate: int = 1
    """microbatches in an update"""
    length: int = 512
    """tokens in a row"""
    learning_rate: float = 2e-4
    """at its peak, after a tenth of the steps; then a cosine to 0"""
    clip: float = 1.0
    """largest norm of the gradients"""
    max_skipped: int = 5
    """updates in a row that may be not finite; they are skipped"""
    seed: int = 0
    """of the adapter, of dropout and of the order of the rows"""
    save_every: int = 100
    log_every: int = 10
    keep: int = 3
    """how many saved steps"""
    coordinator: str | None = None
    """host:port of process 0, where JAX does not find it by itself"""
    processes: int | None = None
    process: int | None = None


# A resumed run may have other values of these.
FREE = {"output", "mesh", "adapter_sharding", "remat", "save_every", "log_every", "keep"}
FREE |= {"coordinator", "processes", "process"}


def make_mesh(text):
    """A mesh of all devices, its axes left to XLA, from `data=2,fsdp=-1`."""
    sizes = {name: int(size) for name, size in (axis.split("=") for axis in text.split(","))}
    left = jax.device_count() // math.prod(size for size in sizes.values() if size > 0)
    shape = tuple(left if size == -1 else size for size in sizes.values())
    return jax.make_mesh(shape, tuple(sizes), axis_types=(AxisType.Auto,) * len(shape))


class Windows(grain.RandomAccessDataSource):
    """Rows of `length` tokens, one after another."""

    def __init__(self, tokens, length):
        self.tokens, self.length = tokens, length

    def __len__(self):
        return len(self.tokens) // self.length

    def __getitem__(self, n):
        return np.asarray(self.tokens[n * self.length : (n + 1) * self.length], np.int32)


def make_batches(arguments, tokenizer, sharding):
    """Two: an iterator over what this process needs of every update, and what makes arrays over all devices of it.

    Rows are shuffled anew in every epoch. Those of an update are the same for any mesh and number of processes.
    """
    if arguments.data.suffix == ".npy":
        tokens = np.load(arguments.data, mmap_mode="r")
    else:
        tokens = tokenizer.encode(arguments.data.read_text()).ids
    rows = grain.MapDataset.source(Windows(tokens, arguments.length)).seed(arguments.seed).shuffle().repeat()
    shape = arguments.accumulate, arguments.batch, arguments.length
    blocks = sharding.addressable_devices_indices_map(shape).values()
    own = sorted({row for _, block, _ in blocks for row in range(*block.indices(arguments.batch))})
    size = arguments.accumulate * arguments.batch
    places = np.arange(0, size, arguments.batch)[:, None] + own  # (accumulate, own rows)

    def read(n):
        return np.array([[rows[n * size + i] for i in row] for row in places])

    def put(local):
        """`local` (accumulate, own rows, length): the rows of a device lie together in it."""

        def part(at):
            start, stop, _ = at[1].indices(arguments.batch)
            return local[:, own.index(start) :][:, : stop - start]

        return jax.make_array_from_callback(shape, sharding, part)

    return iter(grain.MapDataset.range(arguments.steps).map(read).to_iter_dataset()), put


def make_optimizer(arguments):
    schedule = optax.warmup_cosine_decay_schedule(0.0, arguments.learning_rate, arguments.steps // 10, arguments.steps)
    return jpeft.optim.skip_nonfinite(
        optax.chain(optax.clip_by_global_norm(arguments.clip), optax.adamw(schedule, weight_decay=0.0))
    )


def make_params(arguments, mesh):
    """The model, its parameters with the adapter, divided over the mesh, and the tokenizer."""
    quantize = getattr(jpeft, arguments.quantize)() if arguments.quantize else None
    model, base, tokenizer = jpeft.hf.load(
        arguments.model, mesh=mesh, quantize=quantize, scan=True, remat=arguments.remat
    )
    sites = jpeft.sites(model, {"params": base}, jax.ShapeDtypeStruct((1, 8), jnp.int32))
    method = functools.partial(getattr(jpeft, arguments.method), sites=sites, key=jax.random.key(arguments.seed))
    params = method(base, **json.loads(arguments.options))
    base_shardings = jpeft.models.shardings(jax.eval_shape(jpeft.merge, base), mesh)
    shardings = jpeft.shardings(params, base_shardings, adapter_sharding=arguments.adapter_sharding)
    return model, jpeft.shard(params, shardings), tokenizer


def make_step(model, tx, key, shardings):
    """`((trainable, opt_state), frozen, tokens, n) -> ((trainable, opt_state), metrics)`, the state divided as told."""

    def loss(trainable, frozen, tokens, key):
        params = {"params": jpeft.combine(trainable, frozen)}
        losses = jpeft.apply(model, params, tokens, labels=tokens, rngs={"dropout": key})
        return losses.sum() / (tokens.shape[0] * (tokens.shape[1] - 1))  # nothing predicts the first

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=(shardings, None))
    def step(state, frozen, tokens, n):
        trainable, opt_state = state
        keys = jax.random.split(jax.random.fold_in(key, n), len(tokens))

        def add(sums, microbatch):
            return jax.tree.map(jnp.add, sums, jax.value_and_grad(loss)(trainable, frozen, *microbatch)), None

        zeros = jnp.float32(0), jax.tree.map(jnp.zeros_like, trainable)
        value, grads = jax.tree.map(lambda x: x / len(tokens), jax.lax.scan(add, zeros, (tokens, keys))[0])
        updates, opt_state = tx.update(grads, opt_state, trainable, value=value)
        metrics = {"loss": value, "gradient_norm": optax.global_norm(grads), "skipped": opt_state.skipped}
        return (optax.apply_updates(trainable, updates), opt_state), metrics

    return step


def on_mesh(tree, mesh):
    """What `tx.init` made; its counters are on no mesh yet."""
    whole = NamedSharding(mesh, PartitionSpec())
    place = lambda x: jax.make_array_from_callback(x.shape, whole, lambda at: np.asarray(x)[at])
    return jax.tree.map(lambda x: x if isinstance(x.sharding, NamedSharding) else place(x), tree)


def log(path, row):
    print("  ".join(f"{name} {x:g}" for name, x in row.items()), flush=True)
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def forget(path, step):
    """Drop the rows that were logged after `step`: those updates are made again."""
    if path.exists():
        rows = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("}\n")]
        path.write_text("".join(line for line in rows if json.loads(line)["step"] <= step))


def main(arguments):
    jpeft.distributed.initialize(arguments.coordinator, arguments.processes, arguments.process)
    primary = jax.process_index() == 0
    mesh = make_mesh(arguments.mesh)
    jax.set_mesh(mesh)  # the models divide their activations over it
    model, params, tokenizer = make_params(arguments, mesh)
    tx = make_optimizer(arguments)
    if primary:
        print(jpeft.summary(params, tx), flush=True)
    trainable, frozen = jpeft.partition(params)
    state = trainable, on_mesh(tx.init(trainable), mesh)

    rows = tuple(axis for axis in ("data", "fsdp") if axis in mesh.axis_names)
    sharding = NamedSharding(mesh, PartitionSpec(None, rows))
    shape = arguments.accumulate, arguments.batch, arguments.length
    batches, put = make_batches(arguments, tokenizer, sharding)
    kept = {name: str(x) for name, x in dataclasses.asdict(arguments).items() if name not in FREE}
    metrics_file, start = arguments.output / "metrics.jsonl", 0

    with jpeft.CheckpointManager(arguments.output / "checkpoints", keep=arguments.keep) as manager:
        if (found := manager.restore(params, state[1])) is not None:
            if found.data["arguments"] != kept:
                raise ValueError(f"{arguments.output} was started with {found.data['arguments']}, and not {kept}")
            start, state = found.step, (jpeft.partition(found.params)[0], found.opt_state)
            batches.set_state(found.data["batches"])
            if primary:
                print(f"Going on after step {start}", flush=True)
        if primary:
            arguments.output.mkdir(parents=True, exist_ok=True)
            forget(metrics_file, start)

        def save(n):
            data = {"batches": batches.get_state(), "arguments": kept}
            manager.save(n, jpeft.combine(state[0], frozen), state[1], data=data)

        tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding)
        shardings = jax.tree.map(lambda x: x.sharding, state)
        step = make_step(model, tx, jax.random.key(arguments.seed), shardings)
        step = jpeft.distributed.compile(step, state, frozen, tokens, np.int32(0))
        since = time.perf_counter(), start
        for n in range(start + 1, arguments.steps + 1):
            local = next(batches)
            state, metrics = step(state, frozen, put(local), np.int32(n))
            if n % arguments.log_every == 0 or n == arguments.steps:
                try:
                    jpeft.optim.check_finite(state[1], limit=arguments.max_skipped)
                except jpeft.optim.NonFiniteError:
                    np.save(arguments.output / f"not-finite-{n}-{jax.process_index()}.npy", local)
                    raise
                if primary:
                    now = time.perf_counter(), n
                    speed = (now[1] - since[1]) * math.prod(shape) / (now[0] - since[0])
                    row = {name: x.item() for name, x in jax.device_get(metrics).items()}
                    log(metrics_file, {"step": n} | row | {"tokens_per_second": round(speed)})
                    since = now
            preempted = jpeft.distributed.preempted(n)
            if preempted or n % arguments.save_every == 0 or n == arguments.steps:
                save(n)
            if preempted and n < arguments.steps:
                manager.wait()
                return jpeft.distributed.PREEMPTED

    # The adapter alone goes to every process; the base stays where it is.
    trainable = multihost_utils.process_allgather(state[0], tiled=True)
    if primary:
        adapter = jpeft.combine(trainable, frozen)
        jpeft.hf.save_adapter(arguments.output / "adapter", adapter, model=model, task_type="CAUSAL_LM", overwrite=True)
    jpeft.distributed.barrier("done")
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments, description=__doc__)))
