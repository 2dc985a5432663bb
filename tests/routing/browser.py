"""A page in headless Chromium, as Debian packages it: what it shows, what it says on its console, what it asks for."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from html.parser import HTMLParser
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pathlib import Path

PROBE = "<script>document.body.append(Object.assign(document.createElement('pre'),{id:'probe',textContent:"

REQUESTED = "performance.getEntriesByType('resource').map((entry) => entry.name)"


@dataclass(frozen=True)
class Visit:
    """What came of opening a page.

    Attributes:
        found: what the probe's expression gave, after the page's own script.
        console: every line on the console, and every exception.
        requested: every address that the page asked for.
    """

    found: Any
    console: list[str]
    requested: list[str]


def visit(folder: Path, page: str, expression: str, *, dark: bool = False) -> Visit:
    """Opens a page and evaluates an expression in it; the test is skipped where there is no Chromium."""
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        pytest.skip("no chromium on this machine; Debian has it as a package of that name")
    probe = (
        f"{PROBE}JSON.stringify({{found: (() => {{ {expression} }})(), requested: {REQUESTED}}})}}))</script></body>"
    )
    file = folder / "page.html"
    file.write_text(page.replace("</body>", probe), "utf-8")
    flags = ["--headless=new", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    flags += [f"--user-data-dir={folder / 'profile'}", "--enable-logging=stderr"]
    flags += ["--no-first-run", "--no-sandbox"] if os.geteuid() == 0 else ["--no-first-run"]
    flags += [f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--dump-dom", file.as_uri()]
    done = subprocess.run([program, *flags], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    shown = json.loads(_probe(done.stdout))
    return Visit(shown["found"], console, shown["requested"])


def _probe(dom: str) -> str:
    """Returns the text of the probe's element."""

    class Finder(HTMLParser):
        inside, text = False, ""

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.inside = ("id", "probe") in attrs

        def handle_data(self, data: str) -> None:
            self.text += data if self.inside else ""

        def handle_endtag(self, tag: str) -> None:
            self.inside = False

    finder = Finder()
    finder.feed(dom)
    return finder.text
