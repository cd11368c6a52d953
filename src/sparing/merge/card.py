"""What a merged folder says of itself: a record for programs and a model card for people."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_COPIED = (".json", ".txt", ".model", ".jinja", ".py", ".tiktoken", ".bpe")
_NOT_COPIED = ("merge.json", "adapter_config.json", "trainer_state.json")


def side_files(folder: Path) -> list[Path]:
    """Config, tokenizer and whatever else a model needs beside its weights."""
    if not folder.is_dir():
        return []
    return sorted(
        path
        for path in folder.iterdir()
        if path.is_file()
        and path.suffix in _COPIED
        and path.name not in _NOT_COPIED
        and not path.name.endswith(".index.json")
    )


def changed_config(config: dict[str, Any], dtype: str | None, rows: int | None) -> dict[str, Any]:
    """The base's config with another type or vocabulary."""
    changed = dict(config)
    if dtype is not None:
        changed["torch_dtype" if "torch_dtype" in config else "dtype"] = dtype
    if rows is not None:
        changed["vocab_size"] = rows
    return changed


def card(record: dict[str, Any]) -> str:
    """README.md of a merged model.

    Arguments:
        record: what `merge.json` holds.
    """
    names = [record["base"]["name"], *(expert["name"] for expert in record["experts"])]
    front = {
        "library_name": "transformers",
        "base_model": [name for name in names if not name.startswith(("/", "."))],
        "tags": ["merge", "sparing"],
    }
    lines = ["---", *_yaml(front), "---", "", f"# Merge by {record['method']}", ""]
    lines.append(
        f"{len(record['experts'])} models merged into one by `{record['method']}` "
        f"({record['paper']}) with sparing {record['sparing']}."
    )
    lines += ["", "## Options", "", "| option | value |", "|---|---|"]
    for name, value in (record["options"] | record["settings"]).items():
        lines.append(f"| {name} | `{json.dumps(value)}` |")
    lines += ["", "## Inputs", "", "| model | file | SHA-256 |", "|---|---|---|"]
    for role, source in [("base", record["base"])] + [("expert", e) for e in record["experts"]]:
        for file, digest in source["files"].items():
            lines.append(f"| {role} `{source['name']}` | {file} | {digest or 'not computed'} |")
    if record["notes"]:
        lines += ["", "## Notes", "", *(f"- {note}" for note in record["notes"])]
    return "\n".join(lines) + "\n"


def _yaml(front: dict[str, str | Sequence[str]]) -> list[str]:
    lines = []
    for key, value in front.items():
        if isinstance(value, str):
            lines.append(f"{key}: {value}")
        elif value:
            lines += [f"{key}:", *(f"  - {json.dumps(item)}" for item in value)]
    return lines
