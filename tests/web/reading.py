"""A page as a browser reads it: tables, text, what it would load."""

import json
from html.parser import HTMLParser
from typing import Any

LOADS = {"src", "srcset", "href", "data", "action", "poster", "background"}


class Page(HTMLParser):
    """addresses: what attributes would fetch. tables: by id or heading, rows of cells (text, data-value). figures: the
    JSON of the plots. tags: how often each tag was opened."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.addresses: list[str] = []
        self.tables: list[list[list[tuple[str, float | None]]]] = []
        self.ids: set[str] = set()
        self.tags: dict[str, int] = {}
        self.text = ""
        self._script: list[str] | None = None
        self._in_cell = False
        self.scripts: list[str] = []
        self.attributes: list[dict[str, str | None]] = []
        self.feed(text)
        self.close()

    @property
    def figures(self) -> dict[str, Any]:
        return dict(json.loads(self.scripts[0]))

    def table(self, first_heading: str, second: str = "") -> list[list[tuple[str, float | None]]]:
        """The first table whose headings begin so, headings included."""
        found = (t for t in self.tables if [cell[0] for cell in t[0]][: 2 if second else 1] == [
            heading for heading in (first_heading, second) if heading])  # fmt: skip
        return next(found)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.attributes.append(given)
        self.tags[tag] = self.tags.get(tag, 0) + 1
        self.ids |= {given["id"] or ""} if "id" in given else set()
        self.addresses += [
            value for key, value in attrs if key in LOADS and value is not None and not value.startswith("#")
        ]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in {"td", "th"}:
            value = given.get("data-value")
            self.tables[-1][-1].append(("", None if value is None else float(value)))
            self._in_cell = True
        elif tag == "small":
            self._add(" | ")
        elif tag in {"script", "style"}:
            self._script = []

    def handle_endtag(self, tag: str) -> None:
        if tag in {"script", "style"}:
            assert self._script is not None
            self.scripts += ["".join(self._script)] if tag == "script" else []
            self._script = None
        if tag in {"td", "th"}:
            self._in_cell = False

    def handle_data(self, data: str) -> None:
        if self._script is not None:
            self._script.append(data)
        else:
            self.text += data
            self._add(data)

    def _add(self, data: str) -> None:
        if self._in_cell:
            text, value = self.tables[-1][-1][-1]
            self.tables[-1][-1][-1] = (text + data.strip("\n"), value)
