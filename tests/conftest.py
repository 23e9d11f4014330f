"""Fixtures that every room shares. The environment is set before anything heavy is imported."""

import gc
import importlib
import logging
import os
import re
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"  # tiny models run fastest so; torch is not imported by xdist's own process
os.environ.setdefault("MUJOCO_GL", "egl")
os.fsync = lambda handle: None  # no test cuts the power; processes of their own wait for the disk

import pytest  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent / "train"))  # fake.py


RANKS = (
    "test_sharded", "test_study", "test_isolate_ranks", "test_objective", "test_landing", "test_align_ranks",
    "test_retrieve_ranks", "test_ranks", "test_killed_training",
)  # fmt: skip
"""Their processes are forks of a server, which has imported everything once: one worker has it."""
LIBERO = ("test_libero", "test_sizes")
TOGETHER = dict.fromkeys(RANKS, "ranks") | dict.fromkeys(LIBERO, "libero")
TOGETHER |= dict.fromkeys(("test_memory", "test_start"), "tensors that are none")
LONG = (
    *RANKS, "test_matrix", "test_gpu_bench", "test_kill", "test_demos", "test_cluster", "test_isolate_objective",
    *LIBERO, "test_memory", "test_robot_views", "test_discrete", "test_lerobot", "test_examples", "test_browser",
    "test_site",
)  # fmt: skip
"""Files that take longest go first, so that no process is left with one while the others are done."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Tests of a file stay together, and those of files that share what is dear to start."""
    from xdist.scheduler import LoadFileScheduling

    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return TOGETHER.get(Path(file).stem, file)

    return ByFile(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first, in the order of `LONG`."""
    place = {name: number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONG)))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, Any, Any]:
    """Thousands of collected tests and three large libraries need not be looked through at every collection."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.set_threshold(10_000, 20, 10)  # the libraries come later, and walking them is a tenth of a short training
        gc.enable()


def pytest_runtest_setup() -> None:
    """Leave out what is most of a short training or of loading a tiny policy, once it is imported."""
    if (configurations := sys.modules.get("transformers.configuration_utils")) is not None:
        # a text with all defaults compared, made for a line of the log whether that is shown or not
        configurations.PreTrainedConfig.__repr__ = object.__repr__
    if "torch" in sys.modules:
        import narrow
        import torchvision

        torchvision.models.resnet18 = narrow.resnet18
    if (loop := sys.modules.get("burnish.train.loop")) is not None:
        loop.draw_curves = lambda metrics, target: target.write_bytes(b"drawn for the fixture `curves` alone")


@pytest.fixture
def curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainings draw their curves."""
    from burnish.train import loop
    from burnish.train.logging import draw_curves

    monkeypatch.setattr(loop, "draw_curves", draw_curves)


@pytest.fixture
def wide_resnet(monkeypatch: pytest.MonkeyPatch) -> None:
    """A resnet18 is torchvision's."""
    import narrow
    import torchvision

    monkeypatch.setattr(torchvision.models, "resnet18", narrow.wide)


@pytest.fixture(autouse=True)
def root_logger() -> Iterator[None]:
    """LeRobot's programs make the root logger talk of everything on stderr; after a test it is silent again."""
    yield
    root = logging.getLogger()
    root.setLevel(logging.WARNING)
    root.handlers[:] = [handler for handler in root.handlers if type(handler) is not logging.StreamHandler]


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small LeRobotDataset of random pictures. Do not write into it."""
    from fake import make_dataset

    return make_dataset(tmp_path_factory.mktemp("data") / "fake")


@pytest.fixture(scope="session")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small question folder. Do not write into it."""
    from fake import make_questions

    return make_questions(tmp_path_factory.mktemp("questions") / "fake")


@pytest.fixture(scope="session")
def nano_vlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a nano SmolVLM with random weights, tokenizer and processor. Do not write into it."""
    from workshop.tiny import build_vlm

    return build_vlm(tmp_path_factory.mktemp("nano") / "vlm")


def _tiny(kind: str, factory: pytest.TempPathFactory) -> Path:
    from workshop.tiny import make_tiny

    return make_tiny(kind, factory.mktemp("tiny") / kind, cameras=("top", "wrist"))


@pytest.fixture(scope="session")
def tiny_smolvla(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LeRobot policy folder: cameras top and wrist (32 px), state 7, action 7, chunk 8. Do not write into it."""
    return _tiny("smolvla", tmp_path_factory)


@pytest.fixture(scope="session")
def tiny_pi0(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `tiny_smolvla`, of type pi0."""
    return _tiny("pi0", tmp_path_factory)


@pytest.fixture(scope="session")
def tiny_pi05(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `tiny_smolvla`, of type pi05."""
    return _tiny("pi05", tmp_path_factory)


@pytest.fixture(scope="session")
def tiny_pi0_fast(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `tiny_smolvla`, of type pi0_fast."""
    return _tiny("pi0_fast", tmp_path_factory)


@pytest.fixture(scope="session")
def tiny_openvla(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `tiny_smolvla`, of type openvla, in its published layout."""
    return _tiny("openvla", tmp_path_factory)


@pytest.fixture(scope="session")
def tiny_openvla_oft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `tiny_openvla`, with OFT's L1 head and projector of the state."""
    return _tiny("openvla_oft", tmp_path_factory)


@pytest.fixture(scope="session")
def edges(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of edges.py, the example teacher of docs/methods/align.md, which can then be imported."""
    page = (Path(__file__).parents[1] / "docs/methods/align.md").read_text()
    folder = tmp_path_factory.mktemp("edges")
    source = re.search(r"<!-- test: teacher -->\n```python\n(.*?)^```$", page, re.M | re.S)
    (folder / "edges.py").write_text(source[1])
    sys.path.insert(0, str(folder))
    importlib.import_module("edges")
    yield folder
    sys.path.remove(str(folder))
    del sys.modules["edges"]
