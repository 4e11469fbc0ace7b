"""Reading the disassembly of GPU kernels, and what XLA dumps of them."""

import pytest

from tools.offline import gpu_compiler
from tools.offline.gpu_schedule import read_schedule

# A loop that a predicate leaves early, in it one that branches on an operand, then a loop of which a branch skips some.
# After the exit come code for threads that have come apart, which goes back into the inner loop, and what fills up.
SASS = """\
	.section	.text.attend,"ax",@progbits
attend:
.text.attend:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   S2UR UR6, SR_CgaCtaId ;
.L_x_0:
        /*0020*/                   ISETP.GE.AND P0, PT, R2, R3, PT ;
        /*0030*/              @P0  BRA `(.L_x_3) ;
.L_x_1:
        /*0040*/                   HMMA.16816.F32.BF16 R4, R8.reuse, R12, R4 ;
        /*0050*/              @!P1 LDG.E.128 R12, desc[UR8][R24.64+0x80] ;
        /*0060*/                   BRA.DIV UR4, `(.L_x_5) ;
        /*0070*/                   SHFL.IDX PT, R2, R2, R29, 0x1f ;
.L_x_2:
        /*0080*/                   IMAD.MOV.U32 R1, RZ, RZ, R2 ;
        /*0090*/                   BRA.U UP0, `(.L_x_1) ;
        /*00a0*/                   UIADD3 UR4, UR4, 0x1, URZ ;
        /*00b0*/              @UP1 STL [R1], R2 ;
        /*00c0*/                   BRA `(.L_x_0) ;
.L_x_3:
        /*00d0*/              @!P2 BRA `(.L_x_4) ;
        /*00d8*/                   MUFU.EX2 R2, R2 ;
        /*00e0*/                   FADD R2, R2, R3 ;
.L_x_4:
        /*00e8*/                   FMUL R2, R2, R3 ;
        /*00f0*/              @P3  BRA `(.L_x_3) ;
        /*0100*/                   EXIT ;
.L_x_5:
        /*0110*/                   WARPSYNC.COLLECTIVE R15, `(.L_x_6) ;
        /*0120*/                   SHFL.IDX PT, R2, R2, R29, 0x1f ;
.L_x_6:
        /*0130*/                   BRA `(.L_x_2) ;
.L_x_7:
        /*0140*/                   BRA `(.L_x_7);
        /*0150*/                   NOP;
"""


def test_loops_and_their_instructions():
    schedule = read_schedule(SASS)
    outside, outer, inner, last = schedule.loops
    assert [loop.depth for loop in schedule.loops] == [0, 1, 2, 1]
    assert outside.kinds == {"other": 1, "uniform": 1, "control": 1}
    assert outer.kinds == {"alu": 1, "control": 2, "uniform": 1, "local": 1}
    assert inner.kinds == {"tensor": 1, "global": 1, "control": 2, "shuffle": 1, "fma": 1}
    assert inner.opcodes == {"BRA": 2, "HMMA": 1, "LDG": 1, "SHFL": 1, "IMAD": 1}
    assert last.opcodes == {"BRA": 2, "FMUL": 1}
    assert [loop.skipped for loop in schedule.loops] == [0, 0, 0, 2]


def test_a_kernel_without_loops():
    (all_of_it,) = read_schedule(SASS[: SASS.index(".L_x_0:")]).loops
    assert all_of_it.instructions == 2


def test_branches_that_are_not_known():
    with pytest.raises(ValueError, match="BRX"):
        read_schedule("        /*0000*/                   BRX R2 -0x10 ;")
    with pytest.raises(ValueError, match="disassembly"):
        read_schedule("nvdisasm fatal   : ...")


THUNKS = """\
001: kWhile [source | sink]
  body:
    002: kCopy         [source        | next=005 (1) ] kCopy
    003: kCustomKernel [source | sink] attend__1 grid: [8, 20, 1] threads: [64, 1, 1]  shared_memory: 1024 bytes
    004: kCustomKernel [source | sink] loop_add_fusion grid: [1, 1, 1] threads: [16, 1, 1]  shared_memory: 0 bytes
    005: kCustomKernel [prev=003 (1)  | sink] attend__1 grid: [8, 20, 1] threads: [64, 1, 1]  shared_memory: 1024 bytes
"""
PTX = ".version 9.4\n.target sm_90a\n.visible .entry {}(\n)\n"
LOG = """\
ptxas info    : Compiling entry function 'attend__1' for 'sm_90a'
ptxas info    : Function properties for attend__1
    520 bytes stack frame, 784 bytes spill stores, 736 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 520 bytes cumulative stack size, 16 bytes smem
"""


@pytest.fixture
def dump(tmp_path, monkeypatch):
    """Of a program with a kernel of Pallas and one of XLA, and without CUDA's tools."""
    (tmp_path / "module_0001.jit_f.thunk_sequence.txt").write_text(THUNKS)
    for number, name in enumerate(("attend__1", "loop_add_fusion")):
        (tmp_path / f"module_0001.jit_f.{number}.ptx").write_text(PTX.format(name))
    monkeypatch.setattr(gpu_compiler, "assemble", lambda ptx: (SASS, LOG))
    return tmp_path


def test_kernels_as_they_are_launched(dump):
    kernels, others = gpu_compiler.read_kernels(dump, {"attend"})
    assert kernels == {
        "attend__1": gpu_compiler.Kernel(
            grid=(8, 20, 1),
            threads=64,
            registers=255,
            stack=520,
            spill_stores=784,
            spill_loads=736,
            shared_memory=1024 + 16,
            schedule=read_schedule(SASS),
        )
    }
    assert others == {"loop_add_fusion"}


def test_kernels_that_are_not_launched(dump):
    with pytest.raises(ValueError, match="merge"):
        gpu_compiler.read_kernels(dump, {"attend", "merge"})
