"""The simulator itself: each primitive against torch, and each kind of error."""

import pytest
import torch

from regnet_fast.backends.cuda.plans import Launch
from simulator.machine import ORDERS, SimulationError, run

CPP = {torch.bfloat16: "BFloat16", torch.float16: "Float16"}
DTYPES = tuple(CPP)


def simulate(body, inputs, outputs, *, threads=32, shared=0, blocks=1, order="ascending", dtype=torch.float32):
    """A kernel of this body, with a pointer for each tensor."""
    kinds = {torch.float32: "float", torch.int32: "int", torch.int16: "short", **CPP}
    given = [f"const {kinds[t.dtype]}* {name}" for name, t in inputs.items()]
    given += [f"{kinds[t.dtype]}* {name}" for name, t in outputs.items()]
    text = f"#include <primitives.cuh>\nusing T = {CPP.get(dtype, 'float')};\n"
    text += f"KERNEL({threads}, 1) probe({', '.join(given)}) {{\n{body}\n}}\n"
    launch = Launch("", "probe", (blocks, 1, 1), threads, shared, (*inputs, *outputs))
    run(launch, inputs, outputs, order, text)


def fails(words, body, **more):
    inputs, outputs = {"x": torch.randn(1024)}, {"y": torch.zeros(1024)}
    with pytest.raises(SimulationError, match=words):
        simulate(body, inputs, outputs, **{"shared": 4096, "threads": 64, **more})


def bits(t):
    return t.contiguous().view(torch.int16).int() & 0xFFFF


LOAD = """
    for (int i = thread_x(); i < %d; i += 32)
        store_shared(16 * i, load_global(reinterpret_cast<const Eight*>(x) + i));
    sync_warp();
    unsigned r[%d];
    %s<%d>(r, 16 * (thread_x() %% %d));
    for (int m = 0; m < %d; ++m) store_global(y + m * 32 + thread_x(), static_cast<int>(r[m]));
"""


@pytest.mark.parametrize("count", [1, 2, 4])
def test_load_matrices(count):
    x = torch.randint(-(2**15), 2**15, (count, 8, 8), dtype=torch.int16)
    for name, matrices in (("load_matrices", x), ("load_matrices_transposed", x.transpose(1, 2).contiguous())):
        y, rows = torch.zeros(count, 32, dtype=torch.int32), 8 * count
        body = LOAD % (rows, count, name, count, rows, count)
        simulate(body, {"x": x}, {"y": y}, shared=16 * rows)
        pairs = matrices.reshape(count, 32, 2).int() & 0xFFFF
        assert torch.equal(y, (pairs[..., 0] | pairs[..., 1] << 16))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("depth", [8, 16])
