"""The report of the decode loop's memory."""

from benchmarks import memory


def test_memory_report_prints_the_state(capsys):
    memory.main(batch=1, capacity=256)
    dense = 16 * 8 * 256 * 64 * 2 * 4  # layers, KV heads, tokens, head_dim, K and V, float32
    state = dense * (4 / 32 + 128 / 256)  # with float32 scales and zeros; window
    assert f"KV state    {state / 2**20:10.1f} MiB" in capsys.readouterr().out


def test_a_prompt_in_chunks_needs_less(capsys):
    for chunk in (None, 128):
        memory.main(batch=1, capacity=1024, prompt=1024, prefill_chunk=chunk)
    whole, in_chunks = (float(line.split()[1]) for line in capsys.readouterr().out.splitlines())
    assert 0 < in_chunks < whole
