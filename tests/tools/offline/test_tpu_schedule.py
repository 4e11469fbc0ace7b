"""Reading libtpu's static schedules, and what the TPU report makes of them."""

import importlib.util

import pytest

from benchmarks import tpu_report
from tools.offline import tpu_compiler, tpu_programs
from tools.offline.tpu_schedule import read_schedule

# A loop of bundles 1 to 21; in it one of 3 to 9, which a branch before it can leave out, and a branch over 15 and 16.
# After every branch four more bundles are executed.
BUNDLES = """\
LB: loop body
= control target key end

     0   :  { %s1 = smov.u32 0 }
   0x1 LB: > { %p1 = scmp.le.s32.totalorder %s1, 0  ;;  %9 = sbr.rel (%p1) target bundleno = 10 (0xa), region = 7 }
   0x2   :  {}
   0x3 LB: >> { %v1 = vld [vmem:[#allocation3] sm:$0xff] } /* Start region 5 */
   0x4   :  {}
   0x5   : >> { %v2 = vadd.f32 %v1, %v1  ;;  %11 = sbr.rel (!%p2) target bundleno = 3 (0x3), region = 5 }
   0x6   : >> { %v3 = vmatmul.f32 %v2 }
   0x7   :  {}
   0x8   :  {}
   0x9   : >> { %v4 = vst %v3
strides: (1, 1)
 */ }
   0xa PF: > { %12 = sbr.rel (%p3) target bundleno = 17 (0x11), region = 8 }
   0xb   :  {}
   0xc   :  {}
   0xd   :  {}
   0xe   :  {}
   0xf   : > { %v5 = vst %v4 }
  0x10   : > { %v6 = vst %v4 }
  0x11   : > { %13 = sbr.rel (!%p4) target bundleno = 1 (0x1), region = 6 }
  0x12   :  {}
  0x13   :  {}
  0x14   :  {}
  0x15   :  {}
  0x16   :  { %14 = vsyncpa [#allocation2], 1 }
"""
USED = {  # slot: bundles that use it
    "MATMUL": [6, 7],  # two cycles
    "VALU": [5],
    "VLOAD": [3],
    "VLOAD:FILL": [9],
    "VSTORE": [9, 15, 16],
    "VSTORE:SPILL": [],
    "SALU": [0, 1, 5],
}


def utilization() -> str:
    rows = ("  ".join(str(int(bundle in used)) for used in USED.values()) for bundle in range(23))
    return "\n".join(
        ["== CAPACTIY:", ", ".join(USED), "    2   4   3   3   1   1   2", "== UTILIZATION:", *rows, ""]
    )


def test_loops_with_the_cycles_they_wait():
    schedule = read_schedule(BUNDLES, utilization())
    outside, outer, inner = schedule.loops
    assert [(loop.depth, loop.cycles, loop.bundles) for loop in schedule.loops] == [
        (0, 2, 2),
        (1, 14, 5),
        (2, 7, 4),
    ]
    assert schedule.cycles == 23
    assert schedule.main_loop is inner
    assert schedule.around_main_loop == (outer,)
    assert schedule.beside_main_loop == ()
    assert (outside.spills, outer.spills, inner.spills) == (0, 0, 1)
    assert schedule.utilization(inner) == pytest.approx(
        {"MATMUL": 2 / 14, "VSTORE": 1 / 7, "VLOAD": 1 / 21, "SALU": 1 / 14, "VALU": 1 / 28}
    )


def test_dumps_that_do_not_fit_together():
    with pytest.raises(ValueError, match="23 bundles and 22 rows"):
        read_schedule(BUNDLES, utilization().rpartition("\n")[0].rpartition("\n")[0])


def test_without_libtpu_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(tpu_compiler.LibtpuMissing, match="pip install libtpu"):
        tpu_compiler.compile_programs("v5e", "tools.offline.tpu_programs:kernels", cases={})


def test_cost_of_512_tokens_of_a_head():
    case = tpu_report.attention("Llama 3 8B", "kivi2")
    assert case.packed_bytes(512) == 512 * 128 * 2 * 3 / 8  # 3.0 bits a value
    pipeline = tpu_programs.pipeline_of(case, "v5e")
    cost = tpu_report.Cost.of(pipeline, read_schedule(BUNDLES, utilization()))
    tokens = pipeline.pass_tokens
    assert cost.main * tokens == 7 * 512
    assert cost.bundles * tokens == 4 * 512
    # Two passes more than the tokens take fill and empty the pipeline.
    assert cost.whole * tokens * pipeline.units == pytest.approx((14 + (pipeline.units + 2) * 7) * 512)