def test_mma(dtype, depth):
    """Operands as load_matrices brings them: a by rows, b by columns, and b by rows transposed."""
    a, b, c = torch.randn(16, depth).to(dtype), torch.randn(depth, 8).to(dtype), torch.randn(16, 8)
    halves = depth // 8
    rows = a.reshape(2, 8, halves, 8).permute(2, 0, 1, 3).contiguous()  # 8x8 matrices: down, then across
    for columns, load in (
        (b.t().reshape(8, halves, 8).permute(1, 0, 2).contiguous(), "load_matrices"),
        (b.reshape(halves, 8, 8).contiguous(), "load_matrices_transposed"),
    ):
        y = torch.full((16, 8), torch.nan)
        body = f"""
            for (int i = thread_x(); i < {2 * depth}; i += 32)
                store_shared(16 * i, load_global(reinterpret_cast<const Eight*>(a) + i));
            for (int i = thread_x(); i < {depth}; i += 32)
                store_shared(512 + 16 * i, load_global(reinterpret_cast<const Eight*>(b) + i));
            sync_warp();
            unsigned p[{2 * halves}], q[{halves}];
            load_matrices<{2 * halves}>(p, 16 * (thread_x() % {16 * halves}));
            {load}<{halves}>(q, 512 + 16 * (thread_x() % {8 * halves}));
            int row = thread_x() / 4, column = 2 * (thread_x() % 4);
            float sums[4];
            for (int i = 0; i < 4; ++i) sums[i] = load_global(c + (row + 8 * (i / 2)) * 8 + column + i % 2);
            mma_k{depth}<T>(sums, p, q);
            for (int i = 0; i < 4; ++i) store_global(y + (row + 8 * (i / 2)) * 8 + column + i % 2, sums[i]);
        """
        simulate(body, {"a": rows, "b": columns, "c": c}, {"y": y}, shared=1024, dtype=dtype)
        torch.testing.assert_close(y, (a.double() @ b.double() + c.double()).float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_conversions(dtype):
    """Every 16-bit value widened and back, and floats of every size rounded as torch rounds them."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    wide, back = torch.zeros(2**16), torch.zeros(2**16, dtype=torch.int16).view(dtype)
    body = """
        for (int i = thread_x(); i < 1 << 15; i += 32) {
            Floats2 two = widen<T>(load_global(reinterpret_cast<const unsigned*>(x) + i));
            store_global(reinterpret_cast<Floats2*>(y) + i, two);
            store_global(reinterpret_cast<unsigned*>(z) + i, narrow<T>(two.x, two.y));
        }
    """
    simulate(body, {"x": every}, {"y": wide, "z": back}, dtype=dtype)
    torch.testing.assert_close(wide, every.float(), rtol=0, atol=0, equal_nan=True)
    numbers = ~every.isnan()
    assert torch.equal(bits(back)[numbers], bits(every)[numbers]) and back[~numbers].isnan().all()
    x = torch.randn(4096) * torch.exp2(torch.randint(-30, 18, (4096,)).float())
    x[:6] = torch.tensor([65519.0, 65520.0, torch.inf, -torch.inf, 2**-25, 1 + 2**-11])
    y = torch.zeros(4096, dtype=dtype)
    body = """
        for (int i = thread_x(); i < 2048; i += 32) {
            Floats2 two = load_global(reinterpret_cast<const Floats2*>(x) + i);
            store_global(reinterpret_cast<unsigned*>(y) + i, narrow<T>(two.x, two.y));
        }
    """
    simulate(body, {"x": x}, {"y": y}, dtype=dtype)
    assert torch.equal(bits(y), bits(x.to(dtype)))
    x[6:8] = torch.tensor([torch.nan, -torch.nan])
    simulate(body.replace("narrow<", "narrow_relu<"), {"x": x}, {"y": y}, dtype=dtype)
    torch.testing.assert_close(y, x.to(dtype).relu(), rtol=0, atol=0, equal_nan=True)


def test_bits_are_counted():
    y = torch.zeros(32, dtype=torch.int32)
    simulate("store_global(y + thread_x(), count_bits(0x80000005u << thread_x()));", {}, {"y": y})
    assert y.tolist() == [f"{0x80000005 << i & 0xFFFFFFFF:b}".count("1") for i in range(32)]


def test_shuffles_and_the_sigmoid():
    x, y, z = torch.randn(64), torch.zeros(64), torch.zeros(64)
    body = """
        float value = load_global(x + thread_x());
        store_global(y + thread_x(), shuffle_xor(value, 5));
        for (int mask = 16; mask; mask /= 2) value += shuffle_xor(value, mask);
        store_global(z + thread_x(), sigmoid(value));
    """
    simulate(body, {"x": x}, {"y": y, "z": z}, threads=64)
    assert torch.equal(y, x[torch.arange(64) ^ 5])
    torch.testing.assert_close(z, x.view(2, 32).sum(1, keepdim=True).expand(2, 32).reshape(64).sigmoid())


@pytest.mark.parametrize("order", [*ORDERS, 7])
def test_copies_and_barriers(order):
    """Each thread copies what another warp reads, and zeros; wide loads and stores of shared memory."""
    x, y = torch.randn(256), torch.zeros(256)
    body = """
        copy_async(16 * thread_x(), x + 4 * thread_x(), thread_x() % 3 != 0);
        commit_copies();
        wait_copies<0>();
        sync_block();
        Floats4 four = load_shared<Floats4>(16 * (63 - thread_x()));
        sync_block();
        store_shared(16 * thread_x(), Floats2{four.x, four.y});
        store_shared(16 * thread_x() + 8, four.z);
        store_shared(16 * thread_x() + 12, four.w);
        store_global(reinterpret_cast<Floats4*>(y) + thread_x(), load_shared<Floats4>(16 * thread_x()));
    """
    simulate(body, {"x": x}, {"y": y}, threads=64, shared=1024, order=order)
    expected = torch.where(torch.arange(64)[:, None] % 3 != 0, x.view(64, 4), 0.0).flip(0).reshape(256)
    assert torch.equal(y, expected)


def test_copies_arrive_in_the_order_of_their_groups():
    x, y = torch.randn(12), torch.zeros(4)
    body = """
        if (thread_x() == 0)
            for (int i = 0; i < 3; ++i) {
                copy_async(16 * i, x + 4 * i, true);
                commit_copies();
            }
        if (thread_x() == 0) {
            wait_copies<1>();
            store_global(reinterpret_cast<Floats4*>(y), load_shared<Floats4>(16));
            wait_copies<0>();
        }
    """
    simulate(body, {"x": x}, {"y": y}, shared=48)
    assert torch.equal(y, x[4:8])


WRITE = "store_shared(4 * thread_x(), 1.0f);\n"
ONCE = WRITE + "sync_block();\n"  # so that a race is not a read of what was never written
COPY = "copy_async(16 * thread_x(), x + 4 * thread_x(), true); commit_copies();\n"


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("words", "body"),
    [
        ("without a barrier", ONCE + WRITE + "load_shared<float>(4 * (63 - thread_x()));"),
        ("without a barrier", ONCE + WRITE + "load_shared<float>(4 * (thread_x() ^ 1));"),
        ("without a barrier", ONCE + WRITE + "hold_loads(); load_shared<float>(4 * (thread_x() ^ 1));"),
        ("without a barrier", ONCE + WRITE + "sync_warp(); load_shared<float>(4 * (thread_x() ^ 32));"),
        ("without a barrier", ONCE + "load_shared<float>(4 * (thread_x() ^ 32));" + WRITE),
        ("without a barrier", WRITE + "sync_warp(); load_shared<float>(4 * (thread_x() ^ 1));" + WRITE),
        ("without a barrier", "store_shared(0, 1.0f);"),
        ("has not arrived", COPY + "load_shared<float>(16 * thread_x()); wait_copies<0>();"),
        ("has not arrived", COPY + "wait_copies<1>(); load_shared<float>(16 * thread_x()); wait_copies<0>();"),
        (
            "has not arrived|without a barrier",
            COPY + "sync_block(); load_shared<float>(16 * (thread_x() ^ 32)); wait_copies<0>();",
        ),
        ("has not arrived", COPY + "store_shared(16 * thread_x(), 1.0f); wait_copies<0>();"),
        ("on their way", COPY),
        (
            "wrote, without a barrier|has not arrived|never written",
            COPY + "wait_copies<0>(); load_shared<float>(16 * (thread_x() ^ 32));",
        ),
        ("never written", "load_shared<float>(4 * thread_x());"),
        ("there are 4096 bytes", "store_shared(4096, 1.0f);"),
        ("misaligned", "store_shared(4 * thread_x(), Floats2{});"),
        ("misaligned", "load_global(reinterpret_cast<const Eight*>(x + 1));"),
        ("misaligned", "copy_async(16 * thread_x(), x + 4 * thread_x() + 2, true); wait_copies<0>();"),
        ("offset 4096 of x, which has 4096", "load_global(x + 1024);"),
        ("offset -4 of x", "load_global(x - 1);"),
        ("offset 4096 of y", "store_global(y + 1024, 0.0f);"),
        ("asynchronous copy of 16 bytes at offset 4092 of x|misaligned", "copy_async(0, x + 1023, true);"),
        ("writes to x", "store_global(const_cast<float*>(x), 0.0f);"),
        ("as another thread of the launch did", "store_global(y + thread_x() / 2, 0.0f);"),
        (
            "another thread of the launch wrote",
            "store_global(y + thread_x(), 0.0f); sync_block(); load_global(y + (thread_x() ^ 1));",
        ),
        ("lane 0 is at the end, lane 1 at sync_warp", "if (thread_x() % 32) sync_warp();"),
        ("some warps ended", "if (thread_x() < 32) sync_block();"),
        ("at the block's barrier", "if (thread_x() & 1) sync_block(); else sync_warp();"),
        ("sync_warp", "if (thread_x() & 1) shuffle_xor(1.0f, 1); else sync_warp();"),
        ("shuffles with the mask", "shuffle_xor(1.0f, 1 + thread_x() % 2);"),
    ],
)  # fmt: skip
def test_errors(words, body, order):
    fails(words, body, order=order)


def test_other_blocks_are_other_threads():
    fails("as another thread of the launch did", "store_global(y + thread_x(), 0.0f);", blocks=2)


def test_an_error_says_where():
    body = "load_global(x + (block_x() == 2 && thread_x() == 33) * 4096);"
    fails(r"probe, block \(2, 0, 0\), thread 33: read of", body, blocks=4)


def test_arguments_are_the_kernels():
    text = "#include <primitives.cuh>\nKERNEL(32, 1) probe(float* y, int n) { store_global(y + n, 0.0f); }"
    with pytest.raises(AssertionError, match="not the kernel's"):
        run(Launch("", "probe", (1, 1, 1), 32, 0, ("y",)), {}, {"y": torch.zeros(4)}, text=text)
