"""The PTX interpreter, by instructions, against what the PTX ISA says of them; and what it must not let pass."""

import ml_dtypes
import numpy as np
import pytest

from ptx_interpreter import run_kernel
from ptx_parser import PtxError

KERNEL = """
.version 8.0
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 shared_memory[];
.visible .entry test({parameters})
.reqntid {threads}, 1, 1
{{
    .reg .pred %p<8>;
    .reg .b16 %h<8>;
    .reg .b32 %r<40>;
    .reg .b64 %d<20>;
    mov.u32 %r0, %tid.x;
    mov.b64 %d0, shared_memory;
    {body}
    ret;
}}
"""
ALL = np.arange(32, dtype=np.uint32)


def run(body, inputs=(), outputs=(), threads=32, grid=(1, 1, 1)):
    """Pointers to inputs, then to outputs, are in %d1 and on, and %r0 is the thread."""
    count = len(inputs) + len(outputs)
    loads = "".join(f"ld.param.b64 %d{i + 1}, [test_param_{i}];\n" for i in range(count))
    parameters = ", ".join(f".param .u64 .ptr .align 32 test_param_{i}" for i in range(count))
    ptx = KERNEL.format(parameters=parameters, threads=threads, body=loads + body)
    return run_kernel(
        ptx, grid, threads, 1024, inputs, [(shape, np.dtype(dtype)) for shape, dtype in outputs]
    )


