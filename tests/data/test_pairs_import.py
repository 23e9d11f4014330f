"""Labels on recorded episodes: of a file, of a column, of a human who took over; and what they may not be."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from burnish.core.errors import BurnishError
from burnish.data.pairs import FACTS, INDEX, OutcomeData, Pair, PairData
from burnish.data.pairs_import import import_pairs
from burnish.data.streamed import StreamedFrames


@pytest.fixture
def root(dataset, tmp_path):
    """A copy of the fake data set: three episodes of 9, 10, 11 frames, tasks 0, 1, 0; no two states are equal."""
    return shutil.copytree(dataset, tmp_path / "pairs", ignore=shutil.ignore_patterns(".frames"))


def add_columns(root, **columns):
    """Write columns of one row a frame into tables and metadata, as a recording would have them."""
    (path,) = (root / "data").rglob("*.parquet")
    table, info = pq.read_table(path), json.loads((root / "meta/info.json").read_text())
    for name, values in columns.items():
        wide = list(np.shape(values)[1:]) or [1]
        kind = "bool" if np.asarray(values).dtype == bool else "float32"
        table = table.append_column(name, pa.array(np.asarray(values).tolist()))
        info["features"][name] = {"dtype": kind, "shape": wide, "names": None}
    pq.write_table(table, path)
    (root / "meta/info.json").write_text(json.dumps(info))


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_labels_make_a_pair_folder_or_leave_nothing(root, tmp_path):
    labels = write(tmp_path / "labels.jsonl", {"chosen": [0, 1], "rejected": [2, 1]})
    with pytest.raises(BurnishError, match="states that differ by .* in dimension"):
        import_pairs(root, labels, progress=False)
    with pytest.raises(BurnishError, match="pictures of 'observation.images.front' that differ by .* of 255"):
        import_pairs(root, labels, state_tolerance=1e9, progress=False)
    assert not (root / INDEX).exists() and not (root / FACTS).exists()
    assert import_pairs(root, labels, state_tolerance=1e9, image_tolerance=255, progress=False) == (1, 0)
    assert json.loads((root / FACTS).read_text())["source"] == "labels"
    with pytest.raises(BurnishError, match="has pairs already.*rm -f"):
        import_pairs(root, labels, state_tolerance=1e9, progress=False)


def test_one_label_decodes_the_pictures_that_it_needs(root, tmp_path, monkeypatch):
    decoded = []
    original = StreamedFrames._picture
    monkeypatch.setattr(StreamedFrames, "_picture", lambda self, row: decoded.append(row) or original(self, row))
    labels = write(tmp_path / "labels.jsonl", {"chosen": [0, 4], "rejected": [2, 7]})
    import_pairs(root, labels, state_tolerance=1e9, image_tolerance=255, progress=False)
    assert sorted(decoded) == [4, 19 + 7] and not (root / ".frames").exists()


def test_tolerance_is_one_number_or_one_a_dimension(root, tmp_path):
    labels = write(tmp_path / "labels.jsonl", {"chosen": [0, 1], "rejected": [2, 1]})  # states: episode, frame, noise
    loose = [2.5, 0.5, 10.0, 10.0]
    for wrong, words in (([1.5, 0.5, 10.0, 10.0], "dimension 0; expected the same start .at most 1.5"),
                         ([1.0, 2.0], "2 tolerances for states of 4 dimensions")):  # fmt: skip
        with pytest.raises(BurnishError, match=words):
            import_pairs(root, labels, state_tolerance=wrong, image_tolerance=255, progress=False)
    assert import_pairs(root, labels, state_tolerance=loose, image_tolerance=255, progress=False)[0] == 1
    assert len(PairData(root, ("front",), 4, progress=False)) == 1


def test_an_episode_is_no_pair_with_itself(root, tmp_path):
    labels = write(tmp_path / "labels.jsonl", {"chosen": [0, 1], "rejected": [0, 3]})
    with pytest.raises(BurnishError, match="pairs episode 0 with itself"):
        import_pairs(root, labels, state_tolerance=1e9, image_tolerance=255, progress=False)


def test_a_proposal_that_was_never_recorded_is_the_rejected_side(root, tmp_path):
    steps = [[0.5, 0.5, 0.5], [0.25, 0.5, 0.75]]
    labels = write(tmp_path / "labels.jsonl", {"chosen": [0, 2], "rejected": {"action": steps}})
    assert import_pairs(root, labels, progress=False) == (1, 0), "the same observation: nothing to tolerate"
    data = PairData(root, ("front",), 4, progress=False)
    batch, candidates = data.batch([0])
    assert candidates[0, 1].tolist() == [*steps, steps[1], steps[1]]
    assert candidates[0, 0].tolist() == data.robot.actions[2:6].tolist()
    assert batch["action_is_pad"].tolist() == [[[False, False, True, True]] * 2], "what one side lacks counts for none"
    other = write(tmp_path / "wide.jsonl", {"chosen": [0, 2], "rejected": {"action": [[1.0, 2.0]]}})
    (root / INDEX).unlink(), (root / FACTS).unlink()
    with pytest.raises(BurnishError, match="proposes actions of 2 dimensions; expected 3"):
        import_pairs(root, other, progress=False)


def test_outcomes_of_a_file_and_of_a_column(root, tmp_path):
    done = np.zeros(30, bool)
    done[[8, 29]] = True  # at the end of episodes 0 and 2
    add_columns(root, **{"next.success": done})
    labels = write(tmp_path / "labels.jsonl", {"episode": 2, "success": False})
    assert import_pairs(root, labels, success="next.success", progress=False) == (0, 3)
    assert json.loads((root / FACTS).read_text())["outcomes"] == [True, False, False]
    data = OutcomeData(root, ("front",), 4, every=4, progress=False)
    assert data.desirable.tolist() == [True] * 3 + [False] * 6 and set(data.successes) == set(range(9))
    batch, candidates = data.batch([0, 3])
    assert candidates[0, 0].tolist() == data.robot.actions[:4].tolist() and candidates.shape == (2, 2, 4, 3)
    assert batch["observation.images.front"].shape == (2, 3, 32, 32)
    with pytest.raises(BurnishError, match="outcomes of episodes and no pairs; expected pairs; try: loss: kto"):
        PairData(root, ("front",), 4, progress=False)


def test_only_some_episodes_may_be_labelled(root, tmp_path):
    labels = write(tmp_path / "labels.jsonl", {"episode": 0, "success": True}, {"episode": 1, "success": False})
    assert import_pairs(root, labels, progress=False) == (0, 2)
    data = OutcomeData(root, ("front",), 4, progress=False)
    assert len(data) == 19 and data.desirable.sum() == 9
    facts = json.loads((root / FACTS).read_text())
    (root / FACTS).write_text(json.dumps({**facts, "outcomes": [True, True, None]}))
    with pytest.raises(BurnishError, match="no episode of .* is labelled as a failure"):
        OutcomeData(root, ("front",), 4, progress=False)


def test_a_takeover_rejects_the_proposal_and_chooses_the_correction(root):
    human = np.zeros(30, bool)
    human[[3, 4, 5, 12, 20]] = True  # episodes 0 (frames 3 to 5), 1 (frame 3), 2 (frame 1)
    proposed = np.full((30, 3), 0.5, np.float32)
    from burnish.data.loader import RobotData

    proposed[20] = RobotData(root, (), 4, 1, 0, progress=False, pictures=False).actions[20]  # the human did the same
    add_columns(root, intervention=human, policy_action=proposed)
    found = import_pairs(root, takeover="intervention", proposal="policy_action", progress=False)
    assert found == (2, 0)
    data = PairData(root, ("front",), 4, progress=False)
    assert data.pairs == [Pair((0, 3), (0, 3), ((0.5,) * 3,) * 3), Pair((1, 3), (1, 3), ((0.5,) * 3,))]
    batch, candidates = data.batch([0])
    assert candidates[0, 0, :3].tolist() == data.robot.actions[3:6].tolist()
    assert batch["action_is_pad"][0, 0].tolist() == [False, False, False, True]


def test_whole_chunks_may_be_proposed(root):
    human, chunks = np.arange(30) == 3, np.full((30, 6), 0.25, np.float32)
    add_columns(root, intervention=human, policy_action=chunks)
    assert import_pairs(root, takeover="intervention", proposal="policy_action", progress=False) == (1, 0)
    assert PairData(root, ("front",), 4, progress=False).pairs[0].proposal == ((0.25,) * 3,) * 2


@pytest.mark.parametrize(("columns", "options", "words"), [
    ({}, {"success": "next.success"}, "no column 'next.success'"),
    ({"done": np.full(30, 0.5)}, {"success": "done"}, "other values than true and false"),
    ({}, {"takeover": "intervention"}, "without the column of proposals"),
    ({"h": np.arange(30) == 3}, {"takeover": "h", "proposal": "policy_action"}, "no column 'policy_action'"),
    ({"h": np.arange(30) == 3, "p": np.zeros((30, 2))}, {"takeover": "h", "proposal": "p"}, "2 numbers a frame"),
    ({"h": np.arange(30) == 3, "p": np.full((30, 3), np.nan)}, {"takeover": "h", "proposal": "p"}, "not finite"),
    ({"h": np.zeros(30, bool), "p": np.zeros((30, 3))}, {"takeover": "h", "proposal": "p"}, "has no moment"),
    ({}, {}, "nothing to import"), ({}, {"success": "action"}, "other values"), ({}, {"success": "task"}, "no column"),
    ({}, {"success": "index", "image_tolerance": float("nan")}, "tolerances"),
])  # fmt: skip
def test_what_cannot_be_imported(root, columns, options, words):
    add_columns(root, **columns)
    with pytest.raises(BurnishError, match=words):
        import_pairs(root, progress=False, **options)
    assert not (root / INDEX).exists() and not (root / FACTS).exists()


def test_labels_that_contradict_or_name_nothing(root, tmp_path):
    twice = write(tmp_path / "a.jsonl", {"episode": 0, "success": True}, {"episode": 0, "success": False})
    with pytest.raises(BurnishError, match="as a success and as a failure"):
        import_pairs(root, twice, progress=False)
    far = write(tmp_path / "b.jsonl", {"episode": 7, "success": True})
    with pytest.raises(BurnishError, match="names episode 7; expected 0 to 2"):
        import_pairs(root, far, progress=False)


def test_a_data_set_of_other_names_is_labelled_as_its_message_says(tmp_path, capfd):
    """The map that the message proposes is taken as it stands, kept beside the pairs, and used when they are read."""
    import shlex

    import dataset_fakes as fakes

    from burnish.cli.main import main

    root = fakes.write_v3(tmp_path / "set", pictures=True)
    fakes.openpi(root)
    labels = write(tmp_path / "labels.jsonl", {"chosen": [0, 1], "rejected": [2, 1]}, {"episode": 1, "success": False})
    words = ["data", "pairs", "--labels", str(labels), "--root", str(root), "--state-tolerance", "9",
             "--image-tolerance", "255"]  # fmt: skip
    assert main(words) == 2
    (option,) = shlex.split(capfd.readouterr().err.split("try: ")[1])
    assert option.startswith("--data.columns=") and main([*words, option]) == 0
    data = PairData(root, (), 2, progress=False)
    np.testing.assert_allclose(data.batch([0])[1][0, :, 0], [fakes.action(0, 1), fakes.action(2, 1)])
    for wrong in ("--columns=[1]", "--columns={action: nothing}", "--columns={a", "--columns=3"):
        (root / INDEX).unlink(missing_ok=True)
        (root / FACTS).unlink(missing_ok=True)
        assert main([*words, wrong]) == 2 and "olumns" in capfd.readouterr().err
    (root / INDEX).write_text('{"chosen": [0, 1], "rejected": [2, 1]}\n')
    for columns in ([1], "x", {"action": 3}, {"action": "nothing"}):
        (root / FACTS).write_text(json.dumps({"format": 1, "pairs": 1, "state_tolerance": 9, "columns": columns}))
        with pytest.raises(BurnishError, match="columns"):
            PairData(root, (), 2, progress=False)
