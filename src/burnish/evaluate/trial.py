"""Is B better than A on a robot: pairs of trials that a person judges without knowing whose turn it is.

In a pair both policies try the same initial state once. A coin of its own for each pair says which one is first, so
that whatever being first does (a warm gripper, a scene set up with more care) favours neither of them, whatever came
before: all that the sequential test asks for. Until the end the two are "policy 1" and "policy 2", first and second of
their pair. Every entry is a line on the disk before it counts; one that is taken back stays, with a line that says so.
"""

import secrets
import threading
import time
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from io import BytesIO
from json import dumps
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from burnish.core.errors import BurnishError, one_line
from burnish.core.files import new_file, write_json, write_text
from burnish.core.options import check, option, read_options
from burnish.core.outputs import claim
from burnish.core.provenance import commit
from burnish.core.reading import inside, read_object, regular_file
from burnish.core.seeding import derive_seed
from burnish.data.dataset import open_named
from burnish.data.pictures import open_picture
from burnish.data.streamed import Shape, StreamedFrames
from burnish.envs.base import FAILURES
from burnish.evaluate.evaluation import Evaluation
from burnish.evaluate.records import SETTINGS, SUMMARY, Journal, Record
from burnish.evaluate.sequential import sequential
from burnish.runtime.client import PolicyClient, without_token
from burnish.runtime.serve.relay import MOST_MB, Relay

MOST_STATES, MOST_BYTES, MOST_TEXT, EDGE = 500, 50 << 20, 500, 1280
"""States, bytes of a picture, characters of a text, pixels of a photo's longer edge."""


@dataclass(frozen=True)
class State:
    """One initial state; `photo` is a JPEG in the folder of the trial, "" where there is none."""

    name: str = ""
    instruction: str = ""
    setup: str = ""
    photo: str = ""


Made = list[tuple[State, bytes]]
"""States with their photos, b"" where there is none."""


def states_in_folder(folder: Path) -> Made:
    """A state for every name in a folder: NAME.jpg or NAME.png, and NAME.json with "instruction" and "setup" in words.

    Raises:
        BurnishError: no folder, none or too many in it, a picture that is none, a JSON file of another form.
    """
    files: dict[str, dict[str, Path]] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        kind = {".png": "photo", ".jpg": "photo", ".jpeg": "photo", ".json": "words"}.get(path.suffix.lower(), "")
        if kind and files.setdefault(path.stem, {}).setdefault(kind, path) != path:
            raise BurnishError(f"{folder} holds two pictures of {path.stem}", "one of each initial state")
    if not 1 <= len(files) <= MOST_STATES:
        raise BurnishError(f"{folder} holds {len(files)} initial states", f"1 to {MOST_STATES}: NAME.jpg, NAME.json")
    return [_read(name, folder, i, **found) for i, (name, found) in enumerate(files.items())]


def _read(
    name: str, folder: Path, number: int, photo: Path | None = None, words: Path | None = None
) -> tuple[State, bytes]:
    said = read_object(words, folder) if words else {}
    place = f"states/{number:03d}.jpg" if photo else ""
    state = read_options(State, {"name": name, "photo": place} | said, str(words))
    if {"photo", "name"} & said.keys() or max(len(state.instruction), len(state.setup)) > MOST_TEXT:
        raise BurnishError(f"{words} says more", f'"instruction" and "setup" of at most {MOST_TEXT} characters')
    if photo is None:
        return state, b""
    try:
        return state, _jpeg(ImageOps.exif_transpose(open_picture(regular_file(photo, folder, MOST_BYTES).read_bytes())))
    except (OSError, ValueError, SyntaxError, BurnishError) as error:
        raise BurnishError(f"{photo} cannot be read ({one_line(error, 200)})", "a PNG or JPEG picture") from None


def states_of_dataset(root: Path, most: int) -> Made:
    """The first frames of at most `most` episodes of a LeRobotDataset, evenly from all, by its first camera."""
    data = open_named(root)
    if not data.camera_keys:
        raise BurnishError(f"{root} has no camera", "a data set with pictures")
    known, camera = list(data.episodes), data.camera_keys[0]
    places = np.unique(np.linspace(0, len(known) - 1, min(most, MOST_STATES, len(known))).round().astype(int))
    chosen = [known[i] for i in places]
    frames = StreamedFrames.open(data, camera, Shape.of(data, camera, EDGE, 0), chosen)
    said = [" / ".join(data.episodes[e].tasks)[:MOST_TEXT] for e in chosen]
    states = [State(f"episode {e}", said[i], "", f"states/{i:03d}.jpg") for i, e in enumerate(chosen)]
    photos = [_jpeg(Image.fromarray(frames[data.rows.span(e)[0]])) for e in chosen]
    return list(zip(states, photos, strict=True))