def compute(body, *inputs, to=np.uint32):
    """What `body` leaves in %r9 (%d19 if `to` has 64 bits) from elements of inputs in %r1 and on (%d11 and on)."""
    threads = 32 * -(-len(inputs[0]) // 32)
    inputs = [np.resize(np.asarray(x), threads) for x in inputs]
    loads = "".join(
        f"mad.wide.u32 %d10, %r0, {x.itemsize}, %d{i + 1};\n"
        f"ld.global.b{8 * x.itemsize} %{'d1' if x.itemsize == 8 else 'r'}{i + 1}, [%d10];\n"
        for i, x in enumerate(inputs)
    )
    size, result = np.dtype(to).itemsize, "%d19" if np.dtype(to).itemsize == 8 else "%r9"
    store = f"mad.wide.u32 %d10, %r0, {size}, %d{len(inputs) + 1};\nst.global.b{8 * size} [%d10], {result};"
    (out,) = run(f"{loads}{body}\n{store}", inputs, [((threads,), to)], threads).outputs
    return out


RANDOM = np.random.default_rng(0).integers(0, 2**32, (4, 64), dtype=np.uint32)
A, B, C, COUNTS = RANDOM[0], RANDOM[1], RANDOM[2], RANDOM[3] % 70
COUNTS[:8] = 3, 3, 3, 3, 0, 31, 32, 33


def signed(x):
    return x.astype(np.int32).astype(np.int64)


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("sub.s32 %r9, %r1, %r2;", lambda a, b, c, n: a - b),
        ("neg.s32 %r9, %r1;", lambda a, b, c, n: -a),
        ("mul.lo.s32 %r9, %r1, %r2;", lambda a, b, c, n: a * b),
        ("mul.hi.u32 %r9, %r1, %r2;", lambda a, b, c, n: a * b >> 32),
        ("mad.lo.s32 %r9, %r1, %r2, %r3;", lambda a, b, c, n: a * b + c),
        ("not.b32 %r9, %r1;", lambda a, b, c, n: ~a),
        ("min.u32 %r9, %r1, %r2;", lambda a, b, c, n: min(a, b)),
        ("max.s32 %r9, %r1, %r2;", lambda a, b, c, n: max(a, b, key=lambda x: x - (x >> 31 << 32))),
        ("shl.b32 %r9, %r1, %r4;", lambda a, b, c, n: a << n),
        ("shr.u32 %r9, %r1, %r4;", lambda a, b, c, n: a >> n),
        ("shr.s32 %r9, %r1, %r4;", lambda a, b, c, n: (a - (a >> 31 << 32)) >> n),
        ("shf.l.wrap.b32 %r9, %r1, %r2, %r4;", lambda a, b, c, n: (b << 32 | a) << (n & 31) >> 32),
        ("shf.r.clamp.b32 %r9, %r1, %r2, %r4;", lambda a, b, c, n: (b << 32 | a) >> min(n, 32)),
        ("lop3.b32 %r9, %r1, %r2, %r3, 0x6A;", lambda a, b, c, n: (a & b) ^ c),
        ("lop3.b32 %r9, %r1, %r2, %r3, 0xE2;", lambda a, b, c, n: (a & b) | (c & ~b)),
        (
            "setp.ne.b32 %p1, %r4, 3; setp.hi.and.u32 %p2, %r1, %r2, %p1; selp.b32 %r9, %r1, %r2, %p2;",
            lambda a, b, c, n: a if a > b and n != 3 else b,
        ),
        (
            "setp.lt.s32 %p1, %r1, 0; setp.eq.xor.b32 %p2, %r4, 3, %p1; selp.b32 %r9, 1, 0, %p2;",
            lambda a, b, c, n: (a >> 31) ^ (n == 3),
        ),
        ("bfe.u32 %r9, %r1, %r4, 7;", lambda a, b, c, n: a >> n & 127),
        (
            "bfe.s32 %r9, %r1, %r4, 7;",
            lambda a, b, c, n: (
                ((a - (a >> 31 << 32)) >> n & 127) - ((a - (a >> 31 << 32)) >> n + 6 & 1) * 128
            ),
        ),
        (
            "prmt.b32 %r9, %r1, %r2, 0x7531;",
            lambda a, b, c, n: sum(((b << 32 | a) >> 8 * (2 * i + 1) & 255) << 8 * i for i in range(4)),
        ),
        # The sign of byte 4 of both, bytes 0 and 5 and the sign of byte 3.
        (
            "prmt.b32 %r9, %r1, %r2, 0xB50C;",
            lambda a, b, c, n: (
                (b >> 7 & 1) * 255 | (a & 255) << 8 | (b >> 8 & 255) << 16 | (a >> 31) * 255 << 24
            ),
        ),
        (
            "{.reg .b32 %r1; shl.b32 %r1, %r2, 1; mov.b32 %r9, %r1;} xor.b32 %r9, %r9, %r1;",
            lambda a, b, c, n: 2 * b ^ a,
        ),
    ],
)
def test_integers(instruction, expected):
    out = compute(instruction, A, B, C, COUNTS)
    wanted = [expected(*map(int, x)) % 2**32 for x in zip(A, B, C, COUNTS, strict=True)]
    np.testing.assert_array_equal(out, np.array(wanted, np.uint32))


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("mul.wide.s32 %d19, %r1, %r2;", signed(A) * signed(B)),
        ("mul.wide.u32 %d19, %r1, %r2;", A.astype(np.uint64) * B),
        ("mad.wide.s32 %d19, %r1, %r2, -1;", signed(A) * signed(B) - 1),
        ("cvt.s64.s32 %d19, %r1;", signed(A)),
        ("cvt.s64.s16 %d19, %r1;", A.astype(np.int16).astype(np.int64)),
        ("cvt.u64.u32 %d19, %r1;", A),
        ("mov.b64 %d19, {%r1, %r2};", A + (B.astype(np.uint64) << np.uint64(32))),
    ],
)
def test_wide_integers(instruction, expected):
    np.testing.assert_array_equal(compute(instruction, A, B, to=np.uint64), expected.astype(np.uint64))


def floats(*values, dtype=np.float32):
    return np.array(values, np.float64).astype(dtype)


HALF = 2.0**-24  # of a unit in the last place of 1 in float32


