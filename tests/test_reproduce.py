"""Evidence is judged by thresholds that were fixed before the run."""

import json

import pytest

from sparing import reproduce
from sparing.errors import ConfigError, MissingExtraError, SparingError, near_matches
from sparing.reproduce import Check, Claim, Evidence, verdict_of

GOOD, BAD = Check.below("a < 1", 0.5, 1), Check.below("a < 1", 1.5, 1)


@pytest.mark.parametrize(
    ("checks", "controls", "verdict"),
    [
        ([GOOD, GOOD], [GOOD], "holds"),
        ([GOOD, BAD], [GOOD], "holds in direction"),
        ([BAD, BAD], [GOOD], "does not hold at this scale"),
        ([GOOD, GOOD], [BAD], "does not hold at this scale"),
    ],
)
def test_verdict_follows_from_checks_and_controls(checks, controls, verdict):
    assert verdict_of(checks, controls) == verdict


def test_checks_are_strict():
    assert not Check.below("a < 1", 1.0, 1.0).holds
    assert not Check.above("a > 1", 1.0, 1.0).holds


def test_every_reproduction_declares_a_claim_and_can_run():
    for slug in reproduce.available():
        module = reproduce.load(slug)
        assert isinstance(module.CLAIM, Claim)
        assert callable(module.run)


def test_unknown_slug_names_the_near_ones():
    with pytest.raises(ConfigError, match="neuroada"):
        reproduce.load("neurada")


def test_record_holds_claim_checks_and_machine(tmp_path, monkeypatch):
    class Fake:
        CLAIM = Claim("x beats y", "not found", "abstract")

        @staticmethod
        def run(device, seeds):
            return Evidence({"loss": [0.5] * len(seeds)}, [GOOD], [GOOD], "holds")

    monkeypatch.setattr(reproduce, "load", lambda slug: Fake)
    reproduce.reproduce("fake", seeds=(0, 1), out=tmp_path)
    record = json.loads((tmp_path / "fake.json").read_text())
    assert record["claim"]["text"] == "x beats y"
    assert record["measured"] == {"loss": [0.5, 0.5]}
    assert record["checks"][0]["holds"] is True
    assert record["environment"]["torch"]


def test_errors_say_where_expected_found_and_mend():
    import pickle

    error = ConfigError("option r", expected="at least 1", found="0", mend="Raise it.")
    assert str(error) == "option r: expected at least 1, found 0. Raise it."
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again)) == (ConfigError, str(error))
    assert isinstance(MissingExtraError.of("ray", "ray"), SparingError)
    assert "sparing[ray]" in str(MissingExtraError.of("ray", "ray"))
    assert near_matches("lroa", ["lora", "mos"]) == "Did you mean lora?"
    assert near_matches("zzz", ["lora", "mos"]) == "Choose one of: lora, mos."
