"""The host twin of the CUDA kernels, and with it what all kernels stand on: rows and teams."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from twin import LaunchError, compiler, installed, kernel_text
from twin import run_kernel as run_any_kernel
from twin.running import BASE, CALL

from klfast._arrays import STORAGE, decode, encode

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler (CXX, or g++)")

SEEDS = [0, 1, 2]
DTYPES = ["float16", "bfloat16", "float32"]


def run_kernel(*arguments: Any, **options: Any) -> NDArray[np.float64]:
    """Run a text in ascending order, if not told otherwise, behind what this file tests."""
    return run_any_kernel(*arguments, **{"seed": 0, "sources": BASE, **options})


def run(body: str, rows: int = 1, columns: int = 64, **options: Any) -> NDArray[np.float64]:
    """Run a kernel whose body may use `values`, its block's row of results; 64 threads."""
    text = f"""
        KERNEL(THREADS, BLOCKS) body(const Call call)
        {{
            double* values = call.values + block_index() * call.columns;
            const int t = thread_index();
            {body}
        }}
    """
    defines = {"THREADS": 64, **options.pop("defines", {})}
    values = np.full((rows, columns), np.nan)
    return run_kernel(text, defines=defines, values=values, grid=rows, **options)


# --- threads together ----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("type", ["float", "double", "int", "int64"])
def test_lanes_get_each_others_values(type: str, seed: int) -> None:
    values = run(
        f"""
        {type} x = 3 * t;
        for (int mask = 0; mask < 32; ++mask) {{
            const {type} got = shuffle_xor(x, mask);
            if (got != 3 * (t ^ mask))
                values[t] = mask;
        }}
        """,
        seed=seed,
    )
    assert np.isnan(values).all()


def test_any_is_of_one_warp() -> None:
    values = run("values[t] = warp_any(t == 5) + 2 * warp_any(t >= 0) + 4 * warp_any(t < 0);")
    assert values[0].tolist() == [3] * 32 + [2] * 32


@pytest.mark.parametrize("seed", SEEDS)
def test_a_barrier_opens_when_all_have_come(seed: int) -> None:
    values = run(
        """
        double* shared = reinterpret_cast<double*>(dynamic_shared());
        for (int i = 0; i < 20; ++i) {
            shared[t] = t * i;
            block_barrier();
            values[t] = shared[63 - t];
            block_barrier();
        }
        """,
        shared=512,
        rows=2,
        seed=seed,
    )
    assert (values == 19 * np.arange(63, -1, -1)).all()


def test_a_missing_barrier_shows_nan() -> None:
    values = run(
        """
        double* shared = reinterpret_cast<double*>(dynamic_shared());
        shared[t] = t;
        values[t] = shared[63 - t];
        """,
        shared=512,
    )
    assert np.isnan(values[0]).sum() == 32


@pytest.mark.parametrize("seed", SEEDS)
def test_blocks_of_a_cluster_read_each_others_memory(seed: int) -> None:
    values = run(
        """
        double* shared = reinterpret_cast<double*>(kernel_shared());
        shared[t] = 100 * cluster_rank() + t;
        cluster_barrier();
        values[t] = *in_block(shared + t, (cluster_rank() + 1) % CLUSTER);
        cluster_barrier();
        """,
        rows=8,
        shared=512,
        defines={"CLUSTER": 4},
        seed=seed,
    )
    assert (values == np.tile([100, 200, 300, 0], 2)[:, None] + np.arange(64)).all()


def test_blocks_run_in_the_order_that_the_seed_draws() -> None:
    body = "if (t == 0) values[0] = atomic_add(call.arrived, 1);"
    orders = [
        run(body, rows=20, columns=1, arrived=np.zeros(1, np.uint32), seed=seed)[:, 0].tolist()
        for seed in SEEDS
    ]
    assert orders[0] == list(range(20))
    assert all(sorted(order) == orders[0] for order in orders)
    assert orders[0] != orders[1] != orders[2]


