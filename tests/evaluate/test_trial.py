"""Trials on a robot: the draw, what is entered and taken back, what survives a kill, what nobody sees till the end."""

import errno
import json
import threading
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from burnish.core.errors import BurnishError
from burnish.evaluate.compare import compare
from burnish.evaluate.results import read_results
from burnish.evaluate.sequential import sequential
from burnish.evaluate.trial import ENTRIES, NEXT, Stale, Trial, TrialOptions, drawn, states_in_folder, states_of_dataset
from burnish.report.page import write_report
from burnish.report.trial import order_effect, write_trial_report
from burnish.runtime.client import PolicyClient
from burnish.runtime.serve.wire import OVER, pack_openpi


def judge(trial: Trial, wins: dict[str, list[bool]]) -> None:
    """Enter an outcome for the present try: that of the arm whose turn it is, in its pair."""
    pair, code = trial.now
    success = wins[trial.arm(pair, code)][pair]
    trial.start(len(trial.entries))
    trial.outcome(len(trial.entries), success, "" if success else "dropped")


def truth(pairs: int, a: float, b: float, seed: int = 0) -> dict[str, list[bool]]:
    rng = np.random.default_rng(seed)
    return {"a": (rng.random(pairs) < a).tolist(), "b": (rng.random(pairs) < b).tolist()}


@pytest.fixture
def trial(tmp_path):
    with Trial(tmp_path / "t", "walnut", "hazel", TrialOptions(trials=4)) as made:
        made.connect()
        yield made


def test_the_draw_gives_each_state_once_a_round_and_either_policy_first_by_a_fair_coin():
    found = [drawn(7, pair, 5) for pair in range(2000)]
    rounds = [tuple(state for state, _ in found[at : at + 5]) for at in range(0, 2000, 5)]
    assert all(sorted(one) == [0, 1, 2, 3, 4] for one in rounds) and len(set(rounds)) > 50
    first = np.array([arm == "b" for _, arm in found])
    assert abs(first.mean() - 0.5) < 3 * 0.5 / np.sqrt(2000)
    assert abs(np.mean(first[1:] == first[:-1]) - 0.5) < 3 * 0.5 / np.sqrt(1999)  # the last says nothing of the next
    by_state = [np.mean([arm == "b" for state, arm in found if state == one]) for one in range(5)]
    assert np.abs(np.array(by_state) - 0.5).max() < 4 * 0.5 / np.sqrt(400)
    assert [arm for _, arm in found] != [drawn(8, pair, 5)[1] for pair in range(2000)]


def test_what_is_entered_is_what_compare_and_the_report_say(tmp_path):
    wins = truth(30, 0.3, 0.95)
    with Trial(tmp_path / "t", "walnut", "hazel", TrialOptions(trials=30, margin=0.1)) as trial:
        trial.connect()
        while trial.now and not trial.decided:
            judge(trial, wins)
            assert not (tmp_path / "t/eval").exists() and not any(
                n in json.dumps(trial.view()) for n in ("walnut", "hazel")
            )
        made = len(trial.outcomes) // 2
        done = {arm: wins[arm][:made] for arm in "ab"}
        differences = np.array(done["b"], float) - np.array(done["a"], float)
        assert trial.decided and sequential(differences, 0.1).decided == made < 30
        assert sequential(differences[:-1], 0.1).decided is None
        trial.finish(len(trial.entries))
        page, found = write_trial_report(trial)
    records = {arm: read_results(tmp_path / "t/eval" / arm) for arm in "ab"}
    assert {arm: [one.success for one in some] for arm, some in records.items()} == done
    assert {one.failure for one in records["a"] if not one.success} == {"dropped"}
    assert json.loads((tmp_path / "t/eval/a/summary.json").read_text())["mean_steps"] is None  # nobody counted
    again = compare(tmp_path / "t/eval/a", tmp_path / "t/eval/b", margin=0.1, sequential=True)
    assert again == found and again.sequential.verdict == "better" and again.sequential.decided == made
    assert "solved" in page.read_text() and ">a</text>" in write_report(tmp_path / "t").read_text()
    text = page.read_text()
    assert "hazel is better than walnut" in text and f"settled by pair {made}" in text
    assert "eval/b --sequential --margin 0.1" in text
    with pytest.raises(Stale), Trial(tmp_path / "t", "walnut", "hazel", TrialOptions(trials=30, margin=0.1)) as trial:
        trial.start(len(trial.entries))


