"""Put the results of a run into README.md and the docs, and the evidence into its chapter.

python docs/render.py runs/picture
"""

import re
import shutil
import sys
from pathlib import Path

from sparing.compare.results import Results
from sparing.report import markdown_table, standing, write_gallery

ROOT = Path(__file__).resolve().parents[1]
MARKS = re.compile(r"(<!-- table -->\n).*?(<!-- /table -->)", re.DOTALL)


def main(run: Path) -> None:
    """Render one finished comparison and all records under evidence/."""
    results = Results.load(run / "results.json")
    images = ROOT / "docs" / "images"
    images.mkdir(exist_ok=True)
    shutil.copy(run / "overview.png", images / "overview.png")
    shutil.copy(run / "results.json", ROOT / "docs" / "results-smollm2.json")
    settings = results.settings
    table = (
        f"{standing(results)}\n\n{markdown_table(results)}\n"
        f"*{results.model['name']} on {results.data['name']}, {settings['steps']} steps of "
        f"{settings['batch_size'] * settings['block_length']} tokens, one learning rate of three "
        f"a method; {results.environment['device']}.*\n"
    )
    for page in (ROOT / "README.md", ROOT / "docs" / "gallery.md"):
        text = page.read_text(encoding="utf-8")
        page.write_text(MARKS.sub(lambda m: m[1] + "\n" + table + "\n" + m[2], text))
    write_gallery(ROOT / "evidence", ROOT / "docs")
    (ROOT / "docs" / "evidence.html").unlink()  # the chapter is enough; the page has plots besides


if __name__ == "__main__":
    main(Path(sys.argv[1]))