def _jpeg(picture: Any) -> bytes:
    picture, buffer = picture.convert("RGB"), BytesIO()
    picture.thumbnail((EDGE, EDGE))
    picture.save(buffer, format="JPEG", quality=88)
    return buffer.getvalue()


TRIAL, ENTRIES, NEXT, ARMS = "trial", "trials.jsonl", "next.txt", ("a", "b")
ADDRESS, PATIENCE = ("ws://", "wss://"), 5.0
"""How addresses begin, and seconds in which a server must answer before the first try."""


@dataclass(frozen=True)
class TrialOptions:
    """How a trial is made. `trials` may be raised when it goes on; the rest is settled before the first one."""

    trials: int = option(40, "pairs at most: how often each policy tries", least=1, most=2000)
    margin: float | None = option(None, "success rates that differ by no more count as equivalent", above=0, below=1)
    task: str = option("", "what the robot is told, where the initial states do not say it")
    states: str = option("", "folder of initial states: NAME.jpg to match, NAME.json in words", path=True)
    data: str = option("", "or a LeRobotDataset, whose episodes' first frames are matched", path=True)
    relay_port: int = option(8765, "of the one address that the robot's client uses", least=0, most=65_535)


@dataclass(frozen=True)
class Entry:
    """A line of trials.jsonl: an outcome of one try, one taken back ("undo"), or the end ("finish")."""

    entry: int = -1
    kind: str = option("", choices=("outcome", "undo", "finish"))
    pair: int = 0
    code: int = 0
    success: bool = False
    failure: str = option("", choices=("", *FAILURES))
    video: str = ""
    seconds: float = option(0.0, least=0)
    asked: int = option(-1, "frames that the robot sent; -1 without a relay")
    time: str = ""

    def to_line(self) -> str:
        return dumps(asdict(self), ensure_ascii=False) + "\n"


class Stale(BurnishError):
    """What was entered was meant for another moment: somebody else has been faster."""


