"""A fine-tuned mask as a folder: only what was trained, and what is needed to put it back."""

from dataclasses import asdict
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from sparing.checkpoint import atomic_path, read_json, write_json
from sparing.errors import CheckpointError
from sparing.fingerprint import fingerprint
from sparing.tune import difffit, svdiff
from sparing.tune.parameter_groups import Mask, ParameterGroup, ParameterGroups

_WEIGHTS, _RECORD = "tuned.safetensors", "mask.json"


def save_tuned(model: nn.Module, groups: ParameterGroups, mask: Mask, folder: Path) -> None:
    """Write the parameters that a mask trains, atomically, as safetensors and a JSON record.

    Arguments:
        model: fine-tuned with this mask.
        groups: of the model.
        folder: replaced as a whole.

    Raises:
        UnwritableError: the folder cannot be written.
    """
    known = dict(model.named_parameters())
    active = groups.active(mask)
    frozen = [tensor for name, tensor in known.items() if name not in groups.parameters]
    record = asdict(groups) | {
        "mask": "".join(str(int(bit)) for bit in groups.mask(mask)),
        "base": fingerprint(frozen) if frozen else None,
    }
    with atomic_path(folder) as fresh:
        fresh.mkdir()
        tensors = {name: known[name].detach().cpu().contiguous() for name in active}
        save_file(tensors, fresh / _WEIGHTS)
        write_json(fresh / _RECORD, record)


def load_tuned(model: nn.Module, folder: Path) -> tuple[ParameterGroups, str]:
    """Put what `save_tuned` wrote onto a base model, in place.

    SVDiff's shifts belong to singular values in descending order; where several are equal to the
    last bit, another machine may find other vectors for them. Use `export` to hand weights on.

    Returns:
        the groups, and the mask as text.

    Raises:
        CheckpointError: a file is damaged, or belongs to another model.
    """
    record = read_json(Path(folder) / _RECORD)
    try:
        tensors = load_file(Path(folder) / _WEIGHTS)
        groups = ParameterGroups(
            record["family"],
            record["coverage"],
            tuple(ParameterGroup(g["name"], tuple(g["parameters"])) for g in record["groups"]),
            tuple(record["always"]),
        )
        mask, base = record["mask"], record["base"]
    except (KeyError, TypeError, OSError, SafetensorError) as error:
        raise CheckpointError(
            str(folder),
            expected=f"{_RECORD} and {_WEIGHTS} of save_tuned",
            found=f"{type(error).__name__}: {error}",
            mend="Save again.",
        ) from error
    if groups.family == "svdiff":
        svdiff.install(model)
    elif groups.family == "difffit":
        difffit.install(model)
    known = dict(model.named_parameters())
    for name, tensor in tensors.items():
        if name not in known or known[name].shape != tensor.shape:
            raise _other_model(folder, name, f"none, or of another shape than {tensor.shape}")
    frozen = [tensor for name, tensor in known.items() if name not in groups.parameters]
    found = fingerprint(frozen) if frozen else None
    if base is not None and found is not None and base != found:
        raise _other_model(folder, "base model", f"one with fingerprint {found} instead of {base}")
    groups.apply_mask(model, mask)
    for name, tensor in tensors.items():
        known[name].data.copy_(tensor)
    return groups, mask


def export(model: nn.Module) -> nn.Module:
    """Fold SVDiff's shifts and DiffFit's scales into plain weights, in place, and return the model.

    The result has the classes and the parameter names that the model had before `block_groups`.
    """
    return difffit.export(svdiff.export(model))


def _other_model(folder: Path, where: str, found: str) -> CheckpointError:
    return CheckpointError(
        f"{folder}, {where}",
        expected="a parameter of the model that was tuned",
        found=found,
        mend="Load the base model that it was trained on.",
    )
