"""What the options of a cache recover, on the synthetic models of scripts/quality_guards.py."""

import warnings

import pytest

import kivi_jax
from scripts.quality_guards import OPTIONS, SCENARIOS, damages, random_texts, write_model

pytestmark = pytest.mark.exhaustive

COMPARED = ("kivi4", "kivi-k4v2", "kivi2", "kivi2-sinks", "kivi2-edges")


@pytest.fixture(scope="module")
def divergences(tmp_path_factory):
    """KL divergence from the exact cache by scenario and option."""
    tokens = random_texts(rows=1, length=256 + 32 + 1)
    found = {}
    for scenario in SCENARIOS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            params = kivi_jax.load(
                write_model(tmp_path_factory.mktemp("model"), scenario, layers=3), dtype="float32"
            )
        measured = damages(params, tokens, 256, {name: OPTIONS[name] for name in COMPARED})
        found[scenario] = {name: damage.divergence for name, damage in measured.items()}
    return found


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_more_bits_do_less_harm(divergences, scenario):
    found = divergences[scenario]
    assert 0 < found["kivi4"] < found["kivi-k4v2"] < found["kivi2"]


def test_large_key_biases_harm_2_bit_keys(divergences):
    assert divergences["key biases"]["kivi2"] > 4 * divergences["plain"]["kivi2"]


def test_exact_edges_recover_large_key_biases(divergences):
    found = divergences["key biases"]
    assert found["kivi2-edges"] < found["kivi2"] / 4
    assert found["kivi2-sinks"] > found["kivi2"] / 2  # which are no remedy here


def test_exact_sinks_recover_outliers_among_the_first_tokens(divergences):
    found = divergences["sinks"]
    assert found["kivi2-sinks"] < found["kivi2"] / 3
    assert found["kivi2-sinks"] < found["kivi2-edges"]


def test_the_notice_names_the_biased_layers(tmp_path):
    with pytest.warns(UserWarning, match="key biases of layers 0, 3 ") as caught:
        kivi_jax.load(write_model(tmp_path / "biased", "key biases"))
    assert len(caught) == 1
    for scenario in ("plain", "sinks"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            kivi_jax.load(write_model(tmp_path / scenario, scenario))