def drawn(seed: int, pair: int, states: int) -> tuple[int, str]:
    """The initial state of a pair and whose turn is first: states in a new order each round, first by coin."""
    rng = np.random.default_rng(derive_seed("states", seed, pair // states))
    return int(rng.permutation(states)[pair % states]), ARMS[derive_seed("first", seed, pair) % 2]


class Trial(AbstractContextManager):
    """A trial that is under way; the same folder again goes on where it stopped.

    Args:
        a, b: names of the policies, or the addresses of two policy servers.

    Attributes:
        entries, outcomes: every line, and the tries that count, in order.
        decided: whether the sequential test has come to a verdict.
        started: when the present try began; None while the scene is being set up.
        finished: whether the names have been revealed.

    Raises:
        BurnishError: the folder holds something else, another trial or damaged lines; another process uses it.
    """

    def __init__(self, folder: Path, a: str, b: str, options: TrialOptions | None = None):
        self.folder, self.options = Path(folder), options or TrialOptions()
        check(self.options, TRIAL)
        self._targets = dict(zip(ARMS, (a, b), strict=True))
        remote = [one.startswith(ADDRESS) for one in (a, b)]
        names = [without_token(one) for one in (a, b)]
        if any(remote) != all(remote) or names[0] == names[1] or not all(names):
            raise BurnishError(f"policies '{names[0]}' and '{names[1]}'", "two names, or two addresses ws://HOST:PORT")
        self.names, self._lock = dict(zip(ARMS, names, strict=True)), threading.RLock()
        self.relay: Relay | None = None
        with ExitStack() as opening:
            opening.enter_context(claim(self.folder, TRIAL))
            for name in ("states", *(f"eval/{arm}" for arm in ARMS)):
                inside(self.folder, name)
            settings = self._settings()
            journal = Journal(self.folder, settings, partial(read_options, Entry), TRIAL, ENTRIES)
            self._journal = opening.enter_context(journal)
            self.seed, where = settings["seed"], f"{self.folder / SETTINGS}: states"
            self.states = [read_options(State, one, where) for one in settings["states"]]
            self._follow()
            self._held = opening.pop_all()

    def connect(self) -> None:
        """Between two servers put the relay; of policies by name say which is next."""
        if self._targets["a"].startswith(ADDRESS) and not self.finished:
            limits = []
            for address in self._targets.values():
                with PolicyClient(address, patience=PATIENCE) as server:
                    said = isinstance(server.metadata, dict) and server.metadata.get("max_mb")
                    limits.append(said if type(said) is int and 1 <= said <= 1024 else MOST_MB)
            self.relay = Relay(self.options.relay_port, min(limits))  # one for both: it tells nobody who answers
            self._held.callback(self.relay.close)
        self._announce()

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def _settings(self) -> dict[str, Any]:
        """What the folder says, or for a new one what is drawn now."""
        options, file = self.options, self.folder / SETTINGS
        said = {**self.names, "margin": options.margin, "task": options.task, "source": options.states or options.data}
        if file.exists():
            before = read_object(file, self.folder)
            seed, states = before.get("seed"), before.get("states")
            listed = isinstance(states, list) and states and all(isinstance(state, dict) for state in states)
            if type(seed) is not int or not listed:
                raise BurnishError(f"{file} is damaged", "a seed and initial states, as they were written")
            return said | {"seed": seed, "states": states}
        entries = self.folder / ENTRIES
        if entries.exists() and entries.stat().st_size:  # under another draw they would be those of other policies
            raise BurnishError(f"{entries} without {file}", "both, as they were written", "another --output")
        if options.states and options.data:
            raise BurnishError("--states and --data", "one of them")
        made = [(State(str(pair + 1)), b"") for pair in range(options.trials)]
        if options.states:
            made = states_in_folder(Path(options.states))
        elif options.data:
            made = states_of_dataset(Path(options.data), options.trials)
        for state, photo in made:
            if photo:
                with new_file(self.folder / state.photo) as file:
                    file.write_bytes(photo)
        return said | {"seed": secrets.randbits(62), "states": [asdict(state) for state, _ in made]}

    @property
    def now(self) -> tuple[int, int] | None:
        """Pair from 0 and code, 1 or 2, of the try that is next; None where all are made."""
        pair, second = divmod(len(self.outcomes), 2)
        return (pair, second + 1) if pair < self.options.trials and not self.finished else None

    def arm(self, pair: int, code: int) -> str:
        """ "a" or "b": whose turn that is. Nobody who judges may see it before the end."""
        return ARMS[(ARMS.index(drawn(self.seed, pair, len(self.states))[1]) + code - 1) % 2]

    def state(self, pair: int) -> tuple[int, State]:
        """Number and initial state of a pair."""
        number = drawn(self.seed, pair, len(self.states))[0]
        return number, self.states[number]

    def differences(self) -> np.ndarray:
        """B minus A of the pairs that are complete, in order."""
        by = {(one.pair, self.arm(one.pair, one.code)): float(one.success) for one in self.outcomes}
        return np.array([by[pair, "b"] - by[pair, "a"] for pair in range(len(self.outcomes) // 2)])

    def view(self) -> dict[str, Any]:
        """What the one who judges may know, JSON-able."""
        with self._lock:
            last = self.outcomes[-1] if self.outcomes else None
            found: dict[str, Any] = {
                "entry": len(self.entries), "trials": self.options.trials, "started": self.started is not None,
                "decided": self.decided, "finished": self.finished, "failures": list(FAILURES), "pair": None,
                "last": last and {key: getattr(last, key) for key in ("pair", "code", "success", "failure")},
                "enough": len(self.outcomes) > 1, "helper": "" if self.relay else str(self.folder / NEXT),
                "robot": self.relay.address if self.relay else "",
                "asked": bool(self.relay and self.relay.asked), "fault": self.relay.fault if self.relay else "",
            }  # fmt: skip
            if self.now:
                number, state = self.state(self.now[0])
                told = {"told": state.instruction or self.options.task}
                found |= {"pair": self.now[0], "code": self.now[1], "number": number, "state": asdict(state) | told}
            return found

    def photo(self, number: int) -> bytes:
        """The JPEG of an initial state."""
        name = self.states[number].photo if 0 <= number < len(self.states) else ""
        if not name:
            raise BurnishError(f"no photo of initial state {number}")
        return regular_file(self.folder / name, self.folder, MOST_BYTES).read_bytes()

    def start(self, entry: int) -> None:
        """The scene is set up: the policy whose turn it is may act. `entry` is that of the `view` it was said on."""
        with self._lock:
            now = self._expect(entry, self.now is not None and self.started is None)
            if self.relay:
                self.relay.open(self._targets[self.arm(*now)])
            self.started = time.monotonic()

    def outcome(self, entry: int, success: bool, failure: str = "", video: str = "") -> None:
        """How the try ended; the robot is cut off first."""
        if failure not in ("", *FAILURES) or success and failure:
            raise BurnishError(f"failure {failure[:40]!r}{' of a success' * success}", f"one of {', '.join(FAILURES)}")
        if len(video) > 500 or any(ord(letter) < 32 for letter in video):
            raise BurnishError("the video's link is no line of at most 500 characters", "a path or an address")
        with self._lock:
            now = self._expect(entry, self.started is not None)
            seconds = round(time.monotonic() - (self.started or 0.0), 1)
            self._append(entry, "outcome", *now, success, failure, video, seconds)

    def undo(self, entry: int) -> None:
        """Take the last outcome back: that try is made, or judged, again."""
        with self._lock:
            self._expect(entry, bool(self.outcomes) and not self.finished)
            self._append(entry, "undo", self.outcomes[-1].pair, self.outcomes[-1].code)

    def finish(self, entry: int) -> None:
        """End it, and write eval/a and eval/b: evaluations like any other. Nothing can be entered afterwards."""
        with self._lock:
            self._expect(entry, len(self.outcomes) > 1)
            if not self.finished:
                self._append(entry, "finish")
            for arm in ARMS:
                self._write(arm)

    def _expect(self, entry: int, possible: bool) -> Any:
        if entry != len(self.entries) or not possible:
            raise Stale("somebody else has made an entry since, or this is not the moment", fix="look, and enter again")
        return self.now

    def _append(self, *what: Any) -> None:
        if self.relay:
            self.relay.hold()
        asked = self.relay.asked if self.relay else -1
        now = datetime.now(UTC).isoformat(timespec="seconds")
        self._journal.append(Entry(*what, asked=asked, time=now))
        self._follow()
        self._announce()

    def _follow(self) -> None:
        self.entries: list[Entry] = self._journal.records
        self.outcomes, self.finished = _replay(self.entries, self._journal.path)
        self.started: float | None = None
        found = self.differences()
        self.decided = len(found) > 0 and sequential(found, self.options.margin).decided is not None

    def _announce(self) -> None:
        """Without a relay, tell the one who starts policies which one is next."""
        if self.now and not self.relay:
            pair, code = self.now
            write_text(self.folder / NEXT, f"pair {pair + 1}, policy {code}: {self.names[self.arm(pair, code)]}\n")
        else:
            (self.folder / NEXT).unlink(missing_ok=True)

    def _write(self, arm: str) -> None:
        settings = {"env": "robot", "weights": self.names[arm], "seed": 0, "trial": self.seed}
        mine = [one for one in self.outcomes if self.arm(one.pair, one.code) == arm]
        with Journal(self.folder / "eval" / arm, settings) as journal:
            for one in mine[len(journal.records) :]:
                said = self.state(one.pair)[1].instruction or self.options.task
                facts = {"instruction": said, "weights": self.names[arm], "commit": commit(), "failure": one.failure}
                journal.append(Record(said or "robot", one.pair, 0, one.success, -1, **facts))
            found = Evaluation(self.folder / "eval" / arm, settings, journal.records, sum(one.seconds for one in mine))
            write_json(found.output / SUMMARY, found.to_dict())


def _replay(entries: list[Entry], path: Path) -> tuple[list[Entry], bool]:
    """The outcomes that count, and whether it is over; BurnishError where a line cannot follow those before it."""
    outcomes: list[Entry] = []
    for number, one in enumerate(entries):
        pair, second = divmod(len(outcomes) - (one.kind == "undo"), 2)
        expected = (0, 0) if one.kind == "finish" else (pair, second + 1)
        after_the_end = number and entries[number - 1].kind == "finish"
        if (one.entry, one.pair, one.code) != (number, *expected) or pair < 0 or after_the_end:
            raise BurnishError(f"{path}:{number + 1} does not follow from the lines before it", "lines as written")
        outcomes = outcomes[:-1] if one.kind == "undo" else [*outcomes, *[one] * (one.kind == "outcome")]
    return outcomes, bool(entries) and entries[-1].kind == "finish"
