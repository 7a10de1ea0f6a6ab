import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers import assert_close
from tokenexit.engine import attention
from tokenexit.engine.attention import (
    MaskedRows,
    attention_path,
    masked_attention,
    packed_attention,
    pad,
    padded_attention,
    segment_matmul,
    unpad,
)
from tokenexit.engine.tokens import Packing, PaddedPacking

CPU = torch.device("cpu")
lengths = st.lists(st.integers(0, 5), min_size=1, max_size=4)


def drawn(lengths_q, lengths_k, heads=2, width=4, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def rows(n):
        return torch.randn(n, heads, width, generator=generator, requires_grad=True)

    return rows(sum(lengths_q)), rows(sum(lengths_k)), rows(sum(lengths_k))


def by_hand(q, k, v, lengths_q, lengths_k):
    """Image by image, head by head, query by query."""
    out, at_q, at_k = [], 0, 0
    for nq, nk in zip(lengths_q, lengths_k):
        for i in range(at_q, at_q + nq):
            if nk == 0:
                out.append(torch.zeros_like(q[i]))
                continue
            heads = []
            for head in range(q.shape[1]):
                score = torch.stack([q[i, head] @ k[j, head] for j in range(at_k, at_k + nk)])
                weight = torch.softmax(score / math.sqrt(q.shape[2]), dim=0)
                heads.append(weight @ v[at_k : at_k + nk, head])
            out.append(torch.stack(heads))
        at_q, at_k = at_q + nq, at_k + nk
    return torch.stack(out) if out else q[:0]


@pytest.mark.parametrize("attend", [packed_attention, padded_attention])
@given(pairs=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=4))
def test_attention__equals_the_reference_for_any_packing_of_queries_and_keys(attend, pairs):
    lengths_q, lengths_k = [p[0] for p in pairs], [p[1] for p in pairs]
    q, k, v = drawn(lengths_q, lengths_k)
    out = attend(q, k, v, Packing.of(lengths_q, CPU), Packing.of(lengths_k, CPU))
    assert_close(out, by_hand(q, k, v, lengths_q, lengths_k))


@pytest.mark.parametrize("path", ["as it comes", "padded", "products"])
@given(
    pairs=st.lists(st.tuples(st.integers(0, 4), st.lists(st.integers(1, 3), max_size=4)), min_size=1, max_size=4),
    equal=st.booleans(),
)
def test_attention__a_key_of_weight_w_counts_as_w_equal_keys(path, pairs, equal):
    pairs = [pairs[0]] * len(pairs) if equal else pairs
    lengths_q, counts = [q for q, _ in pairs], [count for _, image in pairs for count in image]
    lengths_k, repeated = [len(image) for _, image in pairs], [sum(image) for _, image in pairs]
    q, k, v = drawn(lengths_q, lengths_k)
    times = torch.tensor(counts, dtype=torch.int64)
    expected = by_hand(q, k.repeat_interleave(times, 0), v.repeat_interleave(times, 0), lengths_q, repeated)
    packings = Packing.of(lengths_q, CPU), Packing.of(lengths_k, CPU)
    with pytest.MonkeyPatch.context() as patch:
        if path == "padded":
            patch.setattr(attention, "attention_path", lambda *_: "padded")
        if path == "products":
            patch.setattr(attention, "_fused", attention._products)
        assert_close(packed_attention(q, k, v, *packings, weight=times.float()), expected)


@given(pairs=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=4))
def test_attention__loop_and_padded_paths_have_the_same_gradients(pairs):
    lengths_q, lengths_k = [p[0] for p in pairs], [p[1] for p in pairs]
    packings = Packing.of(lengths_q, CPU), Packing.of(lengths_k, CPU)
    inputs = drawn(lengths_q, lengths_k)
    weight = torch.randn(inputs[0].shape)
    grads = []
    for attend in (packed_attention, padded_attention):
        out = attend(*inputs, *packings)
        zero = sum(t.sum() * 0 for t in inputs)
        grads.append(torch.autograd.grad((out * weight).sum() + zero, inputs))
    for loop, padded in zip(*grads):
        assert torch.isfinite(padded).all()
        assert_close(loop, padded)


