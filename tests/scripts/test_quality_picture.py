"""The picture of quality over bits."""

import json

import pytest
from PIL import Image

from scripts.quality_picture import main, read_points


def written(folder, **caches):
    kv = {name: {"bits": bits, "positions": [{"divergence": kl}]} for name, (bits, kl) in caches.items()}
    file = folder / "results.json"
    file.write_text(json.dumps({"model": "org/name", "text": {"kv": kv}}))
    return file


def test_a_point_for_each_quantized_cache(tmp_path):
    file = written(tmp_path, bf16=(16, 0), kivi4=(5, 0.003), kivi2=(3, 0.2))
    assert read_points(file) == ("name", [("kivi4", 5, 0.003), ("kivi2", 3, 0.2)])
    main([file], tmp_path / "out.png")
    assert Image.open(tmp_path / "out.png").size[0] > 500


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"text": {"kv": {"kivi2": {}}}}'])
def test_other_files(tmp_path, text):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(ValueError, match="is no file of kivi-jax eval"):
        read_points(tmp_path / "results.json")
    with pytest.raises(ValueError, match="has no quantized cache"):
        read_points(written(tmp_path, bf16=(16, 0)))
