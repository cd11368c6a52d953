"""Small Llamas and GPTs have the sizes that were asked for."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparing.errors import ConfigError
from sparing.models import FAMILIES, Shape, build, config_of
from sparing.scale.parameters import classify
from sparing.surgery import block_names

SHAPE = Shape(width=32, depth=3, vocabulary=50, context=16, head=8)


def counted(family: str, shape: Shape) -> int:
    """Parameters, from the architecture."""
    d, inner = shape.width, shape.hidden
    head = 0 if shape.tied else shape.vocabulary * d
    if family == "llama":
        return shape.depth * (4 * d * d + 3 * d * inner + 2 * d) + d + shape.vocabulary * d + head
    block = 4 * d * d + 4 * d + 2 * d * inner + inner + d + 4 * d
    return shape.depth * block + 2 * d + (shape.vocabulary + shape.context) * d + head


@pytest.mark.parametrize("family", FAMILIES)
@given(
    heads=st.integers(1, 4),
    head=st.sampled_from((8, 16)),
    depth=st.integers(1, 3),
    tied=st.booleans(),
)
@settings(max_examples=10, deadline=None)
def test_a_model_has_as_many_parameters_as_its_shape_says(family, heads, head, depth, tied) -> None:
    shape = Shape(heads * head, depth, 50, 16, head, 3.0, tied)
    with torch.device("meta"):
        model = build(family, shape)
    assert sum(p.numel() for p in model.parameters()) == counted(family, shape)
    assert len(block_names(model)) == depth
    config = model.config
    assert config.num_attention_heads == heads
    assert config.hidden_size // config.num_attention_heads == head
    assert config.tie_word_embeddings is tied
    assert any(info.tied for info in classify(model).values()) is tied


@pytest.mark.parametrize("family", FAMILIES)
def test_the_seed_decides_and_torchs_generator_is_left_alone(family: str) -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    models = [build(family, SHAPE, seed) for seed in (0, 0, 1)]
    assert torch.equal(torch.rand(2), expected)
    one, same, other = ([p.detach() for p in model.parameters()] for model in models)
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_it_predicts_and_has_no_dropout(family: str) -> None:
    model = build(family, SHAPE).train()
    ids = torch.randint(0, 50, (2, 16), generator=torch.Generator().manual_seed(0))
    logits = model(input_ids=ids).logits
    assert logits.shape == (2, 16, 50)
    assert torch.equal(logits, model(input_ids=ids).logits)


BAD = [
    ({"width": 36}, r"multiple of the head size 8, found 36. Use 40"),
    ({"head": 5, "width": 10}, "even number"),
    ({"depth": 0}, "depth: expected a number above 0"),
    ({"feed_forward": -1.0}, "feed_forward"),
]


@pytest.mark.parametrize(("changes", "text"), BAD)
def test_bad_sizes_are_named(changes, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        Shape(**{"width": 32, "depth": 1, "vocabulary": 9, "context": 8, "head": 8, **changes})


def test_an_unknown_family_gets_near_matches() -> None:
    with pytest.raises(ConfigError, match="Did you mean gpt2"):
        config_of("gpt", SHAPE)
