from tokenexit.engine import ops
from tokenexit.engine.ops import Ops


def test_ops__add_up_field_by_field():
    assert Ops(1, 2, 3) + Ops(10, 20, 30) == Ops(11, 22, 33)
    assert 3 * Ops(1, 2, 3) == Ops(1, 2, 3) * 3 == Ops(3, 6, 9)


def test_linear__is_tokens_times_inputs_times_outputs():
    assert ops.linear(7, 3, 5) == Ops(macs=105)


def test_attention__counts_both_products():
    assert ops.attention(queries=4, keys=6, width=10) == Ops(macs=2 * 4 * 6 * 10)


def test_conv2d__counts_every_output_and_kernel_cell():
    assert ops.conv2d(2, 3, 4, 5, kernel=3) == Ops(macs=2 * 3 * 4 * 5 * 9)


def test_layer_norm__costs_no_multiply_adds():
    assert ops.layer_norm(10, 8) == Ops(norm_elements=80)


def test_dtop_convention__charges_norms_and_upsampling_and_drops_what_is_repeated():
    assert Ops(macs=100, norm_elements=10, repeated=30).in_dtop_convention(2) == 100 - 30 + 50 + 8
