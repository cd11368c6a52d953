"""`sparing check FOLDER`: reduced spectral norms of a model, and which are outside a band."""

from pathlib import Path
from typing import Any

from sparing.errors import ConfigError


def show_band(folder: Path, band: tuple[float, float] | None, out: Path | None) -> None:
    """Print w = ‖W‖/√(outputs/inputs) of all hidden matrices of a trained model (Muon++, eq. 1).

    Arguments:
        folder: that `save_pretrained` wrote.
        band: smallest and largest w that pass; None for no verdict.
        out: to write the figures to, as JSON.

    Raises:
        ConfigError: an empty band.
        CheckpointError: damaged files, or no config.json.
    """
    from sparing.checkpoint import write_json
    from sparing.cli import _quiet_libraries, console

    if band is not None and not 0 <= band[0] < band[1]:
        raise ConfigError(
            "--band",
            expected="the smallest and then the largest reduced norm",
            found=f"{band[0]:g} {band[1]:g}",
            mend="For instance --band 0.2 10, where 10 is the radius 1/λ of the run.",
        )
    _quiet_libraries()
    from rich.table import Table

    from sparing.progress import progress_line
    from sparing.scale.spectra import measure_checkpoint
    from sparing.scale.spectral_monitor import reduced_norms

    with progress_line(console) as bar:
        task = bar.add_task("largest singular values", total=None)
        spectra = measure_checkpoint(
            folder, advance=lambda name: bar.update(task, description=name)
        )
    norms = reduced_norms(spectra.matrices)
    rows: list[dict[str, Any]] = [
        {
            "name": matrix.name,
            "shape": [matrix.outputs, matrix.inputs],
            "sigma": matrix.sigma,
            "norm": norms[matrix.name],
            "inside": None if band is None else band[0] <= norms[matrix.name] <= band[1],
        }
        for matrix in spectra.matrices
    ]
    table = Table("matrix", "shape", "σ₁", "w", "")
    for row in rows:
        mark = "outside" if row["inside"] is False else ""
        shape = "×".join(map(str, row["shape"]))
        table.add_row(row["name"], shape, f"{row['sigma']:.4g}", f"{row['norm']:.4g}", mark)
    console.print(table)
    line = f"reduced norms w from {min(norms.values()):.3g} to {max(norms.values()):.3g}"
    if band is not None:
        outside = sum(not row["inside"] for row in rows)
        line = f"{outside} of {len(rows)} matrices outside {band[0]:g} to {band[1]:g}; {line}"
    console.print(line, soft_wrap=True, highlight=False)
    if out is not None:
        write_json(out, {"band": band, "matrices": rows})
        console.print(f"figures: {out}", soft_wrap=True, highlight=False)