@pytest.mark.parametrize(
    ("instruction", "inputs", "expected"),
    [
        ("fma.rn.f32 %r9, %r1, %r2, %r3;", (1 + 2.0**-12, 1 - 2.0**-12, -1), -HALF),
        # float64 would round this sum to half-way between two numbers.
        ("fma.rn.f32 %r9, %r1, %r2, %r3;", (HALF * (1 + 2 * HALF), 1 - 2 * HALF, 1 + 2 * HALF), 1 + 2 * HALF),
        ("add.rn.f32 %r9, %r1, %r2;", (1, HALF), 1),
        ("add.rn.f32 %r9, %r1, %r2;", (1 + 2 * HALF, HALF), 1 + 4 * HALF),
        ("max.f32 %r9, %r1, %r2;", (np.nan, -3), -3),
        ("max.NaN.f32 %r9, %r1, %r2;", (np.nan, -3), np.nan),
        ("min.f32 %r9, %r1, %r2;", (5, -np.inf), -np.inf),
        ("ex2.approx.f32 %r9, %r1;", (-127,), 2.0**-127),
        ("ex2.approx.ftz.f32 %r9, %r1;", (-127,), 0),
        ("ex2.approx.ftz.f32 %r9, %r1;", (-1e30,), 0),
        ("ex2.approx.ftz.f32 %r9, %r1;", (0.5,), 2**0.5),
        ("mul.rn.ftz.f32 %r9, %r1, %r2;", (2.0**-127, 2.0**100), 0),
        ("mul.rn.f32 %r9, %r1, 0fC0400000;", (1.5,), -4.5),
        ("div.full.f32 %r9, %r1, %r2;", (1, 3), 1 / 3),
        ("rcp.approx.f32 %r9, %r1;", (3,), 1 / 3),
        ("neg.f32 %r9, %r1;", (1,), -1),
        ("abs.f32 %r9, %r1;", (-np.inf,), np.inf),
        ("cvt.rn.f32.s32 %r9, -16777217;", (0,), -16777216),
        ("cvt.f32.f16 %r9, %r1;", (np.array([0, 1.5], np.float16).view(np.float32)[0],), 0),
        ("setp.lt.f32 %p1, %r1, %r2; selp.f32 %r9, %r1, %r2, %p1;", (np.nan, 2), 2),
        ("setp.ltu.f32 %p1, %r1, %r2; selp.f32 %r9, %r2, %r1, %p1;", (np.nan, 2), 2),
        ("setp.ne.f32 %p1, %r1, %r2; selp.f32 %r9, %r1, %r2, %p1;", (np.nan, 2), 2),
        ("setp.neu.f32 %p1, %r1, %r2; selp.f32 %r9, %r2, %r1, %p1;", (np.nan, 2), 2),
    ],
)
def test_float32(instruction, inputs, expected):
    out = compute(instruction, *(floats(x) for x in inputs), to=np.float32)
    np.testing.assert_array_equal(out, np.full_like(out, expected))


BF16, F16 = ml_dtypes.bfloat16, np.float16


def nearest(exact, dtype):
    """By looking at all numbers of the type: the nearest, of two the one with an even last bit."""
    numbers = np.arange(2**16, dtype=np.uint16)
    infinity = np.array(np.inf, dtype).view(np.uint16)
    numbers = numbers[((numbers & 0x7FFF) < infinity) & (numbers != 0x8000)]
    values = numbers.view(dtype).astype(np.float64)
    found = []
    for x in exact:
        distance = np.abs(values - x)
        ties = numbers[distance == distance.min()]
        found.append(ties[np.argmin(ties & 1)])
    return np.array(found, np.uint16).view(dtype)


@pytest.mark.parametrize(("dtype", "name"), [(BF16, "bf16"), (F16, "f16")])
def test_pairs_of_16_bits(dtype, name):
    generator = np.random.default_rng(0)
    a, b, c = generator.standard_normal((3, 64)).astype(dtype)
    # Ties, and what rounding twice would make ties.
    last = float(ml_dtypes.finfo(dtype).eps)
    a[:4] = 1, 1, 1 + last, 1 + last
    b[:4] = last / 2, last / 2, last / 2 * (1 - last / 2), -last / 2 * (1 - last / 2)
    c[:4] = 1, 1 + last, 1 + last, 1 + last
    pairs = [x.view(np.uint32) for x in (a, b, c)]
    wide = [x.astype(np.float64) for x in (a, b, c)]
    for instruction, exact in (
        (f"fma.rn.{name}x2 %r9, %r1, %r2, %r3;", wide[0] * wide[1] + wide[2]),
        (f"mul.rn.{name}x2 %r9, %r1, %r2;", wide[0] * wide[1]),
    ):
        np.testing.assert_array_equal(compute(instruction, *pairs).view(dtype), nearest(exact, dtype))


