"""The page in a real browser, where there is one."""

import re
from collections.abc import Callable

import pytest

from mode_gguf.pipeline import run_report
from mode_gguf.workfolder import WorkFolder
from tests.report import chromium
from tests.report.pages import SECTIONS

pytestmark = pytest.mark.skipif(chromium.PROGRAM is None, reason="there is no Chromium here")


@pytest.mark.parametrize("name", ["drawn", "grouped"])
@pytest.mark.parametrize(("width", "dark"), [(390, True), (1200, False)])
def test_page_in_a_browser(
    name: str, width: int, dark: bool, copied: Callable[[WorkFolder], WorkFolder], request: pytest.FixtureRequest
) -> None:
    folder = copied(request.getfixturevalue(name))
    page = run_report(folder.path)
    with chromium.opened(page, folder.path / "profile", width=width, dark=dark) as tab:
        assert tab.evaluate("innerWidth") == width
        assert tab.evaluate("document.documentElement.scrollWidth") <= width, "the page scrolls sideways"
        assert tab.evaluate("[...document.querySelectorAll('section')].map(one => one.id)") == list(SECTIONS)
        assert tab.evaluate("[...document.images].every(one => one.complete && one.naturalWidth > 0)")
        assert tab.evaluate("document.images.length") == 8
        ground = tab.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (max(map(int, re.findall(r"\d+", ground))) < 64) == dark
        requests = [
            event["params"]["request"]["url"]
            for event in tab.events
            if event.get("method") == "Network.requestWillBeSent"
        ]
        said = [event for event in tab.events if event.get("method") in ("Log.entryAdded", "Runtime.consoleAPICalled")]
    assert [url for url in requests if not url.startswith("data:")] == [page.as_uri()]
    assert said == []
