"""What is sent is counted from programs as the compilers write them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jpeft.plan import Collective, collectives


# As for TPUs: a gather begun in one computation and ended in another, within a loop of 32 turns whose count stands in
# its condition, and a scatter that is written as a reduction.
TPU = """HloModule jit_step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[]{:T(128)} parameter(0)
  %y = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%x, %y)
}

%begin (p.1: u8[1,128,256]) -> (u8[1,128,256], u8[1,256,256]) {
  %p.1 = u8[1,128,256]{2,1,0:T(8,128)(4,1)S(1)} parameter(0)
  %gather.1 = u8[1,256,256]{2,1,0:T(8,128)(4,1)} all-gather(%p.1), channel_id=42
  ROOT %call = (u8[1,128,256]{2,1,0}, u8[1,256,256]{2,1,0}) custom-call(%gather.1), custom_call_target="Start"
}

%end (p.2: u8[1,128,256]) -> u8[1,256,256] {
  %p.2 = u8[1,128,256]{2,1,0:T(8,128)(4,1)S(1)} parameter(0)
  ROOT %gather.2 = u8[1,256,256]{2,1,0:T(8,128)(4,1)} all-gather(%p.2), channel_id=42
}

%all-reduce-scatter (input: bf16[4,512]) -> bf16[2,512] {
  %input = bf16[4,512]{1,0} parameter(0)
  %reduce.1 = bf16[4,512]{1,0:T(8,128)(2,1)} all-reduce(%input), channel_id=97, to_apply=%add
  %n = s32[]{:T(128)} constant(2)
  ROOT %slice = bf16[2,512]{1,0} dynamic-slice(%reduce.1, %n, %n), dynamic_slice_sizes={2,512}
}

%condition (state: (s32[], u8[1,128,256])) -> pred[] {
  %limit = s32[]{:T(128)} constant(32)
  %state = (s32[]{:T(128)}, u8[1,128,256]{2,1,0}) parameter(0)
  %turn = s32[]{:T(128)} get-tuple-element(%state), index=0
  ROOT %less = pred[]{:T(512)} compare(%turn, %limit), direction=LT
}

%body (state.1: (s32[], u8[1,128,256])) -> (s32[], u8[1,128,256]) {
  %state.1 = (s32[]{:T(128)}, u8[1,128,256]{2,1,0}) parameter(0)
  %codes = u8[1,128,256]{2,1,0} get-tuple-element(%state.1), index=1
  %begun = (u8[1,128,256]{2,1,0}, u8[1,256,256]{2,1,0}) fusion(%codes), kind=kCustom, calls=%begin
  %ended = u8[1,256,256]{2,1,0} fusion(%codes), kind=kCustom, calls=%end
  %turn.1 = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  ROOT %next = (s32[]{:T(128)}, u8[1,128,256]{2,1,0}) tuple(%turn.1, %codes)
}

ENTRY %main (codes.1: u8[1,128,256], x.1: bf16[4,512]) -> bf16[2,512] {
  %codes.1 = u8[1,128,256]{2,1,0} parameter(0)
  %x.1 = bf16[4,512]{1,0} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %first = (s32[]{:T(128)}, u8[1,128,256]{2,1,0}) tuple(%zero, %codes.1)
  %while.1 = (s32[]{:T(128)}, /*index=1*/u8[1,128,256]{2,1,0}) while(%first), condition=%condition, body=%body
  %start = (bf16[4,512]{1,0}, bf16[4,512]{1,0}, u32[], u32[]) collective-permute-start(%x.1), channel_id=3
  %done = bf16[4,512]{1,0} collective-permute-done(%start)
  ROOT %out = bf16[2,512]{1,0} fusion(%done), kind=kCustom, calls=%all-reduce-scatter
}
"""


def test_a_program_for_tpus():
    assert collectives(TPU) == [
        Collective("all-gather", "u8", 32, 32 * 256 * 256),
        Collective("collective-permute", "bf16", 1, 4 * 512 * 2),
        Collective("reduce-scatter", "bf16", 1, 4 * 512 * 2),
    ]


@pytest.mark.slow
def test_on_eight_devices():
    tests = Path(__file__).with_name("eight_devices.py")
    devices = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "--tb=short", str(tests)]
    done = subprocess.run(command, env=os.environ | devices, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