@pytest.mark.parametrize(("dtype", "name"), [(BF16, "bf16"), (F16, "f16")])
def test_rounding_to_16_bits(dtype, name):
    last = float(ml_dtypes.finfo(dtype).eps)
    special = [1 + last / 2, 1 + 3 * last / 2, 1 + last / 2 + 2 * HALF, -1 - last / 2]
    x = np.concatenate([np.random.default_rng(0).standard_normal(60), special]).astype(np.float32)
    high, low = x[:32], x[32:]
    packed = compute(f"cvt.rn.{name}x2.f32 %r9, %r1, %r2;", high, low).view(dtype).reshape(-1, 2)
    np.testing.assert_array_equal(packed[:, 0], nearest(low, dtype))
    np.testing.assert_array_equal(packed[:, 1], nearest(high, dtype))
    back = compute(f"cvt.rn.{name}.f32 %h1, %r1; cvt.f32.{name} %r9, %h1;", low, to=np.float32)
    np.testing.assert_array_equal(back, nearest(low, dtype).astype(np.float32))
    apart = compute(
        f"cvt.rn.{name}x2.f32 %r1, %r1, %r2; mov.b32 {{%h1, %h2}}, %r1; mov.b32 %r9, {{%h2, %h1}};", low, high
    )
    np.testing.assert_array_equal(apart.view(dtype).reshape(-1, 2), packed)


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
@pytest.mark.parametrize("clamp", [31, 0, 0x1C03, 0x181F])
def test_shuffles(mode, clamp):
    """After the pseudocode of the PTX ISA, lane by lane."""
    values, distances = RANDOM[0], RANDOM[1] % 40
    out = compute(
        f"shfl.sync.{mode}.b32 %r9|%p1, %r1, %r2, {clamp}, -1; selp.b32 %r3, 1, 0, %p1; xor.b32 %r9, %r9, %r3;",
        values,
        distances,
    )
    segment, bound = clamp >> 8 & 31, clamp & 31
    expected = []
    for thread in range(64):
        lane, b = thread % 32, int(distances[thread]) & 31
        limit = (lane & segment) | (bound & ~segment & 31)
        source = {
            "up": lane - b,
            "down": lane + b,
            "bfly": lane ^ b,
            "idx": (lane & segment) | (b & ~segment & 31),
        }[mode]
        inside = source >= limit if mode == "up" else source <= limit
        expected.append(int(values[thread - lane + (source if inside else lane)]) ^ inside)
    np.testing.assert_array_equal(out, np.array(expected, np.uint32))