def test_the_effect_of_order_is_found_and_does_not_favour_a_policy(tmp_path):
    with Trial(tmp_path / "t", "x", "y", TrialOptions(trials=24)) as trial:
        while trial.now:  # the second of a pair always succeeds, whichever it is
            pair, code = trial.now
            trial.start(len(trial.entries))
            trial.outcome(len(trial.entries), code == 2)
        mean, low, high, p = order_effect(trial)
        assert mean == high == 1.0 and 0.8 < low < 0.9 and p == 2 / 2**24  # `low`: Wilson's bound of 24
        firsts = [drawn(trial.seed, pair, 24)[1] for pair in range(24)]
        assert trial.differences().tolist() == [1.0 if arm == "a" else -1.0 for arm in firsts]


def test_what_is_taken_back_stays_on_the_disk_and_counts_no_more(trial):
    for success in (True, False, True):
        trial.start(len(trial.entries))
        trial.outcome(len(trial.entries), success)
    assert trial.now == (1, 2)
    trial.undo(3)
    trial.undo(4)
    assert trial.now == (0, 2) and [one.success for one in trial.outcomes] == [True]
    lines = [json.loads(line) for line in (trial.folder / ENTRIES).read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["outcome"] * 3 + ["undo"] * 2
    assert [(line["pair"], line["code"]) for line in lines[3:]] == [(1, 1), (0, 2)]


def test_without_servers_the_next_policy_stands_in_a_file_and_only_there(trial):
    for _ in range(8):
        pair, code = trial.now
        name = trial.names[trial.arm(pair, code)]
        assert (trial.folder / NEXT).read_text() == f"pair {pair + 1}, policy {code}: {name}\n"
        judge(trial, truth(4, 0.5, 0.5))
    assert trial.now is None and not (trial.folder / NEXT).exists()


def test_what_is_not_the_moment_is_refused(trial):
    for name, *words in (("outcome", 0, True), ("undo", 0), ("finish", 0), ("start", 1)):
        with pytest.raises(Stale):
            getattr(trial, name)(*words)
    trial.start(0)
    for bad in ({"failure": "bored"}, {"failure": "dropped", "success": True}, {"video": "x" * 501}, {"video": "a\nb"}):
        with pytest.raises(BurnishError):
            trial.outcome(0, **{"success": False, **bad})
    with pytest.raises(Stale):
        trial.start(0)
    assert (trial.folder / ENTRIES).read_text() == ""


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.floats(0, 1))
def test_a_kill_at_any_byte_loses_at_most_the_last_entry(tmp_path_factory, cut):
    folder = tmp_path_factory.mktemp("cut") / "t"
    with Trial(folder, "x", "y", TrialOptions(trials=3)) as trial:
        for _ in range(3):
            judge(trial, truth(3, 0.5, 0.5))
        trial.undo(3)
        before, seed = trial.entries, trial.seed
    whole = (folder / ENTRIES).read_bytes()
    kept = whole[: round(cut * len(whole))]
    (folder / ENTRIES).write_bytes(kept)
    with Trial(folder, "x", "y", TrialOptions(trials=9)) as trial:
        assert trial.entries == before[: kept.count(b"\n")] and trial.seed == seed
        judge(trial, truth(9, 0.5, 0.5))
    with Trial(folder, "x", "y", TrialOptions(trials=9)) as trial:
        assert len(trial.entries) == kept.count(b"\n") + 1