def test_attention__equal_lengths_give_the_same_as_the_padded_path():
    q, k, v = drawn([3, 3], [4, 4])
    packings = Packing.of([3, 3], CPU), Packing.of([4, 4], CPU)
    assert_close(packed_attention(q, k, v, *packings), padded_attention(q, k, v, *packings))


@pytest.mark.parametrize("attend", [packed_attention, padded_attention])
def test_attention__queries_without_keys_receive_zeros(attend):
    q, k, v = drawn([2, 1], [0, 3])
    out = attend(q, k, v, Packing.of([2, 1], CPU), Packing.of([0, 3], CPU))
    assert out[:2].abs().sum() == 0
    assert out[2].abs().sum() > 0


@pytest.mark.parametrize("attend", [packed_attention, padded_attention])
def test_attention__a_batch_of_empty_images_is_empty(attend):
    q, k, v = drawn([0, 0], [0, 0])
    empty = Packing.of([0, 0], CPU)
    assert attend(q, k, v, empty, empty).shape == (0, 2, 4)


def test_attention__images_do_not_see_each_other():
    q, k, v = drawn([2, 3], [2, 3])
    packing = Packing.of([2, 3], CPU)
    before = packed_attention(q, k, v, packing, packing)
    with torch.no_grad():
        k[2:] += 5.0
        v[2:] -= 3.0
    after = packed_attention(q, k, v, packing, packing)
    assert torch.equal(before[:2], after[:2])
    assert not torch.allclose(before[2:], after[2:])


def test_attention_path__depends_on_device_precision_and_equal_lengths():
    cuda = torch.device("cuda")
    assert attention_path(CPU, torch.float32) == "loop"
    assert attention_path(CPU, torch.float32, uniform=True) == "batched"
    assert attention_path(cuda, torch.bfloat16) == "varlen"
    assert attention_path(cuda, torch.float16) == "varlen"
    assert attention_path(cuda, torch.float32) == "padded"


def test_attention__dropout_zeroes_weights_and_keeps_the_mean():
    q, k, v = drawn([400, 1], [3, 1])
    v = torch.ones_like(v)
    out = packed_attention(q, k, v, Packing.of([400, 1], CPU), Packing.of([3, 1], CPU), 0.5)[:400]
    assert (out - 1).abs().max() > 0.1
    assert out.mean().item() == pytest.approx(1.0, abs=0.1)


@given(lengths)
def test_pad__and_unpad_are_inverses(lengths):
    packing, rows = Packing.of(lengths, CPU), torch.randn(sum(lengths), 3)
    padded = pad(rows, packing)
    assert padded.shape == (len(lengths), max(lengths), 3)
    assert torch.equal(unpad(padded, packing), rows)


@given(lengths)
def test_segment_matmul__multiplies_each_image_by_its_own_matrix(lengths):
    x, y = torch.randn(sum(lengths), 3), torch.randn(len(lengths), 2, 3)
    packing = Packing.of(lengths, CPU)
    image = packing.image_index()
    expected = torch.stack([y[image[i]] @ x[i] for i in range(len(x))]) if len(x) else x[:, :2]
    assert_close(segment_matmul(x, y, packing), expected)
    assert_close(unpad(torch.bmm(pad(x, packing), y.transpose(1, 2)), packing), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-2)])
def test_attention__on_cuda_equals_the_reference(dtype, tolerance):
    lengths_q, lengths_k = [5, 0, 17, 3], [7, 2, 1, 0]
    q, k, v = (t.detach() for t in drawn(lengths_q, lengths_k, heads=2, width=64))
    device = torch.device("cuda")
    out = packed_attention(
        *(t.to(device, dtype) for t in (q, k, v)), Packing.of(lengths_q, device), Packing.of(lengths_k, device)
    )
    assert_close(out.cpu(), by_hand(q, k, v, lengths_q, lengths_k), tolerance)


