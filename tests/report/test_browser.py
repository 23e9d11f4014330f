"""Pages in a real browser: a trial from the first try to the report, through a kill; every kind of page."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from chromium import PHONE, Chromium, check_page
from PIL import Image

from burnish.data.inspect import inspect_dataset
from burnish.evaluate.sequential import sequential
from burnish.evaluate.trial import drawn
from burnish.experiments.pages import write_study_page
from burnish.report.comparison import write_comparison
from burnish.report.inspection import as_html
from burnish.report.page import write_report


@pytest.fixture(scope="module")
def chromium():
    made = Chromium()
    yield made
    made.close()


def begin(folder, photos):
    """The command in a process of its own, and the address that it prints."""
    words = ["trial", "walnut", "hazel", "--trials", "30", "--margin", "0.1", "--states", photos, "--output", folder]
    process = subprocess.Popen([sys.executable, "-m", "burnish.cli.main", *map(str, words)], stdout=subprocess.PIPE,
                               text=True, cwd=folder.parent)  # fmt: skip
    line = process.stdout.readline()
    return process, re.fullmatch(r"judge on (http://127\.0\.0\.1:\d+/\S+/)\n", line)[1]


ROOT = Path(__file__).parents[2]
READY, RUNS = ("!document.getElementById('start').disabled", "!document.getElementById('kinds').disabled")


def enter(chromium, wins, made, mouse=False):
    """Start the present try and enter its outcome, which is the `made`-th that counts."""
    chromium.key("g")
    chromium.wait(RUNS)
    key = "s" if wins else "3"  # "dropped"
    chromium.js(f"document.querySelector('[data-key=\"{key}\"]').click()") if mouse else chromium.key(key)
    chromium.wait(f"document.getElementById('progress').value === {made} && {READY}")


def test_a_trial_played_through_with_a_kill_and_a_stop_by_the_sequential_rule(chromium, tmp_path):
    (tmp_path / "photos").mkdir()
    for name, colour in (("left", "red"), ("right", "blue")):
        Image.new("RGB", (64, 48), colour).save(tmp_path / f"photos/{name}.png")
        (tmp_path / f"photos/{name}.json").write_text(json.dumps({"instruction": f"lift the {colour} cube"}))
    folder, made = tmp_path / "trial", 0
    process, address = begin(folder, tmp_path / "photos")
    try:
        check_page(chromium, address)
        chromium.go(address, PHONE)
        chromium.wait(READY)
        seed = json.loads((folder / "settings.json").read_text())["seed"]
        while not made or made % 2 or not sequential(np.ones(made // 2), 0.1).decided:
            pair, second = divmod(made, 2)
            wins = (drawn(seed, pair, 2)[1] == "b") != bool(second)  # the new one always succeeds, the old one never
            assert chromium.js("document.title") == f"Pair {pair + 1} of 30: policy {second + 1} · burnish trial"
            if made == 0:  # a slip of the finger
                enter(chromium, not wins, 1)
                chromium.key("u")
                chromium.wait(f"document.getElementById('progress').value === 0 && {READY}")
            if made == 2:
                chromium.js("document.getElementById('video').value = 'https://video.example/2'")
            if made == 5:  # killed in the middle of a try, and of a line
                chromium.key("g")
                chromium.wait(RUNS)
                os.kill(process.pid, signal.SIGKILL)
                process.wait()
                chromium.wait("document.getElementById('said').textContent.startsWith('The program has ended')")
                with (folder / "trials.jsonl").open("a") as file:
                    file.write('{"entry": 7, "kind": "outc')
                process, address = begin(folder, tmp_path / "photos")
                chromium.go(address, PHONE)
                chromium.wait(READY)
                chromium.errors.clear()  # the old page has looked for the program in vain
            enter(chromium, wins, made + 1, mouse=made == 2)
            made += 1
            decided = made > 1 and sequential(np.ones(made // 2), 0.1).decided is not None
            assert ("you may stop" in chromium.js("document.getElementById('said').textContent")) == decided
            assert not re.search(r"walnut|hazel", chromium.js("document.body.innerText"))
        chromium.js("document.getElementById('use').click()")
        chromium.wait("document.getElementById('stage').classList.contains('over')")
        assert chromium.js("getComputedStyle(document.getElementById('photo')).opacity") == "0.5"
        chromium.js("setTimeout(() => document.getElementById('finish').click())")
        chromium.wait("location.pathname.endsWith('/report') && document.readyState === 'complete'")
        assert chromium.js("document.querySelector('strong').textContent") == "hazel is better than walnut"
        assert f"better after trial {made // 2}: stop" in process.communicate(timeout=60)[0]
        assert process.returncode == 0 and chromium.errors == []
    finally:
        process.kill()
        process.wait()
    lines = [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["outcome", "undo", *["outcome"] * made, "finish"]
    assert not (folder / "next.txt").exists()
    check_page(chromium, (folder / "trial.html").as_uri())


def test_every_kind_of_page_is_for_everybody(chromium, fake_run, dataset, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(fake_run, other)
    (other / "recipe.yaml").write_text((fake_run / "recipe.yaml").read_text().replace("3000", "4000"))
    (tmp_path / "data.html").write_text(as_html(inspect_dataset(dataset, quick=True)))
    study = write_study_page(ROOT / "results/tabletop/replay.json", tmp_path / "study.html")
    pages = [
        study,
        write_report(other),
        write_comparison(fake_run, other, tmp_path / "both.html"),
        tmp_path / "data.html",
    ]
    for page in pages:
        check_page(chromium, page.as_uri())
