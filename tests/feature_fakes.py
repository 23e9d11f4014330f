"""A small data set, a key and a way to fill a cache with the features of the example teacher; a vision folder."""

from burnish.data.feature_cache import CacheKey
from burnish.data.feature_fill import FeatureJob, open_cache
from burnish.data.loader import RobotData
from burnish.data.views import frame_source
from burnish.teachers.base import make_teacher

SPEC = {"name": "edges:Edges", "grid": [4, 4]}


def make_data(dataset):
    return RobotData(dataset, ["front"], 4, 6, seed=0, progress=False)


def make_key(data):
    """Of both layers of the example teacher; needs the fixture `edges`."""
    teacher = make_teacher(SPEC, (2, 2))
    return CacheKey(
        teacher=teacher.identity, data=data.hash, cameras=["front"], image_sizes=[[32, 32]], layers=[0, 1], grid=[2, 2],
        standardise=True,
    )  # fmt: skip


def fill(folder, key, data, spec=SPEC, workers=1):
    source = frame_source(data, ("front",), False)
    job = FeatureJob(spec, key, source, data.states, len(data.actions), (12, 12))
    return open_cache(folder, job, workers=workers, progress=False)


def make_vision(folder):
    """A small DINOv2 with random weights, as transformers writes it; returns the folder."""
    import torch
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    with torch.random.fork_rng():
        torch.manual_seed(0)
        Dinov2Model(Dinov2Config(
            hidden_size=16, num_hidden_layers=3, num_attention_heads=2, mlp_ratio=2, image_size=56, patch_size=7,
        )).save_pretrained(folder)  # fmt: skip
    BitImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}).save_pretrained(folder)
    return folder