@pytest.mark.parametrize("scores_in_cache", [1, 7, 40, 300, 2**20])
@given(rows=st.integers(1, 9), keys=st.integers(1, 9), images=st.integers(1, 3), heads=st.integers(1, 3))
def test_products__equal_the_fused_kernel_in_pieces_of_any_size(scores_in_cache, rows, keys, images, heads):
    q, k, v = drawn([rows * images], [keys * images], heads)
    shaped = [t.unflatten(0, (images, -1)).transpose(1, 2) for t in (q, k, v)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "SCORES_IN_CACHE", scores_in_cache)
        out = attention._products(*shaped, 0.0)
    expected = attention._fused(*shaped, 0.0)
    assert_close(out, expected)
    weight = torch.randn_like(expected)
    for ours, theirs in zip(
        torch.autograd.grad(out, (q, k, v), weight), torch.autograd.grad(expected, (q, k, v), weight)
    ):
        assert_close(ours, theirs)


def test_products__in_bf16_stay_within_its_rounding():
    q, k, v = (t.detach() for t in drawn([300], [300], heads=3, width=64))
    shaped = [t.unflatten(0, (1, -1)).transpose(1, 2) for t in (q, k, v)]
    error = attention._products(*(t.bfloat16() for t in shaped), 0.0).float() - attention._fused(*shaped, 0.0)
    assert error.abs().max() < 0.02
    assert error.abs().mean() < 1e-3


@pytest.mark.parametrize("has_tiles", [True, False])
def test_attention__on_a_cpu_multiplies_bf16_plainly_unless_it_has_matrix_tiles(monkeypatch, has_tiles):
    called = []
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_tiles)
    attention._products_are_faster.cache_clear()
    for name in ("_products", "_fused"):
        real = getattr(attention, name)
        monkeypatch.setattr(attention, name, lambda *a, real=real, name=name: called.append(name) or real(*a))
    q, k, v = (t.detach() for t in drawn([3], [3]))
    for dtype in (torch.float32, torch.bfloat16):
        packed_attention(q.to(dtype), k.to(dtype), v.to(dtype), Packing.of([3], CPU), Packing.of([3], CPU))
    attention._products_are_faster.cache_clear()
    assert called == ["_fused", "_fused" if has_tiles else "_products"]


@given(st.lists(st.integers(0, 5), min_size=1, max_size=3), st.integers(1, 3), st.integers(0, 1000))
def test_masked_rows__see_their_keys_alone_and_all_others_see_all(patches, queries, seed):
    lengths = [1 + queries + n for n in patches]  # a prefix token, the masked rows, patches
    q, k, v = drawn(lengths, lengths, seed=seed)
    packing = Packing.of(lengths, q.device)
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    rows = torch.tensor([start + 1 + i for start in starts for i in range(queries)])
    visible = torch.rand(len(lengths), queries, max(lengths)) < 0.4
    visible[:, :, 0] = True
    visible &= torch.arange(max(lengths)) < torch.tensor(lengths)[:, None, None]
    found = masked_attention(q, k, v, packing, MaskedRows(rows, visible))
    for image, (start, length) in enumerate(zip(starts, lengths)):
        mask = torch.ones(length, length, dtype=torch.bool)
        mask[1 : 1 + queries] = visible[image, :, :length]
        own = slice(start, start + length)
        scores = torch.einsum("qnh,knh->nqk", q[own], k[own]) / math.sqrt(q.shape[2])
        weights = scores.masked_fill(~mask, -math.inf).softmax(-1)
        assert_close(found[own], torch.einsum("nqk,knh->qnh", weights, v[own]))


def test_masked_rows__that_see_all_are_as_if_there_were_no_mask():
    lengths = [4, 7]
    q, k, v = drawn(lengths, lengths)
    packing = Packing.of(lengths, q.device)
    visible = (torch.arange(7) < torch.tensor(lengths)[:, None])[:, None].expand(2, 2, 7)
    masked = MaskedRows(torch.tensor([0, 1, 4, 5]), visible)
    assert_close(masked_attention(q, k, v, packing, masked), packed_attention(q, k, v, packing, packing))


