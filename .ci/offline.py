"""What a built page loads: everything has to come with the site, so that it can be read without a network."""

import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

# The attributes through which an element loads something by itself. A link that a reader may follow is not one.
LOADING = {
    "script": ("src",),
    "link": ("href",),
    "img": ("src", "srcset"),
    "source": ("src", "srcset"),
    "iframe": ("src",),
    "object": ("data",),
    "embed": ("src",),
    "video": ("src", "poster"),
    "audio": ("src",),
    "track": ("src",),
    "use": ("href", "xlink:href"),
    "image": ("href", "xlink:href"),
}
NAMES_ONLY = {"canonical", "prev", "next", "alternate", "edit", "author", "license"}  # <link rel=…> that loads nothing
IN_CSS = re.compile(r"""(?:@import\s+|url\()\s*["']?((?:[a-z]+:)?//[^"')\s]+)""", re.IGNORECASE)
IN_SCRIPT = re.compile(r"""\b(?:import\s*\(?|from|fetch\s*\()\s*["'`]((?:https?:)?//[^"'`]+)""")


class _Loads(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.inside = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.inside = tag if tag in ("style", "script") else ""
        self.found += IN_CSS.findall(values.get("style", ""))
        if tag == "link" and set(values.get("rel", "").split()) <= NAMES_ONLY:
            return
        for name in LOADING.get(tag, ()):
            if name in values:
                parts = values[name].split(",") if name == "srcset" else [values[name]]
                self.found += [part.split()[0] if part.split() else "" for part in parts]

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.found += (IN_CSS if self.inside == "style" else IN_SCRIPT).findall(data)


def loads(html: str) -> list[str]:
    """Everything that this page loads, as it is written there."""
    page = _Loads()
    page.feed(html)
    return [address for address in page.found if not address.startswith(("data:", "#"))]


def faults(site: Path) -> list[str]:
    """One line for everything that a page or a style sheet in this folder loads and that is not in the folder."""
    lines = []
    for page in sorted(site.rglob("*.html")):
        for address in loads(page.read_text()):
            parts = urlsplit(address)
            # 404.html is served for any address, so its own are absolute; elsewhere they would fail from a disk.
            rooted = page == site / "404.html" and address.startswith("/")
            if parts.scheme or parts.netloc:
                lines.append(f"{page.relative_to(site)} loads {address} from elsewhere")
            elif not rooted and address.startswith("/"):
                lines.append(f"{page.relative_to(site)} loads {address} by an absolute path")
            elif not parts.path or not ((site if rooted else page.parent) / unquote(parts.path).lstrip("/")).is_file():
                lines.append(f"{page.relative_to(site)} loads {address!r}, which is not there")
    for sheet in sorted(site.rglob("*.css")):
        lines += [f"{sheet.relative_to(site)} loads {address}" for address in IN_CSS.findall(sheet.read_text())]
    return lines
