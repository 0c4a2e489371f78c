"""Programs of several processes: the losses of one, checkpoints for any number, and one end for all."""

import random
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from launcher import Processes, run
from training import FAULTY, TRAIN, inputs, losses

import jpeft


sys.path.append(str(Path(__file__).parents[1] / "faults"))
import peers
import preempt
import topology


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("processes")


def trained(directory, count, devices, *arguments):
    """The losses of six updates."""
    output = directory / f"{count}x{devices}-{'-'.join(map(str, arguments))}"
    training = [*inputs(directory), "--steps", 6, "--save-every", 6, "--output", output]
    run(TRAIN, *training, *arguments, count=count, devices=devices, directory=directory)
    return list(losses(output).values())


@pytest.mark.parametrize(("mesh", "count"), [("data=2", 2), ("fsdp=2", 2), ("data=2,fsdp=2", 4)])
def test_losses_are_those_of_one_process(directory, mesh, count):
    expected, found = (trained(directory, n, count // n, "--mesh", mesh) for n in (1, count))
    assert len(set(expected)) == 6
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_a_quantized_base_a_text_and_microbatches(directory):
    arguments = inputs(directory)
    text = directory / "text.txt"
    text.write_text("the sky is blue and the grass is green\n" * 50)
    arguments[arguments.index("--data") + 1] = text
    output = directory / "text"
    more = ["--quantize", "nf4", "--accumulate", 2, "--steps", 20, "--learning-rate", 1e-2, "--remat", "full"]
    run(TRAIN, *arguments, *more, "--output", output, count=1, directory=directory)
    found = losses(output)
    assert found[20] < 0.8 * found[1]
    model, base, _ = jpeft.hf.load(directory / "llama")
    tuned = jpeft.hf.load_adapter(output / "adapter", base, model=model)
    assert jpeft.summary(tuned).trainable == 4096


@pytest.mark.parametrize("fault", ["kill", "raise"])
@pytest.mark.parametrize("where", ["step", "save"])
@pytest.mark.parametrize("victim", [0, 1])
def test_all_end_with_one_that_fails(directory, fault, where, victim):
    given = {"fault": fault, "where": where, "at": 8, "victim": victim, "delay": 0.02}
    assert peers.trial(directory, f"{fault}-{where}-{victim}", given, 2)[1] == []


@pytest.mark.parametrize("processes", [1, 2])
def test_all_save_one_step_after_a_sigterm(directory, processes):
    assert preempt.trial(directory, f"preempted-{processes}", processes, random.Random(0))[1] == []


def test_the_second_sigterm_ends_at_once(directory):
    training = [*inputs(directory), "--steps", 6, "--output", directory / "twice"]
    with Processes(FAULTY, "--pace", 600, *training, count=1, directory=directory) as group:
        group.until("step 1  ")
        group.send(0, signal.SIGTERM)
        time.sleep(1)
        assert group.processes[0].poll() is None
        group.send(0, signal.SIGTERM)
        assert group.processes[0].wait(timeout=10) == -signal.SIGTERM


@pytest.mark.parametrize("pair", ["4x2:1x8", "4x2:2x2", "4x2:1x1", "1x1:4x2"])
def test_a_checkpoint_is_restored_by_any_number_of_processes(directory, pair):
    assert topology.faults(pair, directory) == []
