"""What programs that never asked for other processes see of `jpeft.distributed`."""

import jax
import jax.numpy as jnp
import pytest

from jpeft import distributed


def test_a_program_that_did_not_initialize_waits_for_nobody():
    distributed.barrier("alone", timeout=0)
    assert not distributed.preempted(1)


def test_compiled_for_the_shapes_of_its_arguments():
    fn = distributed.compile(jax.jit(lambda x: 2 * x), jax.ShapeDtypeStruct((3,), jnp.float32))
    assert fn(jnp.ones(3)).tolist() == [2.0, 2.0, 2.0]
    with pytest.raises(TypeError):
        fn(jnp.ones(4))


def test_exit_codes_are_those_of_sysexits():
    assert (distributed.PEER_FAILED, distributed.PREEMPTED) == (69, 75)
