"""Read a page as strictly as a browser would not: balanced tags, every picture with words, nothing from outside."""

from html.parser import HTMLParser
from typing import Any

from typing_extensions import override

VOID = {"meta", "link", "img", "br"}
LOADS = ("src", "href", "srcset", "action", "data", "poster", "xlink:href")


class Page(HTMLParser):
    """A parsed page; it complains of what is wrong with it."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == []
        ids = [attributes["id"] for _, attributes in self.tags if "id" in attributes]
        assert len(ids) == len(set(ids))
        for tag, attributes in self.tags:
            assert tag not in ("script", "iframe", "object", "embed", "base")
            assert not any(name.startswith("on") for name in attributes)
            for name in LOADS:
                if name in attributes:
                    assert str(attributes[name]).startswith(("data:", "#"))
                    assert not str(attributes[name]).startswith("#") or str(attributes[name])[1:] in ids
            for reference in str(attributes.get("aria-labelledby", "")).split():
                assert reference in ids
            if tag == "svg":
                assert attributes["role"] == "img"
                assert attributes["aria-labelledby"]
            if tag == "img":
                assert attributes["alt"]

    @override
    def handle_starttag(self, tag: str, attrs: Any) -> None:
        assert len(dict(attrs)) == len(attrs)
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    @override
    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))

    @override
    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    @override
    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        """The attributes of every element of a kind."""
        return [attributes for name, attributes in self.tags if name == tag]
