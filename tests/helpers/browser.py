# SPDX-License-Identifier: Apache-2.0
"""A headless Chromium that is installed, and what it says of a page."""

import shutil
from contextlib import contextmanager
from dataclasses import dataclass, field

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PATIENCE = 120_000  # milliseconds: on a machine that is busy a page of ten charts takes a while


def path():
    """Of the browser; None: there is none."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


@contextmanager
def started():
    """The browser, driven by Playwright."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path(), args=["--no-sandbox"])  # tests run as root, too
        yield browser
        browser.close()


@dataclass
class Seen:
    """A page that is open. errors: of its scripts, and refusals of the browser. requests: addresses it asked for."""

    page: object = None
    errors: list = field(default_factory=list)
    requests: list = field(default_factory=list)

    @property
    def overflow(self):
        """By how many pixels the page is wider than the window."""
        return self.page.evaluate("document.documentElement.scrollWidth - innerWidth")

    def text(self):
        return self.page.evaluate("document.body.innerText")


@contextmanager
def shown(browser, file, width=1280, height=900, wait_for="html.drawn", **options):
    """Open a file: a page, its errors and its requests."""
    context = browser.new_context(viewport={"width": width, "height": height}, **options)
    seen = Seen(context.new_page())
    seen.page.set_default_timeout(PATIENCE)
    seen.page.on("pageerror", lambda error: seen.errors.append(str(error)))
    seen.page.on("console", lambda said: seen.errors.append(said.text) if said.type in ("error", "warning") else None)
    seen.page.on("request", lambda request: seen.requests.append(request.url))
    seen.page.goto(file.as_uri())
    if wait_for:
        seen.page.wait_for_selector(wait_for, state="attached")
    yield seen
    context.close()
