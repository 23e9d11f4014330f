"""A headless Chromium, driven by its own protocol; and what every page must hold for keyboards, readers and phones."""

import base64
import json
import shutil
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path

import pytest

PROGRAM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-extensions", "--disable-dev-shm-usage",
    "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream",
)  # fmt: skip
PHONE, DESKTOP = (360, 740), (1280, 900)


class Chromium:
    """One tab. `errors` are what its console complained of, `asked` the addresses that it asked for."""

    def __init__(self):
        if not PROGRAM:
            pytest.skip("no chromium on this machine (apt-get install chromium)")
        connect = pytest.importorskip("websockets.sync.client").connect
        self.folder = Path(tempfile.mkdtemp(prefix="chromium"))
        words = [PROGRAM, *FLAGS, f"--user-data-dir={self.folder}", "about:blank"]
        self.process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        port = self.folder / "DevToolsActivePort"
        end = time.monotonic() + 60
        while not port.exists() or not port.read_text().strip():
            assert time.monotonic() < end and self.process.poll() is None, "chromium does not start"
            time.sleep(0.05)
        with urllib.request.urlopen(f"http://127.0.0.1:{port.read_text().split()[0]}/json/list") as answer:
            target = next(one for one in json.load(answer) if one["type"] == "page")
        self.socket = connect(target["webSocketDebuggerUrl"], max_size=None, compression=None, proxy=None)
        self.number, self.errors, self.asked = 0, [], []
        for domain in ("Page", "Runtime", "Log", "Network", "Accessibility"):
            self.call(f"{domain}.enable")

    def close(self):
        self.socket.close()
        self.process.terminate()
        self.process.wait(20)
        shutil.rmtree(self.folder, ignore_errors=True)

    def call(self, method, **given):
        self.number += 1
        self.socket.send(json.dumps({"id": self.number, "method": method, "params": given}))
        wanted = self.number
        while True:
            found = json.loads(self.socket.recv(timeout=60))
            if found.get("id") == wanted:
                assert "error" not in found, found
                return found["result"]
            self._event(found.get("method"), found.get("params", {}))

    def _event(self, method, said):
        if method == "Page.javascriptDialogOpening":  # "Are you sure?" Yes.
            self.number += 1
            yes = {"id": self.number, "method": "Page.handleJavaScriptDialog", "params": {"accept": True}}
            self.socket.send(json.dumps(yes))
        elif method == "Runtime.exceptionThrown":
            self.errors.append(said["exceptionDetails"])
        elif method == "Runtime.consoleAPICalled" and said["type"] in ("error", "warning", "assert"):
            self.errors.append(said["args"])
        elif method == "Log.entryAdded" and said["entry"]["level"] in ("error", "warning"):
            self.errors.append(said["entry"])
        elif method == "Network.requestWillBeSent":
            self.asked.append(said["request"]["url"])

    def js(self, text):
        found = self.call("Runtime.evaluate", expression=text, returnByValue=True, awaitPromise=True, userGesture=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait(self, text, seconds=60):
        """Until the expression holds."""
        end = time.monotonic() + seconds
        while not self.js(text):
            assert time.monotonic() < end, f"{text} does not hold; the page says {self.js('document.body.innerText')!r}"
            time.sleep(0.03)

    def go(self, address, size=DESKTOP):
        self.errors.clear()
        self.asked.clear()
        width, height = size
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
                  mobile=size == PHONE)  # fmt: skip
        self.call("Page.navigate", url=str(address))
        self.wait(f"location.href.startsWith({json.dumps(str(address)[:40])}) && document.readyState === 'complete'")

    def key(self, name):
        code = {"Tab": 9, "Enter": 13}.get(name, ord(name[0].upper()))
        text = {"Tab": "", "Enter": "\r"}.get(name, name)
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=name, windowsVirtualKeyCode=code,
                      **({"text": text} if text and kind == "keyDown" else {}))  # fmt: skip

    def pdf(self):
        return base64.b64decode(self.call("Page.printToPDF")["data"])

    def unnamed(self):
        """Roles of what a person can act on or look at that a screen reader has no words for."""
        roles = {"button", "link", "textbox", "checkbox", "slider", "image", "img", "progressbar", "heading", "group_"}
        nodes = self.call("Accessibility.getFullAXTree")["nodes"]
        return [one["role"]["value"] for one in nodes
                if not one.get("ignored") and one.get("role", {}).get("value") in roles
                and not one.get("name", {}).get("value", "").strip()]  # fmt: skip


