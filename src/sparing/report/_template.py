"""Pages from the templates in this folder; every value is escaped unless it is ours."""

from pathlib import Path
from typing import Any

import jinja2

FOLDER = Path(__file__).parent


def render(template: str, **values: Any) -> str:
    """The text of a page. A value that the template needs and does not get is an error."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values) + "\n"
