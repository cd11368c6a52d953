"""The catalog says what there is, and the files agree."""

import importlib
import re
from pathlib import Path

import pytest

from sparing.catalog import CATALOG, Method, ready

ROOT = Path(__file__).parents[1]
ROOMS = {
    "adapt": "mos neuroada sara hut ept queryable-lora dopamine unified-peft bi-adapter phatgoose",
    "merge": "pcb-merging made-it",
    "compress": "adaquant-ip shiftaddllm ramp perp stable-rps ftwt jei-dnn liger",
    "layers": "gated-attention versatileffn move widenet s4d",
    "models": "parcae cart mor",
    "scale": "hyperp muon-mup wd-scaling fast-hp-transfer",
    "tune": "stn memcontrol",
    "training": "ewa dsp-reg rdtf",
    "forecast": "linear-forecast tpgn",
    "dynamics": "mixer-dsr",
    "mixtures": "topk-gating-stats",
    "diffusion": "udm",
    "rl": "ppo-1m-envs trust-the-batch",
    "scenes": "switch-nerf-pp",
}
READY = [method for method in CATALOG if method.status == "ready"]


def test_there_are_45_methods_in_their_rooms() -> None:
    assert len(CATALOG) == 45
    for room, slugs in ROOMS.items():
        assert {m.slug for m in CATALOG if m.room == room} == set(slugs.split())


def test_slugs_and_papers_are_unique_and_well_formed() -> None:
    slugs = [method.slug for method in CATALOG]
    assert len(set(slugs)) == 45
    assert all(re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", slug) for slug in slugs)
    assert len({method.arxiv for method in CATALOG}) == 45
    for method in CATALOG:
        assert re.fullmatch(r"https://arxiv\.org/abs/\d{4}\.\d{5}", method.paper)
        assert method.title
        assert method.status in ("planned", "ready")


def test_ready_lists_a_room_in_catalog_order() -> None:
    assert [method.slug for method in ready("adapt")] == [
        method.slug for method in READY if method.room == "adapt"
    ]
    assert {"mos", "neuroada", "sara", "hut"} <= {method.slug for method in ready("adapt")}


@pytest.mark.parametrize("method", READY, ids=lambda method: method.slug)
def test_a_ready_method_has_module_test_reproduction_and_page(method: Method) -> None:
    importlib.import_module(method.module)
    name = method.slug.replace("-", "_")
    for file in (
        f"tests/{method.room}/test_{name}.py",
        f"reproductions/{name}.py",
        f"docs/methods/{method.slug}.md",
    ):
        assert (ROOT / file).is_file(), file


@pytest.mark.parametrize(
    "method", [m for m in CATALOG if m.status == "planned"], ids=lambda method: method.slug
)
def test_a_planned_method_has_no_module_yet(method: Method) -> None:
    room, name = method.module.removeprefix("sparing.").split(".")
    assert not (ROOT / "src" / "sparing" / room / f"{name}.py").exists()
