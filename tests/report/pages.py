"""Reads a page as browsers do, and notes what is wrong with it."""

from html.parser import HTMLParser

VOID = {"meta", "link", "img", "br", "input", "hr"}
SELF_CLOSING = {"line", "circle", "path", "polyline", "rect"}
LOADS = {"src", "href", "srcset", "poster", "data", "action", "xlink:href"}
SECTIONS = (
    *("warnings", "quality", "answers", "size", "frontier", "types"),
    *("routing", "coverage", "sensitivity", "timings", "command", "words"),
)


class Page(HTMLParser):
    """Tags, attributes and text; `faults` has tags that are not closed in order, and attributes given twice."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.faults: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.section = ""
        self.feed(source)
        self.close()
        self.faults += [f"<{tag}> is not closed" for tag in self.open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append((tag, found))
        if len(found) < len(attrs):
            self.faults.append(f"<{tag}> has an attribute twice")
        if tag == "section":
            self.section = str(found.get("id"))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in SELF_CLOSING:
            self.faults.append(f"<{tag}/> closes itself")

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.faults.append(f"</{tag}> closes something else")

    def handle_data(self, data: str) -> None:
        self.texts.setdefault(self.section, []).append(data)

    def text(self, section: str) -> str:
        """The words of a section, with single spaces."""
        return " ".join(" ".join(self.texts.get(section, [])).split())

    @property
    def ids(self) -> list[str]:
        return [str(attributes["id"]) for _, attributes in self.tags if "id" in attributes]

    @property
    def loaded(self) -> list[str]:
        """Everything that a browser would fetch or lead to."""
        return [str(value) for _, found in self.tags for name, value in found.items() if name in LOADS]
