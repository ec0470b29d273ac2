"""The site as a reader meets it: built strictly, opened in a headless browser."""

from __future__ import annotations

import functools
import http.server
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mkdocs", reason="the docs extra is not installed: pip install 'fastcl[docs]'")

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
QUIET = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
QUIET_BUILD = {"NO_MKDOCS_2_WARNING": "1"}  # the theme's note on its successor
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("site")]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Strict: a broken link, a missing name or a page outside the navigation ends it."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | QUIET_BUILD, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium that asks no other host."""
    webdriver = pytest.importorskip(
        "selenium.webdriver", reason="selenium is not installed: pip install 'fastcl[docs]'"
    )
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("no Chromium with its driver here (Debian: apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in QUIET:
        options.add_argument(flag)
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def until(found: Callable[[], Any], seconds: float = 20.0) -> Any:
    """What `found` answers once it is true, or its last answer."""
    end = time.monotonic() + seconds
    while not (answer := found()) and time.monotonic() < end:
        time.sleep(0.1)
    return answer


def test_every_formula_is_mathml(site: Path) -> None:
    texts = {path: path.read_text() for path in site.rglob("*.html")}
    assert "<math" in texts[site / "reference" / "functional.html"]
    assert [str(path) for path, text in texts.items() if 'class="arithmatex"' in text] == []


def test_notebooks_are_pages_with_pictures(site: Path) -> None:
    for notebook in (ROOT / "docs" / "notebooks").glob("*.ipynb"):
        page = (site / "notebooks" / f"{notebook.stem}.html").read_text()
        pictures = re.findall(rf'src="({notebook.stem}_[^"]+\.png)"', page)
        assert pictures and all((site / "notebooks" / picture).is_file() for picture in pictures)
        assert f'href="{notebook.name}"' in page and (site / "notebooks" / notebook.name).is_file()
        assert notebook.stat().st_size < 100_000  # it is kept with what it printed and drew


def test_search_finds_a_loss(address: str, browser: Any) -> None:
    browser.get(f"{address}/index.html?q=nt_xent")
    ask = "return [...document.querySelectorAll('.md-search-result__link')].map(a => a.getAttribute('href')).join(' ')"
    assert "fastcl.functional.nt_xent" in until(lambda: browser.execute_script(ask))


def test_formulas_render(address: str, browser: Any) -> None:
    """A fraction of MathML is higher than a line of text, where the browser lays it out at all."""
    browser.get(f"{address}/reference/functional.html")
    heights = browser.execute_script(
        "return [...document.querySelectorAll('mfrac')].map(e => e.getBoundingClientRect().height)"
    )
    assert sum(height > 22 for height in heights) > 20


@pytest.mark.parametrize(
    "path",
    [
        "index.html",
        "reference/functional.html",
        "benchmarks.html",
        "papers.html",
        "guides/how.html",
        "notebooks/uniformity.html",
    ],
)
def test_pages_fit_a_narrow_window(address: str, browser: Any, path: str) -> None:
    narrow = {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", narrow)
    try:
        browser.get(f"{address}/{path}")
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 360
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