FAULTS = """(() => {
  const found = [], all = selector => [...document.querySelectorAll(selector)];
  const shown = one => one.checkVisibility();
  if (all("h1").length !== 1) found.push("not one h1");
  const levels = all("h1, h2, h3, h4").map(one => Number(one.tagName[1]));
  levels.forEach((level, i) => { if (level > (i ? levels[i - 1] : 0) + 1) found.push("a heading skips a level"); });
  if (all("main").length !== 1 || !document.documentElement.lang || !document.title) found.push("no main, lang, title");
  const skip = document.querySelector("a.skip");
  if (!skip || !document.querySelector(skip.getAttribute("href"))) found.push("no skip link");
  if (all("img:not([alt])").length) found.push("an image without alt");
  all("img").filter(shown).forEach(one => { if (!one.alt) found.push("an image that says nothing"); });
  if (all("th").some(one => !one.textContent.trim() || !one.scope)) found.push("a header cell of nothing");
  all("table").forEach(one => { if (!one.querySelector("th[scope=col]")) found.push("a table without headers"); });
  all("input").forEach(one => { if (!one.labels.length) found.push("an input without a label"); });
  const ids = all("[id]").map(one => one.id);
  if (new Set(ids).size < ids.length) found.push("an id twice");
  if (document.documentElement.scrollWidth > innerWidth) found.push("wider than the screen");
  const rgb = text => { const n = (text.match(/[\\d.]+/g) || []).map(Number);
    return [...n.slice(0, 3).map(x => text.startsWith("color(") ? 255 * x : x), n[3] ?? 1]; };
  const light = c => { const f = c.slice(0, 3).map(x => x / 255).map(x => x <= 0.03928 ? x / 12.92
    : ((x + 0.055) / 1.055) ** 2.4); return 0.2126 * f[0] + 0.7152 * f[1] + 0.0722 * f[2]; };
  all("body *").filter(shown).forEach(one => {
    const words = [...one.childNodes].filter(n => n.nodeType === 3 && n.data.trim()).length;
    if (!words || one.closest(":disabled, .skip, script, style")) return;
    const style = getComputedStyle(one), ink = rgb(one.closest("svg") ? style.fill : style.color);
    let back = one, ground = [0, 0, 0, 0];
    while (back && ground[3] === 0) { ground = rgb(getComputedStyle(back).backgroundColor); back = back.parentElement; }
    if (ground[3] === 0) ground = [255, 255, 255, 1];
    const [low, high] = [light(ink), light(ground)].sort((a, b) => a - b), ratio = (high + 0.05) / (low + 0.05);
    if (ratio < 4.5) found.push(`contrast ${ratio.toFixed(2)} of ${one.tagName}.${one.getAttribute("class")}`);
  });
  return [...new Set(found)];
})()"""


def check_page(chromium, address, network=()):
    """A page at phone and desktop width, light and dark: readable by all, silent, and asking for nothing but itself."""
    for size in (PHONE, DESKTOP):
        chromium.go(address, size)
        for scheme in ("light", "dark"):
            chromium.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
            found = chromium.js(FAULTS)
            assert found == [], (found, size, scheme)
        assert chromium.unnamed() == []
        assert chromium.errors == []
        own = (str(address), "data:", "blob:", *network)
        assert [url for url in chromium.asked if not url.startswith(own)] == []
    chromium.call("Emulation.setEmulatedMedia", features=[])
    chromium.js("scrollTo(0, 0); document.activeElement.blur()")
    chromium.key("Tab")  # the first stop is the skip link, and it can be seen
    assert chromium.js("document.activeElement.className") == "skip"
    assert chromium.js("document.activeElement.getBoundingClientRect().left >= 0")
    assert chromium.js("getComputedStyle(document.activeElement).outlineStyle") != "none"
    assert chromium.pdf()[:5] == b"%PDF-"