@given(st.integers(1, 6), st.integers(0, 5), st.floats(-1e4, 1e4))
def test_packed_attention__does_not_see_padding(live: int, padding: int, filling: float) -> None:
    q, k, v = drawn([3], [live])
    rows = torch.full((padding, 2, 4), filling)
    visible = torch.arange(live + padding) < live
    padded = PaddedPacking((live + padding,), CPU, visible)
    out = packed_attention(q, torch.cat([k, rows / 1e3]), torch.cat([v, rows]), Packing.of([3], CPU), padded)
    assert_close(out, by_hand(q, k, v, [3], [live]))


def test_padded_packing__stays_padded_behind_rows_in_front() -> None:
    packing = PaddedPacking((3,), CPU, torch.tensor([True, True, False]))
    assert packing.behind(2).lengths == (5,)
    assert packing.behind(2).visible.tolist() == [True, True, True, True, False]
    assert Packing.of([3, 1], CPU).behind(2) == Packing.of([5, 3], CPU)


@pytest.mark.parametrize("path", ["batched or loop", "padded"])
@given(
    sizes=st.lists(st.lists(st.integers(1, 5), max_size=5), min_size=1, max_size=3), width=st.sampled_from([4, 6, 8])
)
def test_attention_by_weight__equals_attention_to_keys_that_are_there_as_often(path, sizes, width):
    lengths = [len(own) for own in sizes]
    counts = torch.tensor([count for own in sizes for count in own], dtype=torch.int64)
    q, k, v = drawn(lengths, lengths, width=width)
    with pytest.MonkeyPatch.context() as patch:
        if path == "padded":
            patch.setattr(attention, "attention_path", lambda *_: "padded")
        out = packed_attention(q, k, v, *[Packing.of(lengths, CPU)] * 2, weight=counts.float())
    often = [t.repeat_interleave(counts, 0) for t in (k, v)]
    expected = by_hand(q, *often, lengths, [sum(own) for own in sizes])
    assert_close(out, expected)
    if out.numel():
        direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
        ours, theirs = (torch.autograd.grad((o * direction).sum(), (q, k, v)) for o in (out, expected))
        for a, b in zip(ours, theirs):
            assert_close(a, b)


def test_attention_by_weight__in_bf16_is_about_as_close_as_attention_without():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(200, 2, 64, generator=generator) for _ in range(3))
    counts, packing = torch.randint(1, 60, (200,), generator=generator), Packing.of([200], CPU)
    often = [t.repeat_interleave(counts, 0) for t in (k, v)]
    exact = packed_attention(q, *often, packing, Packing.of([int(counts.sum())], CPU))
    half = [t.bfloat16() for t in (q, k, v)]
    error = packed_attention(*half, packing, packing, weight=counts.float()).float() - exact
    without = packed_attention(*half, packing, packing).float() - packed_attention(q, k, v, packing, packing)
    # The logarithm of a weight is rounded, too: 2.0 to 2.4 times the error on processors with bf16 instructions.
    assert error.square().mean().sqrt() < 3 * without.square().mean().sqrt()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-2), (torch.float16, 4e-2)])
def test_attention_by_weight__on_cuda_equals_attention_to_keys_that_are_there_as_often(dtype, tolerance):
    lengths, device = [5, 2, 17], torch.device("cuda")
    counts = torch.randint(1, 9, (24,), generator=torch.Generator().manual_seed(0))
    q, k, v = (t.detach() for t in drawn(lengths, lengths, width=64))
    often = [t.repeat_interleave(counts, 0) for t in (k, v)]
    given = (t.to(device, dtype) for t in (q, k, v))
    out = packed_attention(*given, *[Packing.of(lengths, device)] * 2, weight=counts.float().to(device))
    assert_close(out.cpu(), by_hand(q, *often, lengths, [int(own.sum()) for own in counts.split(lengths)]), tolerance)
