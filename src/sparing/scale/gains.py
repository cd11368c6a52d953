"""How much every attention and feed-forward branch amplifies: output over normalised input."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparing import pretrained
from sparing.data.blocks import text_blocks
from sparing.data.corpora import read_examples
from sparing.errors import CheckpointError, ConfigError
from sparing.surgery import attentions, feed_forwards

Ends = tuple[str, str]


def branch_ends(model: nn.Module) -> dict[str, Ends]:
    """The module that reads a branch's input and the one that makes its output, by branch.

    Attentions go from the query's projection to the output's, feed-forward networks from first to
    last layer; a mixture of experts is one module. Branches are named by their module.

    Raises:
        ConfigError: there are none.
    """
    found: dict[str, Ends] = {}
    for finder in (_attentions, _feed_forwards, _mixtures):
        found |= finder(model)
    if not found:
        raise ConfigError(
            type(model).__name__,
            expected="blocks with attention or a feed-forward network",
            found="none that is known",
            mend="Compare singular values alone.",
        )
    order = {name: number for number, (name, _) in enumerate(model.named_modules())}
    return dict(sorted(found.items(), key=lambda item: order[item[1][1]]))


@torch.no_grad()
def branch_gains(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> dict[str, float]:
    """RMS(branch output) / RMS(branch input after the norm), a mean over tokens ("wd-scaling",
    eq. 12; which tensors and which mean are reconstructed).

    Arguments:
        model: in evaluation mode.
        batches: keyword arguments of its forward, such as {"input_ids": …}.

    Raises:
        ConfigError: no branches, or no batches.
    """
    ends = branch_ends(model)
    inputs: dict[str, Tensor] = {}
    total: dict[str, float] = defaultdict(float)
    tokens: dict[str, int] = defaultdict(int)

    def reads(branch: str) -> Callable[..., None]:
        def hook(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            x = given[0] if given else named["hidden_states"]
            inputs[branch] = _rms(x)

        return hook

    def makes(branch: str) -> Callable[..., None]:
        def hook(module: nn.Module, given: tuple[Any, ...], output: Any) -> None:
            out = _rms(output[0] if isinstance(output, tuple) else output)
            ratio = out / inputs.pop(branch).view_as(out)
            total[branch] += float(ratio.double().sum())
            tokens[branch] += ratio.numel()

        return hook

    handles = []
    try:
        for branch, (first, last) in ends.items():
            handles.append(
                model.get_submodule(first).register_forward_pre_hook(
                    reads(branch), with_kwargs=True
                )
            )
            handles.append(model.get_submodule(last).register_forward_hook(makes(branch)))
        for batch in batches:
            model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    if not tokens:
        raise ConfigError("batches", expected="at least one", found="none", mend="Give some text.")
    return {branch: total[branch] / tokens[branch] for branch in ends if tokens[branch]}


def checkpoint_gains(
    path: Path, source: str = "python-topics", *, rows: int = 8, length: int = 128
) -> dict[str, float]:
    """Gains of a language model in a folder, on text; on random tokens if it has no tokenizer.

    Arguments:
        path: that `save_pretrained` wrote.
        source: of the text; see `read_examples`.
        rows, length: blocks of the text, and tokens in each.

    Raises:
        ConfigError: no language model.
        CheckpointError: damaged files.
    """
    model: Any = pretrained.load_whole(str(path))
    config = model.config
    if not isinstance(getattr(config, "vocab_size", None), int):
        raise ConfigError(
            str(path),
            expected="a language model",
            found=type(model).__name__,
            mend="Compare singular values alone.",
        )
    length = min(length, getattr(config, "max_position_embeddings", None) or length)
    try:
        tokenizer = pretrained.load_tokenizer(str(path))
    except CheckpointError:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(config.vocab_size, (rows, length), generator=generator)
    else:
        ids = text_blocks(_first(source, 16 * rows * length), tokenizer, length).input_ids[:rows]
    return branch_gains(model, [{"input_ids": ids}] if len(ids) else [])


def _first(source: str, characters: int) -> list[str]:
    """Documents of a corpus, from its start, with at least so many characters."""
    documents: list[str] = []
    for example in read_examples(source):
        documents.append(example.text)
        characters -= len(example.text)
        if characters <= 0:
            break
    return documents


def _rms(x: Tensor) -> Tensor:
    """(…, width) -> (tokens,), in float32."""
    return x.float().flatten(0, -2).square().mean(-1).sqrt()


def _attentions(model: nn.Module) -> dict[str, Ends]:
    try:
        return {part.module: (part.query.layer, part.output) for part in attentions(model)}
    except ConfigError:
        return {}


def _feed_forwards(model: nn.Module) -> dict[str, Ends]:
    try:
        parts = feed_forwards(model)
    except ConfigError:
        return {}
    return {_parent(part.last): (part.first[0], part.last) for part in parts}


def _mixtures(model: nn.Module) -> dict[str, Ends]:
    found = {}
    for name, module in model.named_modules():
        experts = dict(module.named_children()).get("experts")
        if experts is not None and list(experts.parameters()):
            found[name] = (name, name)
    return found


def _parent(name: str) -> str:
    return name.rpartition(".")[0]
