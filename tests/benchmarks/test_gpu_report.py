"""What the GPU report makes of compiled kernels."""

from benchmarks import gpu_report
from tools.offline import gpu_compiler
from tools.offline.gpu_schedule import Loop, Schedule
from tools.report_page import replace_section


def test_programs_of_a_multiprocessor():
    kernel = gpu_compiler.Kernel((8, 20, 1), 64, 255, 520, 784, 736, 1024 + 16, Schedule(()))
    # Two warps of 255 registers, which take 256 × 32 each, of 65536.
    assert gpu_report.programs_at_once("h100", kernel) == 4


def test_cost_of_256_tokens_of_a_head(monkeypatch):
    case = gpu_report.Case("Falcon 7B")
    outside = Loop(0, {"MOV": 9}, {"alu": 9}, skipped=0)
    packed = Loop(1, {"LOP3": 900, "HGMMA": 100}, {"alu": 900, "tensor": 100}, skipped=0)  # 64 tokens
    ring = Loop(1, {"LOP3": 600}, {"alu": 600}, skipped=0)
    schedule = Schedule((outside, packed, ring))
    kernel = gpu_compiler.Kernel((1, 20, 1), 128, 255, 0, 0, 0, 8192, schedule)
    result = gpu_compiler.CompiledForGPU(
        0, 0, 0, 0, "", kernels={gpu_report.ATTEND: kernel}, others=frozenset()
    )
    monkeypatch.setattr(gpu_report, "compiled", lambda gpu: {case: result})
    (row,) = gpu_report._cost_rows()
    bytes_per_cycle = 3.35232e12 / 132 / 1.755e9
    assert row[-7:] == [
        "4000",  # 71 query heads are one program of 4 warps, on 4 schedulers
        "alu",
        "7200",
        f"{256 * 64 * 2 * 3 / 8 / bytes_per_cycle:.0f}",  # 3.0 bits a value
        f"{256 * 64 * 2 * 2 / bytes_per_cycle:.0f}",
        "5.3",
        f"{256 * 64 * 2 * 2 / bytes_per_cycle / 7200:.1f}",
    ]


def test_cost_of_programs_of_one_warp(monkeypatch):
    case = gpu_report.Case("Llama 3 8B")
    outside = Loop(0, {"MOV": 9}, {"alu": 9}, skipped=0)
    tiles = Loop(1, {"LOP3": 1000, "HMMA": 1000}, {"alu": 1000, "tensor": 1000}, skipped=0)
    keys = Loop(2, {"LOP3": 600}, {"alu": 600}, skipped=0)  # four passes of 32 channels
    values = Loop(2, {"LOP3": 400}, {"alu": 400}, skipped=0)
    kernel = gpu_compiler.Kernel((8, 20, 1), 32, 255, 0, 0, 0, 8192, Schedule((outside, tiles, keys, values)))
    result = gpu_compiler.CompiledForGPU(
        0, 0, 0, 0, "", kernels={gpu_report.ATTEND: kernel}, others=frozenset()
    )
    monkeypatch.setattr(gpu_report, "compiled", lambda gpu: {case: result})
    (row,) = gpu_report._cost_rows()
    assert row[-7:-4] == ["1500", "alu", "2500"]


def test_the_page_has_every_section():
    page = gpu_report.PAGE.read_text()
    for name in gpu_report.SECTIONS:
        assert replace_section(page, name, ["new"]) != page