DAMAGE = {
    "a line twice": lambda lines: [lines[0], lines[0]], "a line gone": lambda lines: lines[1:],
    "an outcome of elsewhere": lambda lines: [lines[0].replace('"code": 1', '"code": 2')],
    "another kind": lambda lines: [lines[0].replace("outcome", "maybe")],
    "a failure of no kind": lambda lines: [lines[0].replace('"failure": ""', '"failure": "bored"')],
    "success in words": lambda lines: [lines[0].replace("true", '"true"')],
    "a column more": lambda lines: [lines[0].replace('"entry"', '"more": 1, "entry"')],
    "something taken back that is not there": lambda lines: [lines[0].replace('"outcome"', '"undo"')],
    "an entry after the end": lambda lines: [lines[0].replace('"outcome"', '"finish"'), lines[1]],
    "a list": lambda lines: ["[1]"], "no JSON": lambda lines: ["x", *lines], "another text": lambda lines: ["\xff" * 9],
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_lines_are_named_and_left_alone(name, tmp_path):
    with Trial(tmp_path / "t", "x", "y") as trial:
        for _ in range(2):
            trial.start(len(trial.entries))
            trial.outcome(len(trial.entries), True)
    file = tmp_path / "t" / ENTRIES
    file.write_text("".join(line + "\n" for line in DAMAGE[name](file.read_text().splitlines())), "latin-1")
    before = file.read_bytes()
    with pytest.raises(BurnishError, match=ENTRIES):
        Trial(tmp_path / "t", "x", "y")
    assert file.read_bytes() == before


@pytest.mark.parametrize("changed", [
    {"states": []}, {"states": None}, {"states": [1]}, {"states": [{"name": 3}]}, {"states": [{"more": ""}]},
    {"seed": "7"}, {"seed": True}, {"seed": None},
], ids=str)  # fmt: skip
def test_damaged_settings_are_named(changed, tmp_path):
    with Trial(tmp_path / "t", "x", "y", TrialOptions(trials=1)):
        pass
    file = tmp_path / "t/settings.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    with pytest.raises(BurnishError, match="settings.json"):
        Trial(tmp_path / "t", "x", "y", TrialOptions(trials=1))


def test_a_photo_that_leads_out_of_the_folder_is_not_shown(tmp_path):
    with Trial(tmp_path / "t", "x", "y", TrialOptions(trials=1)):
        pass
    (tmp_path / "secret").write_text("x")
    file = tmp_path / "t/settings.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"states": [{"name": "1", "photo": "../secret"}]}))
    with (
        Trial(tmp_path / "t", "x", "y", TrialOptions(trials=1)) as trial,
        pytest.raises(BurnishError, match="leads out"),
    ):
        trial.photo(0)


@pytest.mark.parametrize("name", ["states", "eval"])
def test_nothing_is_written_through_a_strangers_link(name, tmp_path):
    (tmp_path / "mine").mkdir()
    with Trial(tmp_path / "t", "old", "new"):
        pass
    (tmp_path / "t" / name).symlink_to(tmp_path / "mine")
    with pytest.raises(BurnishError, match="is a link to"):
        Trial(tmp_path / "t", "old", "new")
    assert not list((tmp_path / "mine").iterdir())


def test_another_trial_or_process_in_the_folder_is_refused(trial, tmp_path):
    import subprocess
    import sys

    code = "import fcntl, sys; fcntl.flock(open(sys.argv[1]), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    done = subprocess.run(
        [sys.executable, "-c", code, trial.folder / ".burnish.json"], capture_output=True, check=False
    )
    assert b"BlockingIOError" in done.stderr
    trial.__exit__()
    for names, options in ((("walnut", "hazelnut"), TrialOptions()), (("walnut", "hazel"), TrialOptions(margin=0.1))):
        with pytest.raises(BurnishError, match="earlier trial with other"):
            Trial(trial.folder, *names, options)
    for names in (("x", "x"), ("x", ""), ("ws://127.0.0.1:1", "x")):
        with pytest.raises(BurnishError, match="two names, or two addresses"):
            Trial(tmp_path / "u", *names)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("x")
    with pytest.raises(BurnishError, match="overwrite"):
        Trial(tmp_path / "mine", "x", "y")


def photos(folder, size=(40, 30)):
    """Three states: a photo, one that a phone has turned, and words alone."""
    folder.mkdir()
    Image.new("RGB", size, "red").save(folder / "a.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", size, "blue").save(folder / "b.jpg", exif=turned)
    (folder / "b.json").write_text('{"instruction": "lift it"}')
    (folder / "c.json").write_text('{"setup": "cube at the left edge"}')
    return folder


def test_states_are_photos_and_words_and_stay_with_the_trial(tmp_path, dataset):
    folder = photos(tmp_path / "photos")
    found = [state for state, _ in states_in_folder(folder)]
    assert [(one.name, one.instruction, one.setup) for one in found] == [
        ("a", "", ""), ("b", "lift it", ""), ("c", "", "cube at the left edge")]  # fmt: skip
    options = TrialOptions(states=str(folder), task="push it")
    with Trial(tmp_path / "t", "x", "y", options):
        pass
    (folder / "a.png").unlink()
    with Trial(tmp_path / "t", "x", "y", options) as trial:
        assert [one.instruction or trial.options.task for one in trial.states] == ["push it", "lift it", "push it"]
        assert trial.view()["state"]["told"] in ("push it", "lift it")
        (trial.folder / "shown.jpg").write_bytes(trial.photo(1))
        with pytest.raises(BurnishError, match="no photo"):
            trial.photo(2)
    with Image.open(tmp_path / "t/shown.jpg") as image:
        assert image.size == (30, 40)
    made = states_of_dataset(dataset, 3)
    assert len(made) == 3 and all(one.instruction and photo[:2] == b"\xff\xd8" for one, photo in made)


