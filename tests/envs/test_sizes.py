"""Images of any height and width: the square view is the middle of the wide one, whatever the simulator."""

import numpy as np
import pytest

from burnish.core.errors import BurnishError
from burnish.envs.base import by_name, check_size, make_env, view_size

HEIGHT, WIDTH = 60, 80


def envs():
    yield pytest.param("tabletop:lift", id="tabletop")
    yield pytest.param("metaworld:drawer-close-v3", id="metaworld")
    yield pytest.param("libero:spatial/0", marks=pytest.mark.libero, id="libero")


@pytest.fixture(scope="module")
def views(request):
    """One moment seen by a wide, a square and a mixed environment, with the wide one itself."""
    name = request.param
    if name.startswith("libero"):
        pytest.importorskip("libero", reason="needs the extra [libero]")
    pair = make_env(name, [HEIGHT, WIDTH]), make_env(name, HEIGHT)
    first, second = pair[0].spec.cameras[:2]
    mixed = make_env(name, {first: [HEIGHT, WIDTH], second: [40, 30]})
    for env in (*pair, mixed):
        env.reset(0)
    cameras = (first, second)
    yield [env.observe(cameras).images for env in (*pair, mixed)], cameras, pair[0]
    for env in (*pair, mixed):
        env.close()


@pytest.mark.parametrize("views", envs(), indirect=True)
def test_the_square_view_is_the_middle_of_the_wide_one(views):
    (wide, square, mixed), (first, second), env = views
    assert wide[first].shape == (HEIGHT, WIDTH, 3) and square[first].shape == (HEIGHT, HEIGHT, 3)
    beside = (WIDTH - HEIGHT) // 2
    for camera in (first, second):
        middle = wide[camera][:, beside:-beside].astype(int)
        assert (np.abs(middle - square[camera]).max(-1) > 8).mean() < 0.01
        assert wide[camera][:, :beside].std() > 0 or wide[camera][:, -beside:].std() > 0
    assert (mixed[first] == wide[first]).all() and mixed[second].shape == (40, 30, 3)
    seen = env.geometry(first)
    assert seen["depth"].shape == (HEIGHT, WIDTH)
    rows, columns = np.mgrid[0:HEIGHT:7, 0:WIDTH:7]
    places = env.project(first, seen["points"][rows, columns].reshape(-1, 3))
    expected = np.stack([(columns.ravel() + 0.5) / WIDTH, (rows.ravel() + 0.5) / HEIGHT], 1)
    near = seen["depth"][rows, columns].ravel() < 5
    assert near.sum() > 20 and np.abs(places - expected)[near].max() < 0.02


def test_a_view_beyond_the_frame_buffer_of_the_model():
    env = make_env("tabletop:lift", {"front": [1080, 1920], "wrist": [480, 640]})
    env.reset(0)
    images = env.observe(("front", "wrist")).images
    assert images["front"].shape == (1080, 1920, 3) and images["front"].std() > 10
    assert images["wrist"].shape == (480, 640, 3)
    env.close()


def test_sizes_of_views():
    assert view_size(96, "a") == (96, 96) and view_size([48, 64], "a") == (48, 64)
    assert view_size({"a": [1, 2], "b": (3, 4)}, "b") == (3, 4) and view_size({"a": [1, 2]}, "other") == (1, 2)
    assert by_name({"a": [1, 2], "b": [3, 4]}, {"a": "x"}) == {"x": [1, 2]} and by_name(5, {}) == 5


@pytest.mark.parametrize("size", [7, 4097, [96, 4097], [0, 96], {"front": [96, 96], "wrist": [96, -1]}])
def test_sizes_that_nothing_can_draw(size):
    with pytest.raises(BurnishError, match="expected sides of 8 to 4096 pixels; try: --image-size"):
        check_size("tabletop:lift", size)


@pytest.mark.parametrize("views", list(envs())[-1:], indirect=True)
def test_exact_rendering_of_libero_has_an_id(views):
    from burnish.envs.base import expand

    assert expand("libero:spatial+exact")[3] == "libero:spatial/3+exact"
    with pytest.raises(BurnishError, match="unknown LIBERO variant '.fine'"):
        expand("libero:spatial/3+fine")
    fast, exact = views[2], make_env("libero:spatial/0+exact", [HEIGHT, WIDTH])
    assert exact.spec.task_id == "libero:spatial/0+exact" and exact.instruction == fast.instruction
    for env in (fast, exact):
        env.reset(0)
    assert np.array_equal(fast.data.qpos, exact.data.qpos)
    pictures = [env.observe(["agentview"]).images["agentview"].astype(int) for env in (fast, exact)]
    assert pictures[1].shape == (HEIGHT, WIDTH, 3) and 0.5 < np.abs(pictures[0] - pictures[1]).mean() < 8
    exact.close()
