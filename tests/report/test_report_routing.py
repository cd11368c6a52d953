"""The picture of routing shows every module, expert and token."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")

from sparing.adapt.phatgoose_statistics import ModuleRouting, RoutingStatistics
from sparing.report.routing import routing_figure, write_routing


def statistics(modules: int = 3, experts: int = 4, tokens: int = 6) -> RoutingStatistics:
    weight = torch.rand(experts, dtype=torch.float64)
    names = [f"model.layers.{number // 7}.m{number}" for number in range(modules)]
    one = ModuleRouting(tokens, weight, weight, weight, 0.0)
    return RoutingStatistics(
        [f"e{z}" for z in range(experts)],
        dict.fromkeys(names, one),
        torch.rand(tokens, experts),
        torch.arange(tokens),
    )


def test_one_panel_by_module_and_one_by_token() -> None:
    found = statistics()
    figure = routing_figure(found, ["a", "$x$", "c", "d", "e", "f"])
    by_module, by_token = (axes.images[0].get_array() for axes in figure.axes[:2])
    assert by_module.shape == (3, 4)
    torch.testing.assert_close(torch.as_tensor(by_token.data), found.token_weights)
    labels = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert labels == ["e0", "e1", "e2", "e3"]


def test_many_modules_are_labelled_by_block_and_many_tokens_are_cut() -> None:
    figure = routing_figure(statistics(modules=70, tokens=90))
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == [f"model.layers.{n}" for n in range(10)]
    assert figure.axes[1].images[0].get_array().shape == (64, 4)


def test_the_file_is_a_png(tmp_path: Path) -> None:
    write_routing(statistics(), tmp_path / "routing.png")
    assert (tmp_path / "routing.png").read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in tmp_path.iterdir()] == ["routing.png"]
