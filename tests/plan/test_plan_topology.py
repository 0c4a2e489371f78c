"""Topologies by name; nothing here needs their compilers."""

import re

import pytest

from jpeft.plan import PlanError, Topology
from jpeft.plan import _topology as topology
from jpeft.plan._topology import CHIPS


@pytest.mark.parametrize(
    ("text", "name", "chips", "gib"),
    [
        ("v5e:4x4", "v5e:4x4", 16, 16),
        ("v5e-256", "v5e:16x16", 256, 16),
        ("v6e-16", "v6e:4x4", 16, 32),
        ("v5p:2x4x4", "v5p:2x4x4", 32, 95),
        ("v5p-64", "v5p:2x4x4", 32, 95),  # its number counts cores, two a chip
    ],
)
def test_names(text, name, chips, gib):
    found = Topology.parse(text)
    assert (str(found), found.chips, found.hbm) == (name, chips, gib * 2**30)


OTHERS = ("", "v5e", "v5e:", "v5e:3x3", "v5e:4x4x1", "v5e:0x4", "v5e-17", "v5e-", "v9:2x2", "v5e:4x٤", "v5p:4x4",
          "v5e-99999999999", "v5e:4x4\n", "cuda:8")  # fmt: skip


@pytest.mark.parametrize("text", OTHERS)
def test_others_are_refused_with_those_that_are_known(text):
    with pytest.raises(PlanError, match=re.escape(f"unknown topology {text!r}")) as found:
        Topology.parse(text, "")
    assert all(slice_ in str(found.value) for chip in CHIPS.values() for slice_ in chip.slices)


def test_every_slice_has_a_name_of_its_own():
    for kind, chip in CHIPS.items():
        found = [Topology.parse(f"{kind}:{slice_}") for slice_ in chip.slices]
        cores = [t.chips * chip.cores for t in found]
        assert [Topology.parse(f"{kind}-{n}") for n in cores] == found


def test_gpus_need_a_target_which_tells_their_memory():
    with pytest.raises(PlanError, match="--target-config FILE"):
        Topology.parse("cuda:1x1x8")
    found = Topology.parse("cuda:1x1x8", "gpu_device_info {\n  device_memory_size: 150039756800\n}")
    assert (found.chips, found.hbm) == (8, 150039756800)
    with pytest.raises(PlanError, match="does not tell its device_memory_size"):
        _ = Topology.parse("cuda:1x1x8", "{}").hbm


def test_without_the_compiler_it_is_told_what_to_install(monkeypatch):
    monkeypatch.setattr(topology.util, "find_spec", lambda name: None)
    with pytest.raises(PlanError, match=re.escape('pip install "jpeft[tpu]"')):
        Topology.parse("v5e:2x2").devices()


@pytest.mark.parametrize(
    ("error", "remedy"),
    [("Failed to parse GpuTargetConfigProto", "of a later XLA"), ("no plugin", 'pip install "jax[cuda13]"')],
)
def test_what_the_compiler_for_gpus_says_comes_with_a_remedy(error, remedy, monkeypatch):
    def refuse(**_):
        raise RuntimeError(error)

    monkeypatch.setattr(topology, "get_topology_desc", refuse)
    with pytest.raises(PlanError, match=f"{re.escape(error)}.*{re.escape(remedy)}"):
        Topology.parse("cuda:1x1x8", "{}").devices()
