"""A headless Chromium, driven through its DevTools protocol by pipe: no package, no port."""

import base64
import json
import os
import shutil
import subprocess
import time

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Browser:
    """One tab. `errors` holds what the console said of errors. Source: chromedevtools.github.io/devtools-protocol."""

    def __init__(self, profile):
        (read, its_write), (its_read, write) = os.pipe(), os.pipe()
        command = ["bash", "-c", f'exec "$@" 3<&{its_read} 4>&{its_write}', "bash", CHROMIUM, "--headless", "--no-sandbox",
                   "--disable-gpu", "--remote-debugging-pipe", f"--user-data-dir={profile}"]
        self.process = subprocess.Popen(command, pass_fds=(its_read, its_write), stdout=subprocess.DEVNULL,
                                        stderr=subprocess.DEVNULL)
        os.close(its_read)
        os.close(its_write)
        self.read, self.write, self.rest, self.number, self.session, self.errors = read, write, b"", 0, {}, []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = {"sessionId": self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "DOM"):
            self.call(f"{domain}.enable")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        os.close(self.read)
        os.close(self.write)

    def receive(self):
        while b"\0" not in self.rest:
            part = os.read(self.read, 2**20)
            assert part, "Chromium is gone"
            self.rest += part
        message, _, self.rest = self.rest.partition(b"\0")
        return json.loads(message)

    def call(self, method, **parameters):
        self.number += 1
        call = {"id": self.number, "method": method, "params": parameters, **self.session}
        os.write(self.write, json.dumps(call).encode() + b"\0")
        while True:
            message = self.receive()
            said = message.get("params", {})
            if (message.get("method") == "Runtime.exceptionThrown" or said.get("type") == "error"
                    or said.get("entry", {}).get("level") == "error"):
                self.errors.append(json.dumps(said))
            if message.get("id") == self.number:
                assert "error" not in message, message
                return message["result"]

    def run(self, expression):
        """The value of a JavaScript expression, a promise's once it is there."""
        done = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def wait(self, expression, seconds=60):
        end = time.time() + seconds
        while not self.run(expression):
            assert time.time() < end, expression
            time.sleep(0.05)

    def open(self, address):
        self.call("Page.navigate", url=address)
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def size(self, width, height=900, dark=False):
        """Lay out at a width. Returns by how many pixels the page is wider than that."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        return self.run("document.documentElement.scrollWidth - document.documentElement.clientWidth")

    def key(self, key):
        """Press Tab, Enter or the space bar."""
        code, text = {"Tab": (9, ""), "Enter": (13, "\r"), " ": (32, " ")}[key]
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, text=text, windowsVirtualKeyCode=code)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=code)

    def give(self, selector, *files):
        """Choose files in a file input."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", files=[str(file) for file in files], nodeId=node)

    def picture(self, path):
        """Screenshot as a PNG file."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))
