"""The page of a trial over HTTP: who may see and enter what, and what a wrong request changes: nothing."""

import http.client
import json
import threading
from contextlib import closing

import pytest
from PIL import Image

from burnish.evaluate.trial import Trial, TrialOptions
from burnish.report.trial import MOST_BODY, Page, write_trial_report


@pytest.fixture
def page(tmp_path):
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (8, 6), "red").save(tmp_path / "photos/a.png")
    options = TrialOptions(trials=2, states=str(tmp_path / "photos"))
    with Trial(tmp_path / "t", "walnut", "hazel", options) as trial:
        trial.connect()
        made = Page(trial, lambda: write_trial_report(trial)[0].read_text())
        thread = threading.Thread(target=made.run)
        thread.start()
        yield made
        made.ended.set()
        thread.join()


def ask(page, path="", method="GET", body=None, **headers):
    """Status, headers and body of a request, by one who knows the secret unless `path` begins with a slash."""
    with closing(http.client.HTTPConnection("127.0.0.1", page.server_port, timeout=10)) as connection:
        target = path if path.startswith("/") else f"/{page.secret}/{path}"
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, target, body, headers)
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read()


def post(page, path, **content):
    return ask(page, path, "POST", json.dumps(content), Content_Type="application/json")


REFUSED = {
    "no secret": (403, {"path": "/"}), "another secret": (403, {"path": "/abc/state"}),
    "the secret cut": (403, {"path": "/state"}), "another host": (403, {"path": "state", "Host": "evil.example:80"}),
    "no port": (403, {"path": "state", "Host": "127.0.0.1"}),
    "another origin": (403, {"path": "state", "Origin": "http://evil.example"}),
    "nothing": (404, {"path": "secrets"}), "up": (404, {"path": "../settings.json"}),
    "no such photo": (404, {"path": "photo/7"}), "a photo of words": (404, {"path": "photo/a"}),
    "a photo of many digits": (404, {"path": "photo/" + "1" * 400}), "no report yet": (404, {"path": "report"}),
    "no such act": (404, {"path": "delete", "method": "POST", "body": "{}"}),
    "another method": (501, {"path": "state", "method": "DELETE"}),
}  # fmt: skip
JSON = {"Content_Type": "application/json"}
BODIES = {
    "too large": (413, "x" * (MOST_BODY + 1), JSON),
    "of no length": (411, None, JSON),
    "in pieces": (411, None, {**JSON, "Transfer_Encoding": "chunked"}),
    "length in words": (411, None, {"Content_Length": "x"}),
    "length of a day": (413, None, {**JSON, "Content_Length": "9" * 30}),
    "a form": (415, "entry=0", {"Content_Type": "text/plain"}),
    "no JSON": (400, "{", JSON),
    "no text": (400, b"\xff\xff", JSON),
    "a list": (400, "[1]", JSON),
    "null": (400, "null", JSON),
    "deep": (400, "[" * 2000, JSON),
    "no entry": (400, '{"success": true}', JSON),
    "no success": (400, '{"entry": 0}', JSON),
    "a key more": (400, '{"entry": 0, "success": true, "pair": 3}', JSON),
    "a key twice": (400, '{"entry": 0, "entry": 0, "success": true}', JSON),
    "success in words": (400, '{"entry": 0, "success": "yes"}', JSON),
    "entry true": (400, '{"entry": true, "success": true}', JSON),
    "an unknown failure": (400, '{"entry": 0, "success": false, "failure": "bored"}', JSON),
    "a success that failed": (400, '{"entry": 0, "success": true, "failure": "dropped"}', JSON),
    "a link of two lines": (400, '{"entry": 0, "success": true, "video": "a\\nb"}', JSON),
    "an earlier moment": (409, '{"entry": -1, "success": true}', JSON),
    "a later one": (409, '{"entry": 1, "success": true}', JSON),
}


def test_wrong_requests_get_their_status_one_line_and_change_nothing(page):
    page.trial.start(0)
    before = (page.trial.folder / "trials.jsonl").read_bytes()
    for name, (status, request) in REFUSED.items():
        found = ask(page, **request)
        assert found[0] == status, name
        assert b"walnut" not in found[2] and b"settings" not in found[2]
    for name, (status, body, headers) in BODIES.items():
        found = ask(page, "outcome", "POST", body, **headers) if body else bare(page, headers)
        assert found[0] == status, name
        assert b"Traceback" not in found[2] and b"\n" not in found[2].strip(), name
    assert (page.trial.folder / "trials.jsonl").read_bytes() == before and page.trial.started


def bare(page, headers):
    """A POST without a body, whatever its headers say."""
    with closing(http.client.HTTPConnection("127.0.0.1", page.server_port, timeout=10)) as connection:
        connection.putrequest("POST", f"/{page.secret}/outcome")
        for name, value in headers.items():
            connection.putheader(name.replace("_", "-"), value)
        connection.endheaders()
        answer = connection.getresponse()
        return answer.status, {}, answer.read()


def test_every_answer_keeps_other_pages_and_addresses_out(page):
    for path in ("", "state", "style.css", "photo/0", "/"):
        status, headers, body = ask(page, path)
        assert status == (403 if path == "/" else 200)
        assert "default-src 'none'" in headers["Content-Security-Policy"] and headers["Cache-Control"] == "no-store"
        assert headers["Referrer-Policy"] == "no-referrer" and headers["X-Content-Type-Options"] == "nosniff"
        assert b"http://" not in body and b"https://" not in body and "Access-Control-Allow-Origin" not in headers
    assert ask(page, "state", Origin=f"http://127.0.0.1:{page.server_port}")[0] == 200
    nonces = {ask(page)[1]["Content-Security-Policy"] for _ in range(3)}
    assert len(nonces) == 3 and page.server_address[0] == "127.0.0.1"


def test_of_two_operators_who_enter_at_once_one_is_told_so(page):
    page.trial.start(0)
    together, found = threading.Barrier(6), []

    def enter(success):
        together.wait()
        found.append(post(page, "outcome", entry=0, success=success))

    threads = [threading.Thread(target=enter, args=(bool(i % 2),)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(status for status, _, _ in found) == [200, 409, 409, 409, 409, 409]
    assert len(page.trial.outcomes) == 1
    late = next(json.loads(body) for status, _, body in found if status == 409)
    assert "somebody else" in late["error"]


def test_a_trial_from_the_first_try_to_the_report(page):
    secret = page.trial.seed
    for entry in range(4):
        assert post(page, "start", entry=entry)[0] == 200
        status, _, body = post(
            page, "outcome", entry=entry, success=entry > 1, video="http://a/b" if entry == 2 else ""
        )
        assert status == 200
        seen = body + ask(page, "state")[2]
        assert str(secret).encode() not in seen and b"walnut" not in seen and b"hazel" not in seen
    state = json.loads(ask(page, "state")[2])
    assert state["pair"] is None and state["enough"] and not state["finished"]
    assert post(page, "undo", entry=4)[0] == 200 and post(page, "start", entry=5)[0] == 200
    assert post(page, "outcome", entry=5, success=False, failure="dropped")[0] == 200
    assert [post(page, "finish", entry=entry)[0] for entry in (5, 6, 7)] == [409, 200, 200]  # again writes it again
    status, _, body = ask(page, "report")
    assert (
        status == 200 and b"walnut" in body and b"hazel" in body and b'href="http://a/b"' in body and b"dropped" in body
    )
    assert page.ended.wait(5)