@pytest.mark.parametrize("name", ["x.png", "x.json", "y.json", "a.jpg", "pipe.png"])
def test_states_that_are_none(name, tmp_path):
    import os

    folder = photos(tmp_path / "photos")
    wrong = {"x.json": '{"text": "a"}', "y.json": '{"setup": 3}'}
    os.mkfifo(folder / name) if name == "pipe.png" else (folder / name).write_text(wrong.get(name, "no picture"))
    with pytest.raises(BurnishError):
        Trial(tmp_path / "t", "x", "y", TrialOptions(states=str(folder)))
    assert not (tmp_path / "t").exists()


@contextmanager
def server(number: int):
    """A policy server of openpi's protocol that greets with its name and answers with its number."""
    from websockets.sync.server import serve

    def talk(connection):
        connection.send(pack_openpi({"policy": f"secret {number}", "weights": "abc", "action_dim": 7}))
        for _ in connection:
            connection.send(pack_openpi({"actions": np.full((1, 1), float(number))}))

    with serve(talk, "127.0.0.1", 0) as made:
        thread = threading.Thread(target=made.serve_forever)
        thread.start()
        yield f"ws://any:token@127.0.0.1:{made.socket.getsockname()[1]}"
        made.shutdown()
        thread.join()


def test_the_relay_leads_to_the_policy_whose_turn_it_is_and_holds_the_robot_between_tries(tmp_path):
    with (
        server(1) as a,
        server(2) as b,
        Trial(tmp_path / "t", a, b, TrialOptions(trials=3, relay_port=0)) as trial,
    ):
        trial.connect()
        assert "token" not in (tmp_path / "t/settings.json").read_text()
        asked = []
        for number in range(6):
            pair, code = trial.now
            with pytest.raises(BurnishError, match="no policy server"):  # held while the scene is set up
                PolicyClient(trial.relay.address, patience=0.2)
            trial.start(number)
            robot = PolicyClient(trial.relay.address)
            assert robot.metadata == {"policy": "hidden", "weights": "hidden", "action_dim": 7}
            mine = {"a": 1, "b": 2}[trial.arm(pair, code)]
            asked += [robot.infer({})["actions"].item() == mine for _ in range(number)]
            assert trial.view()["asked"] == (number > 0)
            trial.outcome(number, True)
            with pytest.raises(BurnishError, match="this trial is over"):
                robot.infer({})
            assert robot.reconnects == 0 and robot._connection.close_code == OVER
        assert all(asked) and len(asked) == 15 and [one.asked for one in trial.outcomes] == [0, 1, 2, 3, 4, 5]


def test_a_server_that_has_gone_is_told_without_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr("burnish.evaluate.trial.PATIENCE", 0.3)
    with (
        server(1) as a,
        Trial(tmp_path / "t", a, a.replace("127.0.0.1", "localhost"), TrialOptions(relay_port=0)) as trial,
    ):
        trial.connect()
        trial._targets = dict.fromkeys("ab", "ws://127.0.0.1:9")
        trial.start(0)
        with pytest.raises(BurnishError):
            PolicyClient(trial.relay.address, patience=0.3)
        assert trial.view()["fault"] == "the policy of this trial does not answer"
        trial.outcome(0, False)
    with (
        pytest.raises(BurnishError, match="no policy server"),
        Trial(tmp_path / "u", a, a.rpartition(":")[0] + ":9") as trial,
    ):
        trial.connect()


def test_a_full_disk_loses_no_entry_and_the_trial_goes_on(trial, monkeypatch):
    judge(trial, truth(4, 0.5, 0.5))
    before, file = (trial.folder / ENTRIES).read_bytes(), trial._journal._file

    class Full:
        """Room for ten bytes."""

        fileno, seek, truncate = file.fileno, file.seek, file.truncate

        def write(self, content):
            if len(content) < 20 or file.tell() > len(before):
                raise OSError(errno.ENOSPC, "No space left on device")
            return file.write(content[:10])

    trial.start(1)
    with monkeypatch.context() as patched, pytest.raises(BurnishError, match="no room left"):
        patched.setattr(trial._journal, "_file", Full())
        trial.outcome(1, True)
    assert (trial.folder / ENTRIES).read_bytes() == before and len(trial.entries) == 1
    trial.outcome(1, True)
    trial.__exit__()
    with Trial(trial.folder, "walnut", "hazel", TrialOptions(trials=4)) as again:
        assert again.entries == trial.entries and len(again.entries) == 2


def test_entries_without_their_draw_are_not_continued(trial):
    judge(trial, truth(4, 0.5, 0.5))
    trial.__exit__()
    (trial.folder / "settings.json").unlink()
    with pytest.raises(BurnishError, match=r"without .*settings.json"):
        Trial(trial.folder, "walnut", "hazel", TrialOptions(trials=4))
