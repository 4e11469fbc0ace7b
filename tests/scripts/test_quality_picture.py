"""The picture of quality over bits."""

import json

import pytest

from scripts.quality_picture import main, read_points


def written(folder, **caches):
    kv = {name: {"bits": bits, "positions": [{"divergence": kl}]} for name, (bits, kl) in caches.items()}
    file = folder / "results.json"
    file.write_text(json.dumps({"model": "org/Name-1.5B", "text": {"kv": kv}}))
    return file


def test_a_point_for_each_quantized_cache(tmp_path):
    file = written(tmp_path, bf16=(16, 0), kivi4=(5, 0.003), kivi2=(3, 0.2))
    assert read_points(file) == ("Name-1.5B", [("kivi4", 5, 0.003), ("kivi2", 3, 0.2)])
    main([file], tmp_path / "out.svg")
    # Matplotlib notes each text that it draws.
    drawn = (tmp_path / "out.svg").read_text()
    for text in ("Name-1.5B", "kivi4", "kivi2"):
        assert f"<!-- {text} -->" in drawn
    assert "<!-- bf16 -->" not in drawn


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"text": {"kv": {"kivi2": {}}}}', '{"text": {"kv": {}}}'])
def test_other_files(tmp_path, text):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(ValueError, match="is no file of kivi-jax eval"):
        read_points(tmp_path / "results.json")


def test_nothing_to_draw(tmp_path):
    with pytest.raises(ValueError, match="has no quantized cache"):
        read_points(written(tmp_path, bf16=(16, 0)))
