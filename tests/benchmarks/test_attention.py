"""The benchmark of attention runs to its end."""

from benchmarks import attention


def test_benchmark_prints_every_kv(capsys):
    attention.main(batch=1, kv_heads=1, query_heads=2, tokens=256, head_dim=64, repeats=1)
    printed = capsys.readouterr().out
    assert [line.split()[0] for line in printed.splitlines()[1:]] == [
        *("kv", "sdpa", "bf16", "kivi4", "kivi2", "kivi2-plus")
    ]