# --- misuse --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("if (t != 7) block_barrier();", "thread 7 of block 0 has finished"),
        ("if (t < 32) block_barrier(); else warp_barrier();", "has finished"),
        ("if (t < 7) shuffle_xor(1.0f, 1);", "deadlock: thread 0 .* warp .* has finished"),
        ("if (t % 2) block_barrier(); else warp_barrier();", "deadlock.* block .* for its warp"),
        ("if (t % 2)\n block_barrier();\n else\n block_barrier();", "different barriers"),
        ("if (t % 2)\n warp_any(t);\n else\n warp_barrier();", "different barriers"),
        ("if (t == 3) kernel_shared()[4].word[3] = 1;", "wrote beyond its 192 bytes"),
        ("if (t == 3) dynamic_shared()[-1].word[0] = 1;", "wrote before its 192 bytes"),
        ("load_once(reinterpret_cast<const Bytes16*>(values + 1));", "misaligned load of 16"),
        ("load_one(reinterpret_cast<const double*>(dynamic_shared()));", "from shared memory"),
        ("values[t] = load_one(reinterpret_cast<const double*>(16));", "illegal address 0x10"),
        ("in_block(&t, 0);", "not in shared memory"),
        ("in_block(dynamic_shared(), 1);", "in a cluster of 1"),
    ],
)
def test_misuse_ends_the_launch(body: str, message: str) -> None:
    with pytest.raises(LaunchError, match=message):
        run(body, shared=64)
    run("block_barrier();")  # and the next one is none the worse


COPIES = """
    const Bytes16* from = reinterpret_cast<const Bytes16*>(row_address(call.p, 0));
    for (int i = 0; i < 2; ++i) {
        copy_async(dynamic_shared() + 2 * t + i, reinterpret_cast<const char*>(from + 2 * t + i));
        end_batch();
    }
    await_batches<LEFT>();
    for (int i = 0; i < 2; ++i)
        values[2 * t + i] = as_float(load_shared(dynamic_shared() + 2 * t + i).word[3]);
    await_batches<END>();
"""


def test_what_is_copied_is_there_when_it_has_been_waited_for() -> None:
    p = np.arange(64 * 2 * 4, dtype=np.float32)[None]
    how: dict[str, Any] = {"p": p, "shared": 64 * 32, "columns": 128}
    for behind in (0, 1, 2):
        values = run(COPIES, defines={"LEFT": behind, "END": 0}, **how).reshape(64, 2)
        expected = p[0, 3::4].reshape(64, 2).astype(float)
        expected[:, 2 - behind :] = np.nan
        np.testing.assert_array_equal(values, expected)
    with pytest.raises(LaunchError, match="ends with 1 copies under way"):
        run(COPIES, defines={"LEFT": 1, "END": 1}, **how)


@pytest.mark.parametrize("grid", [0, 3])
def test_clusters_are_whole(grid: int) -> None:
    with pytest.raises(LaunchError, match="multiple of the cluster's 2"):
        run("", rows=grid, defines={"CLUSTER": 2})


def test_memory_of_a_block_ends_with_it() -> None:
    with pytest.raises(LaunchError, match="block that has ended"):
        run(
            """
            if (cluster_rank() == 0)
                return;
            block_barrier();
            in_block(dynamic_shared(), 0);
            """,
            rows=2,
            shared=64,
            defines={"CLUSTER": 2},
        )


def test_a_block_has_no_more_threads_than_the_kernel_says() -> None:
    text = "KERNEL(32, 1) small(const Call call) {}\n"
    with pytest.raises(LaunchError, match="64 threads a block"):
        run_kernel(text, defines={"THREADS": 64}, grid=1)


# --- arithmetic ----------------------------------------------------------------------------------

MAP = """
KERNEL(THREADS, BLOCKS) map(const Call call)
{
    const int64 i = block_index() * THREADS + thread_index();
    if (i < call.count)
        call.values[i] = FUNCTION(reinterpret_cast<const float*>(call.p.data)[i]);
}
"""


