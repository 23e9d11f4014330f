"""docs/serve.md, as a reader would follow it: its server, its clients, its curl."""

import json
import re
import shlex
import subprocess
import threading
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from burnish.cli.main import main

pytest.importorskip("msgpack")
pytest.importorskip("websockets")

from bench.runtime_serve import OPENPI  # noqa: E402
from burnish.runtime.client import PolicyClient  # noqa: E402
from burnish.runtime.serve import run  # noqa: E402

PAGE = (Path(__file__).parents[2] / "docs/serve.md").read_text()
FENCE = re.compile(r"^(?:<!-- test: (\w+) -->\n)?```(\w+)\n(.*?)^```$", re.M | re.S)
BLOCKS = FENCE.findall(PAGE)


def block(mark):
    (body,) = [body for found, _, body in BLOCKS if found == mark]
    return body


def serving(start):
    """The words of the page's command that begins with `start`."""
    (line,) = [one for _, kind, body in BLOCKS if kind == "bash" for one in body.splitlines() if one.startswith(start)]
    return shlex.split(line)[1:]


@pytest.fixture
def server(monkeypatch):
    """Run a command of the page with the shipped base; the port that it took."""
    running = []

    def start(words):
        ready, known, status = threading.Event(), [], []
        real = run.serve_policy

        def serve_policy(policy, options, *, device, ready, **more):
            more["ready"] = lambda *found: (ready(*found), known.extend(found), event.set())
            real(policy, options, device=device, **more)

        event = ready
        monkeypatch.setattr(run, "serve_policy", serve_policy)
        words = [*words[:2], "small", *words[3:], "--port", "0", "--device", "cpu"]
        thread = threading.Thread(target=lambda: (status.append(main(words)), event.set()))
        thread.start()
        assert ready.wait(60) and not status, status
        running.append((thread, known[2], status))
        return known[1]

    yield start
    for thread, stop, status in running:
        stop()
        thread.join(20)
        assert status == [0]


def test_the_page_from_server_to_client(server, capfd):
    port = server(serving("burnish policy serve runs/tabletop/quickstart/policy"))
    found: dict = {}
    exec(compile(block("served").replace("8000", str(port)), "serve.md", "exec"), found)
    assert found["actions"].shape == (found["about"]["action_horizon"], found["about"]["action_dim"])
    found["client"].close()
    for line in block("curl").splitlines():
        command, quiet, address = shlex.split(line)
        assert (command, quiet) == ("curl", "-s")
        with urllib.request.urlopen(address.replace("8000", str(port))) as reply:  # noqa: S310
            text = reply.read().decode()
        assert reply.status == 200 and text
        if address.endswith("stats"):
            assert json.loads(text)["requests"]["ok"] == 1
    assert f"policy on ws://127.0.0.1:{port}" in capfd.readouterr().out


@pytest.mark.skipif(not Path(OPENPI).exists(), reason=f"no {OPENPI}, a Python with openpi-client: scripts/setup.sh")
def test_the_block_for_openpi_client(server):
    from serve_fakes import Seen, served

    with served(Seen(), profile=serving("burnish policy serve runs/libero/policy --profile")[-1]) as one:
        code = block("openpi").replace("8000", str(one.port)) + "print(actions.shape)"
        ran = subprocess.run([OPENPI, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert ran.stdout.strip() == "(4, 7)", ran.stderr[-1000:]


def test_the_block_that_shows_what_arrived(tmp_path, monkeypatch, capsys):
    from serve_fakes import Seen, served

    monkeypatch.chdir(tmp_path)
    with served(Seen(("top",), 2), record="calls") as one, PolicyClient(one.address) as client:
        picture = np.full((8, 8, 3), 200, np.uint8)
        client.infer({"observation.images.top": picture, "observation.state": np.array([1.0, 2.0]), "task": "lift"})
    exec(compile(block("recorded"), "serve.md", "exec"), {})
    assert "0 'lift' [1. 2.]" in capsys.readouterr().out and (np.asarray(Image.open("top.png")) == 200).all()


@pytest.mark.parametrize(("words", "said"), [
    (["--protocol", "vla-eval", "--exact"], "--protocol openpi"), (["--n-action-steps", "3"], "--protocol vla-eval"),
    (["--host", "0.0.0.0"], "secrets.token_urlsafe"), (["--token-file", "none"], "> none"),  # noqa: S104
    (["--port", "70000"], "port is 70000"), (["--cameras", "a", "b", "c"], "cameras a, b, c for a policy"),
    (["--map", "none.yaml"], "none.yaml"),
])  # fmt: skip
def test_what_the_command_refuses(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["policy", "serve", "small", "--port", "0", "--device", "cpu", *words]) == 2
    assert said in capsys.readouterr().err


def test_limits_of_the_page_are_those_of_the_options():
    options = run.ServeOptions()
    for name in ("max_mb", "rate", "clients", "record_mb"):
        assert f"| `--{name.replace('_', '-')}` {getattr(options, name)} |" in PAGE
