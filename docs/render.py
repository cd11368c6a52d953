"""Put the results of runs into README.md and the docs, and the evidence into its chapter.

python docs/render.py runs/demo runs/all-small runs/all-large

The first run is the one of README.md. The others go into docs/gallery.md, each between the marks
that bear its folder's name.
"""

import re
import shutil
import sys
from pathlib import Path

from sparing.compare.results import Results
from sparing.report import markdown_table, standing, write_gallery

ROOT = Path(__file__).resolve().parents[1]
GALLERY = ROOT / "docs" / "gallery.md"


def main(demo: Path, *others: Path) -> None:
    """Render finished comparisons and all records under evidence/."""
    for run, name in ((demo, "smollm2"), *((other, other.name) for other in others)):
        results = Results.load(run / "results.json")
        images = ROOT / "docs" / "images"
        images.mkdir(exist_ok=True)
        picture = "overview.png" if run == demo else f"{name}.png"
        shutil.copy(run / "overview.png", images / picture)
        shutil.copy(run / "results.json", ROOT / "docs" / f"results-{name}.json")
        mark = "table" if run == demo else f"table {name}"
        for page in (ROOT / "README.md", GALLERY) if run == demo else (GALLERY,):
            fill(page, mark, table(results))
    write_gallery(ROOT / "evidence", ROOT / "docs")
    (ROOT / "docs" / "evidence.html").unlink()  # the chapter is enough; the page has plots besides


def table(results: Results) -> str:
    """Who stands where, the table, and what was run."""
    settings = results.settings
    return (
        f"{standing(results)}\n\n{markdown_table(results)}\n"
        f"*{results.model['name']} on {results.data['name']}, {settings['steps']} steps of "
        f"{settings['batch_size'] * settings['block_length']} tokens, one learning rate of three "
        f"a method; {results.environment['device']}.*\n"
    )


def fill(page: Path, mark: str, content: str) -> None:
    """Replace what stands between `<!-- mark -->` and `<!-- /mark -->`."""
    marks = re.compile(rf"(<!-- {mark} -->\n).*?(<!-- /{mark} -->)", re.DOTALL)
    text = page.read_text(encoding="utf-8")
    page.write_text(marks.sub(lambda m: f"{m[1]}\n{content}\n{m[2]}", text), encoding="utf-8")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
