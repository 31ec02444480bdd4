"""A headless Chromium, spoken to in its DevTools protocol through two pipes: no driver, no port, no library."""

import base64
import fcntl
import json
import os
import re
import select
import subprocess
import time

PATIENCE_S = 60
UNITS = {"%": 0.01, "kB": 1e3, "MB": 1e6, "GB": 1e9}
EVENTS = ("Page", "Runtime", "Log", "Network")


class Browser:
    """One page in one browser.

    Attributes:
        complaints: What the page or the browser wrote to the console, and exceptions that nobody caught.
        requests: Addresses that anything was asked from, the page's own among them.
    """

    def __init__(self, program, folder):
        self.complaints, self.requests = [], []
        self._last, self._rest, self._loaded = 0, b"", False
        take, self._write = os.pipe()
        self._read, give = os.pipe()
        # Moved out of the way: either may be 3 or 4, where Chromium expects the other.
        theirs = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (take, give)]
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe"]
        options += [f"--user-data-dir={folder}", "--no-first-run"]
        self._process = subprocess.Popen(
            ["bash", "-c", f'exec "$0" "$@" 3<&{theirs[0]} 4>&{theirs[1]}', program, *options, "about:blank"],
            pass_fds=theirs,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for end in (take, give, *theirs):
            os.close(end)
        self._session = None
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self._session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in EVENTS:
            self(f"{domain}.enable")

    def __call__(self, method, **parameters):
        """Call a method of the protocol; its result."""
        self._last += 1
        message = {"id": self._last, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._last:
            self._note(answer)
        assert "error" not in answer, (method, answer["error"])
        return answer["result"]

    def _next(self):
        end = time.monotonic() + PATIENCE_S
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._read], [], [], max(0.0, end - time.monotonic()))
            part = os.read(self._read, 1 << 20) if ready else b""
            assert part, "Chromium says nothing more"
            self._rest += part
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def _note(self, event):
        name, what = event.get("method"), event.get("params", {})
        if name in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"):
            self.complaints.append(what)
        elif name == "Network.requestWillBeSent":
            self.requests.append(what["request"]["url"])
        elif name == "Page.loadEventFired":
            self._loaded = True

    def open(self, url, width=1280, height=900, *, dark=False, scripted=True):
        """Show a page and wait until it is there."""
        self.complaints, self.requests, self._loaded = [], [], False
        self("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self("Emulation.setEmulatedMedia", features=[scheme])
        self("Emulation.setScriptExecutionDisabled", value=not scripted)
        self("Page.navigate", url=url)
        while not self._loaded:
            self._note(self._next())
        if scripted:
            self.run("new Promise((done) => requestAnimationFrame(() => setTimeout(done, 50)))")

    def run(self, script):
        """What an expression gives in the page."""
        found = self("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def press(self, key, text=None):
        """Press a key and let it go."""
        codes = {"Tab": 9, "Enter": 13, " ": 32, "ArrowDown": 40}
        about = {"key": key, "code": key, "windowsVirtualKeyCode": codes.get(key, 0)}
        text = {"Enter": "\r", " ": " "}.get(key, text)
        self("Input.dispatchKeyEvent", type="keyDown", **about, **({"text": text} if text else {}))
        self("Input.dispatchKeyEvent", type="keyUp", **about)

    def type(self, text):
        """Write a text where the focus is."""
        self("Input.insertText", text=text)

    def picture(self, path, *, whole=True):
        """Save what is shown as a PNG."""
        found = self("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(found["data"]))

    def close(self):
        """End the browser."""
        self._session = None
        os.write(self._write, json.dumps({"id": 0, "method": "Browser.close", "params": {}}).encode() + b"\0")
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._write)
        os.close(self._read)


def shown_figures(browser):
    """Every figure of a page: where it stands in the report, its exact value there, and what is shown."""
    each = "[...document.querySelectorAll('[data-path]')].map((e) => [e.dataset.path, e.value, e.textContent])"
    return browser.run(each)


def wrong(document, path, value, text):
    """How a figure departs from its field of the document; None if it does not, but for the digits left out."""
    exact = _at(document, path)
    if json.loads(value) != exact:
        return f"{path} is {exact}, not {value}"
    figures, read = exact if isinstance(exact, list) else [exact], _numbers(text)
    if len(read) == len(figures) and all(abs(n - f) <= half for (n, half), f in zip(read, figures, strict=True)):
        return None
    return f"{path} is {exact}, shown as {text}"


def _at(document, path):
    for key in path.split("/"):
        document = document[int(key) if isinstance(document, list) else key]
    return document


def _numbers(text):
    """The numbers of a text, in their unit, each with half of its last digit."""
    unit = next((factor for name, factor in UNITS.items() if text.endswith(name)), 1.0)
    found = []
    for each in re.findall(r"[-+]?\d[\d,]*\.?\d*(?:e[-+]\d+)?", text):
        mantissa, _, exponent = each.replace(",", "").partition("e")
        last = 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
        found.append((float(each.replace(",", "")) * unit, 0.501 * last * unit))
    return found
