"""`jpeft plan`: what it refuses, and, where there is a compiler for TPUs, what it tells."""

import json
import os
import subprocess
import sys

import pytest

from jpeft.cli import main
from jpeft.cli import plan as command
from jpeft.plan import Memory, Plan, Topology
from jpeft.plan import _plan as planned
from jpeft.plan import _topology as topology


CONFIG = {
    "model_type": "llama", "vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
}  # fmt: skip


@pytest.fixture
def model(tmp_path):
    """A directory without weights."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


ERRORS = {
    "no directory": (["nowhere"], "nowhere"),
    "topology": (["--topology", "v5e:5x5"], "unknown topology 'v5e:5x5'. Known are, written v5e:4x4, v5e: 1x1, 2x2"),
    "mesh text": (["--mesh", "fsdp:4"], "write it data=2,fsdp=8,tensor=1"),
    "mesh axis": (["--mesh", "model=16"], "no axis 'model': there are data, fsdp, tensor"),
    "mesh size": (["--mesh", "fsdp=4,tensor=2"], "data=1,fsdp=4,tensor=2 is of 8 chips, and v5e:4x4 has 16"),
    "rows": (["--mesh", "fsdp=16", "--batch-size", "24"], "24 rows cannot be divided over data x fsdp = 16"),
    "length": (["--length", "1", "--rank", "0"], "--length must be 2 or more, not 1; --rank must be 1 or more, not 0"),
    "method": (["--method", "lorra"], "did you mean lora"),
    "base": (["--base", "nf5"], "did you mean nf4"),
    "remat": (["--remat", "ful"], "did you mean full"),
    "no target": (["--topology", "cuda:1x1x8"], "--target-config FILE"),
    "no compiler": ([], 'pip install "jpeft[tpu]"'),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_one_line(name, model, monkeypatch, capsys):
    find = topology.util.find_spec
    monkeypatch.setattr(topology.util, "find_spec", lambda name: None if name == "libtpu" else find(name))
    given, message = ERRORS[name]
    directory = [] if given and not given[0].startswith("--") else [str(model)]
    assert main(["plan", *directory, *given]) == 2
    told = capsys.readouterr().err
    assert told.startswith("jpeft: ") and told.count("\n") == 1 and message in told


def test_an_encoder_is_refused(model, capsys):
    (model / "config.json").write_text(json.dumps(CONFIG | {"model_type": "bert"}))
    assert main(["plan", str(model)]) == 2
    assert "no causal model: its model_type is bert" in capsys.readouterr().err


def test_weights_are_divided_by_default_until_they_take_an_eighth():
    chips = Topology.parse("v5e:4x4")
    assert planned.default_mesh(2 * 2**30, chips) == {"data": 16, "fsdp": 1, "tensor": 1}
    assert planned.default_mesh(2 * 2**30 + 1, chips) == {"data": 8, "fsdp": 2, "tensor": 1}
    assert planned.default_mesh(2**40, chips) == {"data": 1, "fsdp": 16, "tensor": 1}


class Refused:
    """A step that a compiler refuses."""

    def __init__(self, message):
        self.message = message

    def __getitem__(self, _):
        return ((),) * 4

    def lower(self):
        return self

    def compile(self):
        raise RuntimeError(self.message)


@pytest.mark.parametrize(
    ("message", "gib", "limit"),
    [
        ("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (18.25G) exceeds "
         "available HBM (15.75G).", 18.25, 15.75),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm.", 20.5, 15.75),
    ],
)  # fmt: skip
def test_a_program_that_the_compiler_refuses(message, gib, limit):
    memory, available, calls = planned._compile(Refused(message))
    assert (memory.total, available, calls) == (gib * 2**30, limit * 2**30, None)
    with pytest.raises(RuntimeError, match="INTERNAL"):
        planned._compile(Refused("INTERNAL: Ran out of memory, Used 20.50G of 15.75G hbm"))


def test_what_does_not_fit_is_told_with_a_remedy(model, monkeypatch, capsys):
    gib = 2**30
    found = Plan(
        "v5e:4x4", {"data": 1, "fsdp": 16, "tensor": 1}, 32, 2048, Memory(gib, 0, 0, 0, 0, 19 * gib, 0), 16 * gib,
        10 * gib, int(15.75 * gib), None, 1.0, gib,
    )  # fmt: skip
    monkeypatch.setattr(command, "plan", lambda *args, **options: found)
    assert main(["plan", str(model)]) == 1
    told = capsys.readouterr().out
    assert "it does not fit: 4.2 GiB too much for 16.0 GiB" in told and "2.00 times" in told
    assert "to try: a smaller --batch-size: 16 is one row a chip" in told
    assert main(["plan", str(model), "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert (told["total"], told["fits"], told["missing"]) == (20 * gib, False, int(4.25 * gib))


H100 = """
gpu_device_info {
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048
  shared_memory_per_block: 49152  shared_memory_per_block_optin: 232448  shared_memory_per_core: 233472
  core_count: 132  fpus_per_core: 128  clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000  l2_cache_size: 52428800  device_memory_size: 84929347584
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  cuda_compute_capability { major: 9 }
}
platform_name: "CUDA"
dnn_version_info { major: 9  minor: 10 }
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("compiler", "chips"),
    [("libtpu", "v5e:2x2"), ("jax_plugins.xla_cuda13", "cuda:1x1x4")],
)
def test_for_chips_that_are_not_there(model, compiler, chips):
    pytest.importorskip(compiler, reason='the compilers: pip install libtpu "jax[cuda13]"')
    (model / "h100.txtpb").write_text(H100)
    code = "import sys; from jpeft.cli import main; sys.exit(main())"
    options = ["--mesh=fsdp=2,tensor=2", "--base=nf4", "--length=64", "--batch-size=4", "--json"]
    options += [f"--topology={chips}", f"--target-config={model / 'h100.txtpb'}"]
    done = subprocess.run(
        [sys.executable, "-c", code, "plan", str(model), *options], env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    memory = told["memory"]
    assert told["fits"] and told["missing"] == 0 and told["total"] == sum(memory.values()) < told["hbm"]
    assert memory["temporaries"] > 0 and (memory["code"] > 0 or compiler != "libtpu")
    assert memory["batch"] == 2 * 64 * 4  # two of the rows
    # Of tensor parallelism and of FSDP: partial sums of activations, and codes.
    assert {"all-reduce", "all-gather"} <= {x["kind"] for x in told["collectives"]}
    codes = 2 * (2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 512) // 2
    gathered = sum(x["bytes"] for x in told["collectives"] if (x["kind"], x["dtype"]) == ("all-gather", "u8"))
    assert codes / 2 <= gathered <= 3 * codes / 2  # half of each kernel, forward and backward


def test_where_another_holds_the_compiler_it_waits(tmp_path, monkeypatch):
    monkeypatch.setattr(topology.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(topology, "_turn", [])
    topology._wait_for_turn()
    code = f"import fcntl; f = open({topology._turn[0].name!r}); fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "BlockingIOError" in other.stderr
    topology._turn.pop().close()
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
