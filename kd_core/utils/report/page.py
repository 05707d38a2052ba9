"""One self-contained HTML page from sections of text, tables and figures: nothing in it is loaded from elsewhere."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path

from kd_core.utils.files import write_text
from kd_core.utils.report.tables import Number, Table


@dataclass(frozen=True)
class Figure:
    """A picture: the bytes of a file of type `kind`, image/svg+xml or image/jpeg."""

    title: str
    content: bytes
    kind: str
    alt: str
    caption: str = ""

    @property
    def uri(self) -> str:
        """The picture as an address that needs no network."""
        return f"data:{self.kind};base64,{base64.b64encode(self.content).decode()}"


@dataclass
class Gallery:
    """Figures side by side as far as the page is wide.

    Attributes:
        title: the heading above them.
        wide: for photographs: fewer in a row.
    """

    figures: list[Figure]
    title: str = ""
    wide: bool = False


@dataclass(frozen=True)
class Facts:
    """Names and values, one under the other."""

    title: str
    entries: dict[str, str]


@dataclass
class Section:
    """A heading, sentences, and what follows them."""

    title: str
    text: list[str] = field(default_factory=list)
    blocks: list[Table | Gallery | Facts] = field(default_factory=list)


@dataclass(frozen=True)
class Page:
    """A report.

    Attributes:
        notes: what a reader must know first: a run is unfinished, nothing was detected.
    """

    title: str
    sections: Sequence[Section]
    notes: Sequence[str] = ()

    def photographs(self) -> dict[str, Figure]:
        """The pictures of detections, by the names of image and model."""
        galleries = [block for section in self.sections for block in section.blocks if isinstance(block, Gallery)]
        return {f"{each.title}/{one.title}": one for each in galleries if each.wide for one in each.figures}

    def render(self, reload_seconds: int = 0) -> str:
        """The HTML; with `reload_seconds` the browser loads it anew so often: the training is still running."""
        from jinja2 import Environment, StrictUndefined

        environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
        environment.tests["number"] = lambda cell: isinstance(cell, Number)
        environment.tests["table"] = lambda block: isinstance(block, Table)
        environment.tests["gallery"] = lambda block: isinstance(block, Gallery)
        template = environment.from_string(files(__package__).joinpath("page.html").read_text(encoding="utf-8"))
        made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
        return template.render(page=self, reload_seconds=reload_seconds, made=made)

    def write(self, path: str | Path, reload_seconds: int = 0) -> None:
        """Write it whole or not at all: a browser that reloads sees the old page or the new one."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_text(path, self.render(reload_seconds))
