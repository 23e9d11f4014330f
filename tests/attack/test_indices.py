"""Forged indices: arrays, headers and facts that were changed and signed again, and an index of another data set."""

import json
import shutil

import dataset_fakes as fakes
import numpy as np
import pytest

from burnish.cli.main import main
from burnish.core.files import sampled_digest
from burnish.data.vectors import FRAMES, META, VALUES


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A data set, and an index of it."""
    root = fakes.write_v3(tmp_path_factory.mktemp("index") / "set", pictures=True)
    assert main(["data", "index", str(root), "--encoder", "pixels", "-o", str(root.parent / "index")]) == 0
    return root, root.parent / "index"


def array(name, change):
    return lambda folder: np.save(folder / name, change(np.load(folder / name, allow_pickle=False)))


def value(number, row=0):
    return array(VALUES, lambda values: np.where(np.arange(len(values))[:, None, None] == row, number, values))


def header(before, after):
    def change(folder):
        content = (folder / VALUES).read_bytes()
        assert before in content
        (folder / VALUES).write_bytes(content.replace(before, after, 1))

    return change


def facts(**changes):
    def change(folder):
        (folder / META).write_text(json.dumps(json.loads((folder / META).read_text()) | changes))

    return change


def far(folder):
    frames = np.load(folder / FRAMES, allow_pickle=False)
    frames["row"][8] = 1 << 40
    np.save(folder / FRAMES, frames)


def empty(folder):
    for name in (VALUES, FRAMES):
        array(name, lambda values: values[:0])(folder)


FORGED = {
    "nan": (value(np.float32("nan")), "not finite"), "infinite": (value(np.float32("inf"), 17), "not finite"),
    "half": (array(VALUES, lambda x: x.astype(np.float16)), "no index"),
    "double": (array(VALUES, lambda x: x.astype(np.float64)), "arrays of shape"),
    "swapped bytes": (array(VALUES, lambda x: x.astype(">f4")), "arrays of shape"),
    "flat": (array(VALUES, lambda x: x[:, 0]), "arrays of shape"),
    "more views": (array(VALUES, lambda x: np.repeat(x, 2, 1)), "arrays of shape"),
    "fewer": (array(VALUES, lambda x: x[:5]), "(5, 1, 768) and (18,)"),
    "of no width": (array(VALUES, lambda x: x[..., :0]), "arrays of shape"), "empty": (empty, "arrays of shape"),
    "longer than its file": (header(b"(18, 1, 768)", b"(99, 1, 768)"), "is damaged"),
    "of negative length": (header(b"(18, 1, 768)", b"(-8, 1, 768)"), "is damaged"),
    "of objects": (header(b"'<f4'", b"'|O8'"), "is damaged"),
    "no header": (header(b"'descr'", b"'xescr'"), "is damaged"),
    "frames of another type": (array(FRAMES, lambda x: np.zeros(len(x), np.int64)), "arrays of shape"),
    "every": (facts(every=0), "describes no vectors"), "cameras": (facts(cameras=[None]), "describes no vectors"),
}  # fmt: skip
OF_ANOTHER = {"a row far away": far, "a camera": facts(cameras=["wrist"]), "data": facts(data="0" * 16)}


def forge(index, folder, change):
    shutil.copytree(index, folder)
    change(folder)
    about = json.loads((folder / META).read_text())
    about["digests"] = {name: sampled_digest(folder / name) for name in (VALUES, FRAMES)}
    (folder / META).write_text(json.dumps(about))
    return folder


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_index_is_refused(name, made, tmp_path, refused):
    change, needle = FORGED[name]
    folder = forge(made[1], tmp_path / "forged", change)
    refused(["data", "search", folder, "--episode", 1, "--frame", 2], needle)
    refused(["data", "select", folder, 2, "-o", tmp_path / "picked.json"], needle)
    assert not (tmp_path / "picked.json").exists()


@pytest.mark.parametrize("name", OF_ANOTHER)
def test_a_curation_takes_no_index_of_other_data(name, made, tmp_path, refused):
    folder = forge(made[1], tmp_path / "forged", OF_ANOTHER[name])
    refused(["data", "inspect", made[0], "--quick", "--curate", folder], f"is no index of {made[0]}")
