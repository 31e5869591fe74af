"""A program that opens pages in Qt WebEngine: jobs as JSON on stdin, what was seen on stdout."""

# mypy: disable-error-code="import-not-found, misc"

from __future__ import annotations

import json
import sys
from typing import Any

from PySide6.QtCore import QEventLoop, QTimer, QUrl
from PySide6.QtWebEngineCore import (
    QWebEnginePage,
    QWebEngineProfile,
    QWebEngineScript,
    QWebEngineSettings,
    QWebEngineUrlRequestInterceptor,
)
from PySide6.QtWebEngineWidgets import QWebEngineView
from PySide6.QtWidgets import QApplication


class Requests(QWebEngineUrlRequestInterceptor):
    """Notes every address that is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def interceptRequest(self, request: Any) -> None:
        self.found.append(request.requestUrl().toString())


class Page(QWebEnginePage):
    """Notes what a page says."""

    said: list[str]

    def javaScriptConsoleMessage(self, level: Any, message: str, line: int, source: str) -> None:
        self.said.append(message)

    def javaScriptAlert(self, origin: Any, message: str) -> None:
        self.said.append(f"dialog {message}")


def look(job: list[Any], measure: str, height: int) -> dict[str, Any]:
    path, scripts, width = job
    profile, requests = QWebEngineProfile(), Requests()
    profile.setUrlRequestInterceptor(requests)
    page, view, loop = Page(profile), QWebEngineView(), QEventLoop()
    page.said = []
    page.settings().setAttribute(QWebEngineSettings.WebAttribute.JavascriptEnabled, scripts)
    # What a web server's page may do; files may not by themselves.
    remote = QWebEngineSettings.WebAttribute.LocalContentCanAccessRemoteUrls
    page.settings().setAttribute(remote, True)
    view.setPage(page)
    view.resize(width, height)
    view.show()
    found: list[str] = []

    def measured(value: Any) -> None:
        found.append(value)
        loop.quit()

    world = QWebEngineScript.ScriptWorldId.ApplicationWorld.value
    # A moment later: the size of the window reaches the page after it has loaded.
    page.loadFinished.connect(
        lambda _: QTimer.singleShot(300, lambda: page.runJavaScript(measure, world, measured))
    )
    page.load(QUrl.fromLocalFile(path))
    loop.exec()
    view.close()
    view.setPage(None)
    page.deleteLater()
    text = found[0]
    return {"requests": requests.found, "said": page.said, "measured": json.loads(text)}


if __name__ == "__main__":
    given = json.loads(sys.stdin.read())
    application = QApplication(sys.argv)
    seen = [look(job, given["measure"], given["height"]) for job in given["jobs"]]
    print(json.dumps(seen), flush=True)
