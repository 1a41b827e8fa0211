"""Options of the compiler: of a TPU v4 alone, by the device that a step is traced for."""

from lmjax.training.compiler_options import step_options
from pallas_kernels.target import interpreted


def test_a_v4_gathers_weights_while_it_computes():
    with interpreted("TPU v4"):
        assert step_options()["xla_enable_async_all_gather"] == "true"


def test_other_devices_have_none():
    assert step_options() is None
    with interpreted("TPU v5 lite"):
        assert step_options() is None
