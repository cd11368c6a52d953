"""From a folder of adapters to one model that routes among them (PHATGOOSE, steps 3 and 4)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from sparing.adapt._phatgoose_experts import Expert, check_same_base, open_experts
from sparing.adapt._phatgoose_keys import KEY_FILES, arrow_key, load_keys, mean_row_key
from sparing.adapt.phatgoose import Key, Mode, PhatgooseAdapter, PhatgooseConfig, expert_layers
from sparing.errors import CheckpointError, ConfigError
from sparing.lora_files import CONFIG_FILE, exact_targets

Folders = Sequence[str | Path] | Mapping[str, str | Path]


def adapters_in(folder: str | Path) -> dict[str, Path]:
    """The adapters in the sub-folders of a folder, by name in alphabetical order; or the folder
    itself, if it is one.

    Raises:
        ConfigError: there is none.
    """
    path = Path(folder)
    if (path / CONFIG_FILE).is_file():
        return {path.resolve().name: path}
    found = {file.parent.name: file.parent for file in sorted(path.glob(f"*/{CONFIG_FILE}"))}
    if not found:
        raise ConfigError(
            str(path),
            expected=f"sub-folders with an {CONFIG_FILE}",
            found="none" if path.is_dir() else "no such folder",
            mend="Give the folder that holds the adapters' folders.",
        )
    return found


def assemble(
    base: nn.Module,
    experts: Folders,
    *,
    key: Key = "gate",
    top_k: int = 2,
    check_base: bool = True,
    **options: Any,
) -> PeftModel:
    """Stack experts on a base model and route every token at every module among them.

    The result is an ordinary PEFT model: `save_pretrained` writes all experts and keys into one
    folder, which `peft.PeftModel.from_pretrained` loads. Ranks, scales and adapted modules may
    differ; an expert that does not adapt a module takes no part there.

    Arguments:
        base: the plain model that all experts were trained on; quantised is fine.
        experts: folders of PEFT LoRAs, of `PhatgooseConfig` or MoS adapters, or of others of ours
            whose update is exactly low-rank; a mapping from names, or names are the folders'.
        key: what experts are recognised by; see `PhatgooseConfig`. "gate" and "average" need the
            files that `train_gates` and `save_average_inputs` write; the others need nothing.
        top_k: experts a token.
        check_base: refuse experts that name another base model or revision.
        options: of `PhatgooseConfig`: score, temperature, router, use_input_gate, expert_dtype,
            seed.

    Raises:
        ConfigError: top_k above the number of experts, or another option that cannot work.
        CheckpointError: an expert is damaged, of another base or kind (DoRA, biases), or has no
            keys of this kind.
    """
    opened = open_experts(base, experts)
    if check_base:
        check_same_base(base, opened)
    keys = _stored_keys(opened, key)
    model = place(base, opened, key=key, top_k=top_k, mode="routed", **options)
    for name, adapter in expert_layers(model).items():
        fill(adapter, name, opened)
        _fill_keys(adapter, name, opened, key, keys)
    return model


def place(
    base: nn.Module, experts: Sequence[Expert], *, key: Key, mode: Mode, **options: Any
) -> PeftModel:
    """Empty adapters of the right shapes, on every module that any expert adapts."""
    ranks: dict[str, list[int]] = {}
    for name, _ in base.named_modules():
        found = [e.shapes[name].rank if name in e.shapes else 0 for e in experts]
        if any(found):
            ranks[name] = found
    uniform = max(max(found) for found in ranks.values())
    config = PhatgooseConfig(
        r=uniform,
        ranks={name: found for name, found in ranks.items() if set(found) != {uniform}},
        experts=[expert.name for expert in experts],
        key=key,
        mode=mode,
        target_modules=exact_targets(ranks, base),
        task_type=experts[0].config.get("task_type"),
        **options,
    )
    return get_peft_model(base, config)


@torch.no_grad()
def fill(adapter: PhatgooseAdapter, module: str, experts: Sequence[Expert]) -> None:
    """Copy the experts' factors and scales into an adapter."""
    for number, expert in enumerate(experts):
        if adapter.ranks[number]:
            factors = expert.read(module)
            a, b = adapter.stack.only(number)
            a.copy_(factors.a)
            b.copy_(factors.b.t())
            adapter.scales[number] = factors.scale


@torch.no_grad()
def _fill_keys(
    adapter: PhatgooseAdapter,
    module: str,
    experts: Sequence[Expert],
    kind: Key,
    stored: list[dict[str, Tensor]],
) -> None:
    assert adapter.keys is not None
    for number in range(len(experts)):
        if adapter.ranks[number] and kind != "random":
            a, b = adapter.stack.only(number)
            if kind == "arrow":
                adapter.keys[number] = arrow_key(a, b.t())
            elif kind == "mean_row":
                adapter.keys[number] = mean_row_key(a)
            else:
                adapter.keys[number] = stored[number][module]


def _stored_keys(experts: Sequence[Expert], kind: Key) -> list[dict[str, Tensor]]:
    """By expert, the keys beside it, which cover all its modules; nothing for other kinds."""
    if kind not in KEY_FILES:
        return [{} for _ in experts]
    found = [load_keys(expert.path, kind) for expert in experts]
    lacking = [
        expert.name if keys is None else f"{expert.name} (module {absent[0]})"
        for expert, keys in zip(experts, found, strict=True)
        if (absent := [name for name in expert.shapes if name not in (keys or {})])
    ]
    if lacking:
        maker = "train_gates" if kind == "gate" else "save_average_inputs"
        raise CheckpointError(
            f"experts {', '.join(lacking)}",
            expected=f"a {KEY_FILES[kind]} beside each adapter, with a key for each of its modules",
            found="none",
            mend=f"Make them with sparing.adapt.{maker}, or assemble with key='arrow'.",
        )
    for expert, keys in zip(experts, found, strict=True):
        _check_widths(expert, keys or {})
    return [keys or {} for keys in found]


def _check_widths(expert: Expert, keys: Mapping[str, Tensor]) -> None:
    for name, shape in expert.shapes.items():
        if len(keys[name]) != shape.inputs:
            raise CheckpointError(
                f"key for module {name!r} of expert {expert.name!r}",
                expected=f"{shape.inputs} numbers, one for each input",
                found=str(len(keys[name])),
                mend="Delete the file of keys and make it again.",
            )