def mapped(function: str, x: NDArray[np.float32]) -> NDArray[np.float64]:
    return run_kernel(MAP, x[:, None], defines={"FUNCTION": function}, grid=-(-x.size // 256))[:, 0]


def test_exp2_errs_as_the_device_may() -> None:
    z = np.concatenate([np.random.default_rng(0).uniform(-126, 127, 9999), [0.5]])
    z = z.astype(np.float32)
    exact = np.exp2(z.astype(np.float64))
    error = np.abs(mapped("exp2_approx", z) / exact - 1)
    assert 2**-24 < error.max() < 2**-22
    whole = np.arange(-126, 128, dtype=np.float32)
    assert (mapped("exp2_approx", whole) == np.exp2(whole.astype(np.float64))).all()
    special = np.array([-np.inf, -127, np.inf, 128, np.nan, 1e-40, -0.0], np.float32)
    expected = [0, 0, np.inf, np.inf, np.nan, 1, 1]
    np.testing.assert_array_equal(mapped("exp2_approx", special), expected)


def test_reciprocal_errs_as_the_device_may() -> None:
    z = np.random.default_rng(0).uniform(0.1, 10, 9999).astype(np.float32)
    error = np.abs(mapped("reciprocal_approx", z) * z - 1)
    assert 2**-24 < error.max() < 2**-22
    special = np.array([np.inf, 0, -0.0, 1e-40, np.nan, 1e38, 2], np.float32)
    expected = [0, np.inf, -np.inf, np.inf, np.nan, 0, 0.5]
    np.testing.assert_array_equal(mapped("reciprocal_approx", special), expected)


def test_float64_keeps_numbers_below_the_normal_range() -> None:
    x = np.array([5e-324, 1e-310])
    values = run(
        "const double* x = reinterpret_cast<const double*>(call.p.data);"
        "values[0] = x[0] * 3; values[1] = larger(x[0], x[1]) / 7;",
        columns=2,
        p=x[None],
        defines={"DTYPE_P": None},
    )
    assert (values[0] == [5e-324 * 3, 1e-310 / 7]).all()


# --- rows.cuh ------------------------------------------------------------------------------------

# Writes the index at which each entry of the row was seen, then its value.
LOAD = """
KERNEL(THREADS, BLOCKS) load(const Call call)
{
    using ROW = Row<DTYPE_P, VECTOR>;
    const char* at = row_address(call.p, 0);
    const ROW row(at, call.width, ROW::skew_of(at));
    for (int64 v = thread_index(); v * VECTOR - row.skew < call.width; v += THREADS) {
        float x[VECTOR];
        row.load<READ_ONCE>(v).unpack(x);
        for (int i = 0; i < VECTOR; ++i) {
            const int64 index = v * VECTOR - row.skew + i;
            if (index >= 0 && index < call.width)
                call.values[index] = x[i] == row.entry(index) ? x[i] : NAN64;
            else if (x[i] != -INFINITY32)
                call.values[0] = NAN64;
        }
    }
}
"""


def stored(values: NDArray[Any], dtype: str) -> NDArray[Any]:
    return encode(np.asarray(values, np.float64), dtype)


@pytest.mark.parametrize("width", [1, 5, 8, 37])
@pytest.mark.parametrize("once", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("other", DTYPES)
def test_rows_begin_and_end_anywhere(dtype: str, other: str, once: int, width: int) -> None:
    codes = {name: code for code, name in enumerate(DTYPES)}
    memory = np.full(64 + 16, 99, np.float64)
    memory[:] = 7  # what no row may show
    for skew in range(9):
        values = 1 + np.arange(width) / 8
        memory[skew : skew + width] = values
        whole = stored(memory, dtype)
        room = np.zeros(whole.nbytes + 64, np.uint8)
        start = -room.__array_interface__["data"][0] % 64
        lent = room[start : start + whole.nbytes].view(whole.dtype)
        lent[:] = whole
        row = lent[skew : skew + width][None]
        for aligned in (0, 1):
            defines = {
                "DTYPE_Q": codes[other],
                "READ_ONCE": once,
                "ALIGNED": aligned,
                "THREADS": 32,
            }
            got = run_kernel(LOAD, row, defines=defines, values=np.full((1, width), np.nan))
            np.testing.assert_array_equal(got[0], values)
        memory[:] = 7


SPECIAL = [
    *(0.0, -0.0, math.inf, -math.inf, math.nan, 1.0, -1.0, 5e-324, -5e-324, 1e-310, 1e300, -1e300),
    *(65504.0, 65519.99, 65520.0, 65536.0, 2.0**-14, 2.0**-24, 2.0**-25, 2.0**-25 * 1.0001),
    *(
        2.0**-126,
        2.0**-149,
        2.0**-150,
        2.0**-150 * (1 + 2**-52),
        2.0**-133,
        2.0**-134,
        1e-40,
        3e-39,
    ),
    *(3.3895313892515355e38, 3.4e38, 3.4028234663852886e38, 3.4028235677973366e38, 1.00390625),
    *(
        1 + 2.0**-8,
        1 + 2.0**-9,
        1 + 3 * 2.0**-9,
        1 + 2.0**-9 + 2.0**-40,
        1 + 2.0**-11,
        1 + 2.0**-24,
    ),
    *(1 + 2.0**-24 + 2.0**-52, 1 + 3 * 2.0**-24, 1 + 2.0**-11 + 2.0**-40, 1 + 3 * 2.0**-11),
]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_results_are_rounded_once(dtype: str) -> None:
    rng = np.random.default_rng(0)
    size = np.exp2(rng.uniform(-160, 130, 5000))
    # Halfway between neighbours of each type, above and below its normal range.
    ties = np.concatenate(
        [
            (np.round(size / unit) + 0.5) * unit
            for unit in (2.0 ** (np.floor(np.log2(size)) - bits) for bits in (7, 10, 23))
        ]
    )
    half = np.exp2(rng.uniform(-27, 17, 5000))
    low = (np.arange(-300, 300) + 0.5)[:, None] * [2.0**-24, 2.0**-133, 2.0**-149]
    x = np.concatenate([SPECIAL, size, -size, ties, half, low.ravel(), low.ravel() * (1 + 1e-15)])
    out = np.zeros(x.size, STORAGE[dtype])
    text = """
        KERNEL(THREADS, BLOCKS) store(const Call call)
        {
            const int64 i = block_index() * THREADS + thread_index();
            if (i < call.count)
                store_as(call.out + i * call.out_stride, call.out_dtype,
                         entry64(row_address(call.p, i), FLOAT64));
        }
    """
    code = [*DTYPES, "float64"].index(dtype)
    grid = -(-x.size // 256)
    run_kernel(
        text,
        x[:, None],
        defines={"DTYPE_P": None},
        grid=grid,
        out=out,
        out_stride=out.itemsize,
        out_dtype=code,
    )
    expected = encode(x, dtype)
    if dtype == "bfloat16":  # which `encode` rounds twice where few bits are left
        tiny = np.abs(x) < 2.0**-126
        bits = np.abs(np.rint(x[tiny] * 2.0**133)).astype(np.uint16)
        expected[tiny] = bits | np.signbit(x[tiny]).astype(np.uint16) << 15
    np.testing.assert_array_equal(decode(out, dtype), decode(expected, dtype))
    numbers = ~np.isnan(x)
    assert out[numbers].tobytes() == expected[numbers].tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
def test_entries_are_exact_in_float64(dtype: str) -> None:
    if dtype == "float32":
        bits: NDArray[Any] = np.random.default_rng(0).integers(0, 2**32, 65536, np.uint32)
        bits[:1000] &= 0x807FFFFF  # below the normal range
        x: NDArray[Any] = bits.view(np.float32)
    else:
        x = np.arange(65536, dtype=np.uint16).view(STORAGE[dtype])
    text = """
        KERNEL(THREADS, BLOCKS) widen(const Call call)
        {
            const int64 i = block_index() * THREADS + thread_index();
            call.values[i] = entry64(row_address(call.p, i), call.p.dtype);
        }
    """
    got = run_kernel(text, x[:, None], defines={"DTYPE_P": None}, grid=256)[:, 0]
    with np.errstate(invalid="ignore"):  # signalling NaN
        np.testing.assert_array_equal(got, decode(x, dtype))


# --- team.cuh ------------------------------------------------------------------------------------

TEAM = """
KERNEL(THREADS, BLOCKS) team(const Call call)
{
    const int64 row = block_index() * TEAMS + team_in_block();
    const double* x = reinterpret_cast<const double*>(row_address(call.p, row));
    const int t = team_rank();
    double* values = call.values + (row * TEAM + t) * 8;
    float pair[2] = {static_cast<float>(x[t]), 1.0f};
    Top top = {static_cast<float>(x[t]), t};
    if (x[t] < 0)
        top = {-INFINITY32, -1};
    for (int i = 0; i < 3; ++i) {  // as often as one likes
        values[0] = team_add(x[t]);
        values[3] = team_larger(x[t]);
        team_top(top);
    }
    team_add(pair);
    values[1] = pair[0];
    values[2] = pair[1];
    values[4] = team_any(x[t] == 3);
    top = team_top(top);
    values[5] = top.value;
    values[6] = static_cast<double>(top.index);
    team_barrier();
}
"""


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("threads", "team"), [(32, 32), (64, 32), (256, 32), (64, 64), (256, 256)])
def test_a_team_knows_its_sums_and_largest(threads: int, team: int, seed: int) -> None:
    rng = np.random.default_rng(3)
    rows = 2 * threads // team
    x = rng.integers(0, 50, (rows, team)).astype(float)
    x[0] = -1
    x[1] = 7.0  # the first of equals
    values = run_kernel(
        TEAM,
        x,
        defines={"THREADS": threads, "TEAM": team, "DTYPE_P": None},
        values=np.full((rows, team * 8), np.nan),
        seed=seed,
    ).reshape(rows, team, 8)
    assert (values[..., :7] == values[:, :1, :7]).all()
    index = x.argmax(1)
    index[0] = -1
    top = np.where(index < 0, -np.inf, x.max(1))
    expected = [x.sum(1), x.sum(1), np.full(rows, team), x.max(1), (x == 3).any(1), top, index]
    np.testing.assert_array_equal(values[:, 0, :7], np.array(expected).T)


def test_sums_have_the_same_bits_in_every_order() -> None:
    x = np.random.default_rng(4).normal(size=(2, 256))
    values = np.full((2, 2048), np.nan)
    first, second = (
        run_kernel(TEAM, x, defines={"DTYPE_P": None}, values=values.copy(), seed=seed)
        for seed in (0, 9)
    )
    assert first.tobytes() == second.tobytes()


# --- the package in CuPy's place -----------------------------------------------------------------

COPY = """
KERNEL(THREADS, BLOCKS) copy(const Call call)
{
    for (int64 i = thread_index(); i < call.width; i += THREADS)
        call.values[i] = 2 * reinterpret_cast<const float*>(call.p.data)[i];
}
"""


def copy_kernel(cupy: Any) -> Any:
    text = kernel_text([*BASE, COPY], {"THREADS": 64, "BLOCKS": 1})
    return cupy.RawModule(code=text, options=("-std=c++17",)).get_function("copy")


def copy_call(p: Any, values: Any) -> Any:
    call = np.zeros((), CALL)
    call["p"]["data"], call["values"] = p.data.ptr, values.data.ptr
    call["width"] = p.size
    return call


def test_memory_is_the_devices_own() -> None:
    with installed() as cupy:
        p = cupy.asarray(np.arange(100, dtype=np.float32))
        values = cupy.empty(100)
        assert np.isnan(values.get()).all()
        assert type(p).__module__ == "cupy"
        assert p.__dlpack_device__() == (2, 0)
        with pytest.raises(TypeError, match="Implicit"):
            np.asarray(p)
        copy_kernel(cupy)((1,), (64,), (copy_call(p, values),), shared_mem=16)
        assert (values.get() == 2 * np.arange(100)).all()
        assert cupy.launches[0][:4] == ("copy", 1, 64, 16)
        call = copy_call(p, values)
        host = np.zeros(100)
        call["values"] = host.__array_interface__["data"][0]
        with pytest.raises(cupy.cuda.runtime.CUDARuntimeError, match=r"values = \w+ is no device"):
            copy_kernel(cupy)((1,), (64,), (call,))
        with pytest.raises(cupy.cuda.runtime.CUDARuntimeError, match="shared memory"):
            copy_kernel(cupy)((1,), (64,), (copy_call(p, values),), shared_mem=50_000)


def test_what_lies_beyond_an_allocation_is_guarded() -> None:
    with installed() as cupy:
        p, values = cupy.asarray(np.zeros(101, np.float32)), cupy.empty(100)
        copy_kernel(cupy)((1,), (64,), (copy_call(p, values),))
        del p, values
        faults = cupy.cuda.memory.faults
        assert faults == ["a kernel wrote beyond an allocation of 800 bytes"]
        faults.clear()  # or the end of the block would raise

        p, values = cupy.asarray(np.zeros(10_000, np.float32)), cupy.empty(100)
        with pytest.raises(cupy.cuda.runtime.CUDARuntimeError, match="illegal address"):
            copy_kernel(cupy)((1,), (64,), (copy_call(p, values),))
        del p, values
        faults.clear()


def test_memory_runs_out_when_told() -> None:
    with installed() as cupy:
        cupy.cuda.memory.limit = 1000
        kept = cupy.cuda.alloc(900)
        with pytest.raises(cupy.cuda.memory.OutOfMemoryError):
            cupy.cuda.alloc(101)
        del kept
        cupy.cuda.alloc(1000)


def test_a_text_that_does_not_compile() -> None:
    with installed() as cupy:
        text = kernel_text([*BASE, "KERNEL(32, 1) wrong(const Call call) { nonsense(); }\n"], {})
        with pytest.raises(cupy.cuda.compiler.CompileException, match="nonsense"):
            cupy.RawModule(code=text).get_function("wrong")
    with installed(capability="80") as cupy:
        text = kernel_text([*BASE, COPY], {"THREADS": 64, "BLOCKS": 1, "CLUSTER": 2})
        with pytest.raises(cupy.cuda.compiler.CompileException, match="sm_90"):
            cupy.RawModule(code=text).get_function("copy")


def test_streams_may_be_late() -> None:
    with installed() as cupy:
        cupy.cuda.stream.deferred = True
        runtime = cupy.cuda.runtime
        p, values = cupy.empty(100, np.float32), cupy.empty(100)
        pinned = cupy.cuda.alloc_pinned_memory(400)
        host = np.frombuffer(pinned, np.float32, 100)
        host[:] = 3
        copying, computing = (cupy.cuda.Stream(non_blocking=True) for _ in range(2))
        runtime.memcpyAsync(p.data.ptr, pinned.ptr, 400, 1, copying.ptr)
        copied = copying.record()
        computing.wait_event(copied)
        with computing:
            copy_kernel(cupy)((1,), (64,), (copy_call(p, values),))
        host[:] = 4  # too early
        runtime.memcpyAsync(pinned.ptr, p.data.ptr, 400, 2, copying.ptr)
        assert not copied.done
        host[:] = 5
        computing.synchronize()
        assert copied.done
        with computing:
            assert (values.get() == 10).all()
        del p  # the copy back is still to come
        copying.synchronize()
        assert (host == 5).all()
