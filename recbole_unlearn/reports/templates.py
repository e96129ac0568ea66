"""The pages' templates; what is put into them is escaped unless it is markup already."""

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

FOLDER = Path(__file__).parent
ENVIRONMENT = Environment(
    loader=FileSystemLoader(FOLDER), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
)


def render(name: str, **values: object) -> str:
    """A page of the template ``name``."""
    return ENVIRONMENT.get_template(name).render(values)