# Two warps, each with 512 bytes of its own: %d11 is where, and %r10 the lane.
WARPS = """
    mov.u32 %r10, %laneid; mov.u32 %r11, %warpid; mul.wide.u32 %d11, %r11, 512; add.s64 %d11, %d11, %d0;
    mad.wide.u32 %d12, %r10, 16, %d11; mad.wide.u32 %d13, %r0, 16, %d1;
    ld.global.v4.b32 {%r20, %r21, %r22, %r23}, [%d13];
    st.shared.v4.b32 [%d12], {%r20, %r21, %r22, %r23}; bar.warp.sync -1;
"""
STORE = "mad.wide.u32 %d13, %r0, 16, %d2; st.global.v4.b32 [%d13], {%r20, %r21, %r22, %r23};"
MATRICES = np.random.default_rng(0).integers(0, 2**16, (2, 4, 8, 8), dtype=np.uint16)


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix(transposed):
    load = (
        f"ldmatrix.sync.aligned.m8n8.x4{'.trans' * transposed}.shared.b16 {{%r20, %r21, %r22, %r23}}, [%d12];"
    )
    (out,) = run(WARPS + load + STORE, [MATRICES], [((2, 32, 4, 2), np.uint16)], threads=64).outputs
    for warp, lane, matrix in np.ndindex(2, 32, 4):
        of = MATRICES[warp, matrix].T if transposed else MATRICES[warp, matrix]
        np.testing.assert_array_equal(out[warp, lane, matrix], of[lane // 4, lane % 4 * 2 :][:2])


@pytest.mark.parametrize("transposed", [False, True])
def test_stmatrix(transposed):
    """Takes back what ldmatrix gives."""
    trans = ".trans" * transposed
    body = f"""
        ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{%r20, %r21, %r22, %r23}}, [%d12]; bar.warp.sync -1;
        stmatrix.sync.aligned.m8n8.x2{trans}.shared.b16 [%d12+256], {{%r21, %r20}}; bar.warp.sync -1;
        ld.shared.v4.b32 {{%r20, %r21, %r22, %r23}}, [%d12];
    """.replace("[%d12+256]", "[%d14]")
    swap = "xor.b32 %r12, %r10, 8; mad.wide.u32 %d14, %r12, 16, %d11;"
    (out,) = run(WARPS + swap + body + STORE, [MATRICES], [(MATRICES.shape, np.uint16)], threads=64).outputs
    np.testing.assert_array_equal(out, MATRICES)


@pytest.mark.parametrize(("dtype", "name"), [(BF16, "bf16"), (F16, "f16")])
@pytest.mark.parametrize("k", [8, 16])
def test_mma(dtype, name, k):
    """[16, k] · [k, 8] from rows in shared memory, as Triton does it, and back to rows of 16 bits."""
    generator = np.random.default_rng(0)
    a = generator.integers(-8, 8, (2, 16, k)).astype(dtype)
    b = generator.integers(-8, 8, (2, k, 8)).astype(dtype)
    # Matrices of 8 x 8: of A the upper and lower half, then those of its right half.
    tiles = a.reshape(2, 2, 8, k // 8, 8).transpose(0, 3, 1, 2, 4).reshape(2, k // 4, 8, 8)
    pad = np.zeros((2, 4 - k // 4, 8, 8), dtype)
    second = np.concatenate([b.reshape(2, k // 8, 8, 8), np.zeros((2, 4 - k // 8, 8, 8), dtype)], 1)
    of_a = ", ".join(f"%r{20 + i}" for i in range(k // 4))
    of_b = ", ".join(f"%r{24 + i}" for i in range(k // 8))
    body = f"""
        ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%r20, %r21, %r22, %r23}}, [%d12]; bar.warp.sync -1;
        mad.wide.u32 %d13, %r0, 16, %d2; ld.global.v4.b32 {{%r24, %r25, %r26, %r27}}, [%d13];
        st.shared.v4.b32 [%d12], {{%r24, %r25, %r26, %r27}}; bar.warp.sync -1;
        ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {{%r24, %r25, %r26, %r27}}, [%d12]; bar.warp.sync -1;
        mov.b32 %r28, 0f40000000;
        mma.sync.aligned.m16n8k{k}.row.col.f32.{name}.{name}.f32
            {{%r30, %r31, %r32, %r33}}, {{{of_a}}}, {{{of_b}}}, {{%r28, %r28, %r28, %r28}};
        cvt.rn.{name}x2.f32 %r20, %r31, %r30; cvt.rn.{name}x2.f32 %r21, %r33, %r32;
        stmatrix.sync.aligned.m8n8.x2.shared.b16 [%d12], {{%r20, %r21}}; bar.warp.sync -1;
        ld.shared.v4.b32 {{%r20, %r21, %r22, %r23}}, [%d12]; add.s64 %d2, %d3, 0;
    """
    inputs = [np.concatenate([tiles, pad], 1), second]
    (out,) = run(WARPS + body + STORE, inputs, [((2, 32, 8), dtype)], threads=64).outputs
    expected = (a.astype(np.float64) @ b.astype(np.float64) + 2).astype(dtype)
    np.testing.assert_array_equal(out[:, :16], expected)


def test_mma_rounds_once():
    """Every product is 1, of which 16 are added to 2^24: one by one, none would count."""
    body = """
        mov.b32 %r1, 0x3F803F80; mov.b32 %r2, 0f4B800000;
        mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32
            {%r9, %r10, %r11, %r12}, {%r1, %r1, %r1, %r1}, {%r1, %r1}, {%r2, %r2, %r2, %r2};
    """
    np.testing.assert_array_equal(compute(body, ALL, to=np.float32), np.full(32, 2**24 + 16, np.float32))


def test_loops_guards_and_blocks():
    """Sums 0 to block + 1, but in the threads of the upper half."""
    body = """
        mov.u32 %r1, %ctaid.y; mov.u32 %r2, %nctaid.x; mov.u32 %r3, %ctaid.x; mad.lo.s32 %r1, %r1, %r2, %r3;
        add.s32 %r4, %r1, 1; mov.b32 %r5, 0; mov.b32 %r6, 7; setp.lt.u32 %p1, %r0, 16;
    $loop:
        add.s32 %r5, %r5, %r4; sub.s32 %r4, %r4, 1; setp.gt.s32 %p2, %r4, 0;
        @%p2 bra $loop;
        @%p1 mov.b32 %r6, %r5;
        mad.lo.s32 %r7, %r1, 32, %r0; mad.wide.u32 %d5, %r7, 4, %d1; @!%p1 st.global.b32 [%d5], %r6;
        @%p1 st.global.b32 [%d5], %r6;
    """
    result = run(body, outputs=[((6, 32), np.int32)], grid=(3, 2, 1))
    triangular = np.array([1, 3, 6, 10, 15, 21])[:, None]
    np.testing.assert_array_equal(result.outputs[0], np.where(np.arange(32) < 16, triangular, 7))
    assert result.executed["bra"] == 21
    assert result.executed["st.global.b32"] == 12


OWN_WORD = "mad.wide.u32 %d4, %r0, 4, %d0; st.shared.b32 [%d4], %r0;"
NEXT_WARP = "xor.b32 %r1, %r0, 32; mad.wide.u32 %d5, %r1, 4, %d0;"
NEXT_LANE = "xor.b32 %r1, %r0, 1; mad.wide.u32 %d5, %r1, 4, %d0;"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "mad.wide.u32 %d4, %r0, 8, %d1; ld.global.b32 %r1, [%d4];",
            "line 17, ld.global.b32.*buffer 0.*at 128.*128",
        ),
        ("mad.wide.u32 %d4, %r0, 4, %d1; ld.global.b32 %r1, [%d4+-4];", "is an address of no buffer"),
        ("add.s64 %d4, %d1, 2; ld.global.b32 %r1, [%d4];", "not aligned"),
        ("mad.wide.u32 %d4, %r0, 4, %d2; ld.global.b32 %r1, [%d4+-8];", "buffer 0: 4 bytes at .* outside"),
        ("ld.shared.b32 %r1, [%d0+1024];", "shared memory: 4 bytes at 1024 are outside"),
        ("st.global.b32 [%d2], %r0;", "two threads write different values"),
        (
            "mov.u32 %r1, 1; st.global.b32 [%d2], %r1;",
            "block (1, 0, 0): buffer 1 is written where another block",
        ),
        (f"{OWN_WORD}{NEXT_WARP} ld.shared.b32 %r2, [%d5];", "read races with another warp"),
        (
            f"{OWN_WORD}{NEXT_WARP} bar.warp.sync -1; ld.shared.b32 %r2, [%d5];",
            "read races with another warp",
        ),
        (f"{OWN_WORD}{NEXT_WARP} st.shared.b32 [%d5], %r0;", "write races with another warp"),
        (f"{NEXT_WARP} ld.shared.b32 %r2, [%d5]; {OWN_WORD}", "write races with another warp"),
        ("setp.lt.u32 %p1, %r0, 16; @%p1 bra $end; mov.b32 %r1, 0; $end:", "disagree on a branch"),
        ("setp.lt.u32 %p1, %r0, 16; @%p1 bar.sync 0;", "not executed by all"),
        ("sqrt.rn.f32 %r1, %r2;", "sqrt.rn.f32: not covered"),
        ("add.sat.s32 %r1, %r2, %r3;", r"modifiers \['sat'\]"),
        ("add.s32 %r1, %r2;", "1 sources"),
        ("add.s32 %d1, %r2, %r3; add.s32 %h1, %r2, %r3;", "%h1 cannot hold s32"),
        ("add.s64 %d1, %d2, %r3;", "%r3 does not hold s64"),
        ("mov.b32 %r1, %clock;", "%clock is neither"),
        ("ld.local.b32 %r1, [%d1];", "memory local"),
        ("shfl.sync.idx.b32 %r1, %r2, 0, 31, 1;", "lanes 1"),
    ],
)
def test_what_it_does_not_let_pass(body, message):
    with pytest.raises(PtxError, match=message.replace("(", r"\(").replace(")", r"\)")):
        run(body, [ALL], [((32,), np.uint32)], threads=64, grid=(2, 1, 1))


def test_one_kernel_with_as_many_parameters():
    with pytest.raises(PtxError, match="0 kernels"):
        run_kernel("", (1, 1, 1), 32, 0, [], [])
    with pytest.raises(PtxError, match="0 parameters for 1 inputs"):
        run_kernel(KERNEL.format(parameters="", threads=32, body=""), (1, 1, 1), 32, 0, [ALL], [])


@pytest.mark.parametrize(
    ("barrier", "unsynchronised"), [("", 1), ("bar.warp.sync -1;", 0), ("bar.sync 0;", 0)]
)
def test_exchanges_within_a_warp(barrier, unsynchronised):
    body = f"{OWN_WORD}{NEXT_LANE}{barrier} ld.shared.b32 %r9, [%d5];"
    result = run(
        f"{body} mad.wide.u32 %d6, %r0, 4, %d1; st.global.b32 [%d6], %r9;",
        outputs=[((64,), np.uint32)],
        threads=64,
    )
    np.testing.assert_array_equal(result.outputs[0], np.arange(64) ^ 1)
    assert result.unsynchronised == unsynchronised


def test_unwritten_memory_is_not_a_number():
    result = run("ld.shared.b32 %r1, [%d0]; @%p1 st.global.b32 [%d1], %r1;", outputs=[((2,), np.float32)])
    assert np.isnan(result.outputs[0]).all()
