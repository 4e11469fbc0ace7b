import jax.numpy as jnp
import numpy as np

from kivi_jax.kv.rings import entries_in, entry_in, newest_round, slot_of


def filled(count, size):
    """A ring after entries 0, 1, … were written one by one, and -1 where none was."""
    ring = [-1] * size
    for entry in range(count):
        ring[entry % size] = entry
    return ring


def test_a_ring_holds_its_newest_entries():
    for size in (1, 3, 4):
        counts = range(3 * size + 2)
        held = np.asarray(entries_in(jnp.asarray(counts), size))
        for count, row in zip(counts, held, strict=True):
            assert np.maximum(row, -1).tolist() == filled(count, size)
            assert [
                int(entry_in(jnp.asarray(slot), jnp.asarray(count), size)) for slot in range(size)
            ] == row.tolist()


def test_an_entry_is_in_its_slot():
    entries = jnp.arange(20)
    assert [
        filled(entry + 1, 7)[slot] for entry, slot in enumerate(slot_of(entries, 7).tolist())
    ] == entries.tolist()


def test_the_newest_round_begins_in_the_first_slot():
    for count in range(1, 20):
        slots, first = newest_round(jnp.asarray(count), 6)
        assert filled(count, 6)[: int(slots)] == list(range(int(first), count))
