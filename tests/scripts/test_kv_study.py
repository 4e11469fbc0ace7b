"""The study writes its report, or says in one line why it doesn't."""

import importlib.util
import json
import math
import re

import pytest

from scripts import kv_study

TOKENS = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "new"
    kv_study.main("demo", out=folder, tokens=TOKENS)
    return folder


def test_numbers_are_whole(folder):
    numbers = json.loads((folder / "kv_study.json").read_text())
    assert (numbers["model"], numbers["tokens"], numbers["group_size"]) == ("demo", TOKENS, 32)
    layers, heads, channels = 3, 2, 64
    means = numbers["keys"]["channel_mean"]
    assert (len(means), len(means[0]), len(means[0][0])) == (layers, heads, channels)
    assert len(numbers["errors"]) == 4
    for errors in numbers["errors"]:
        assert len(errors["output_of_values"]) == layers
    losses = {
        tuple(loss.get(name) for name in ("keys", "values", "bits")): loss["loss"]
        for loss in numbers["losses"]
    }
    assert len(losses) == 9
    assert all(map(math.isfinite, losses.values()))
    # The text fits in the exact window.
    for loss in numbers["window_losses"]:
        assert loss["loss"] == pytest.approx(losses[None, None, None], rel=1e-4)


def test_pictures_are_small_and_in_the_page(folder):
    pictures = sorted(folder.glob("*.png"))
    assert len(pictures) == 4
    for picture in pictures:
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert picture.stat().st_size < 60_000
    text = (folder / "kv_study.md").read_text()
    assert sorted(re.findall(r"!\[.*\]\((.*)\)", text)) == [picture.name for picture in pictures]
    page = (folder / "kv_study.html").read_text()
    assert page.count('src="data:image/png;base64,') == page.count("<img") == 4
    assert page.count("<table>") == text.count("\n| :--- |") + text.count("\n| ---: |")


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"tokens": 4900}, "4532 tokens, fewer than the 4900"),
        ({"tokens": 4096}, "4096 tokens is longer than the model's 2048 positions"),
        ({"tokens": 48}, "48 tokens don't divide into groups of 32"),
        ({"group_size": 48, "tokens": 96}, "64 channels don't divide into groups of 48"),
    ],
)
def test_what_cannot_be_studied_is_one_line(tmp_path, capsys, options, error):
    with pytest.raises(SystemExit):
        kv_study.main("demo", out=tmp_path / "report", **options)
    assert error in capsys.readouterr().err
    assert not (tmp_path / "report").exists()


def test_without_matplotlib_the_extra_is_named(tmp_path, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name)
    )
    with pytest.raises(SystemExit):
        kv_study.main("no/such-model", out=tmp_path)
    assert capsys.readouterr().err == "error: the report needs matplotlib; pip install '.[plots]'\n"
