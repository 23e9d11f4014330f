"""Real-time chunking on Gaussian data, where every sampler is an affine map that numpy can write down."""

import numpy as np
import pytest
import torch

from burnish.core.errors import BurnishError
from burnish.sampling.steering import Guide, Steering, strength, weights

H, D = 16, 4


def gauss(cov, t):
    """x0 = J x of data N(0, cov)."""
    return (1 - t) * cov @ np.linalg.inv((1 - t) ** 2 * cov + t**2 * np.eye(len(cov)))


def field(cov, t):
    """The exact velocity, of tensors [B, H, 1]."""
    matrix = torch.from_numpy((np.eye(len(cov)) - gauss(cov, t)) / t)
    return lambda x: torch.einsum("ij,bjk->bik", matrix, x)


def euler(cov, steering, noise, steps):
    guide, x = Guide(steering, noise, steps), noise
    for k in range(steps):
        t = 1 - k / steps
        x = x - guide.velocity(field(cov, t), x, torch.tensor(t, dtype=noise.dtype)) / steps
    return guide.finish(x), x


def draw(shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


@pytest.mark.parametrize("deviation", [1.0, 0.25, 3.0])
@pytest.mark.parametrize("steps", [2, 3, 10])
def test_white_data_run_straight_to_what_is_committed(deviation, steps):
    noise, old = draw((3, H, 1)), draw((3, H, 1), 1)
    steering = Steering(old, D, schedule="hard", jacobian="vjp", clip=1e12, sigma=deviation)
    _, x = euler(deviation**2 * np.eye(H), steering, noise, steps)
    assert (x[:, :D] - old[:, :D]).abs().max() < 1e-9


def test_the_identity_in_the_jacobians_place_misses_it():
    noise, old = draw((3, H, 1)), draw((3, H, 1), 1)
    _, x = euler(np.eye(H), Steering(old, D, schedule="hard", jacobian="identity", clip=10), noise, 10)
    assert 1e-3 < (x[:, :D] - old[:, :D]).abs().max() < 0.1


@pytest.mark.parametrize("deviation", [0.1, 1.0, 4.0])
def test_the_pull_has_its_minimum_where_the_derivative_says(deviation):
    at = np.linspace(0.001, 0.999, 9999)
    values = strength(torch.from_numpy(at), 1e9, deviation).numpy()
    assert values.min() == pytest.approx(2 / deviation, rel=1e-4)
    assert at[values.argmin()] == pytest.approx(deviation / (1 + deviation), abs=2e-3)
    np.testing.assert_allclose(values, (1 - at) / at + at / (1 - at) / deviation**2)


def test_a_clip_of_five_binds_at_both_ends_and_at_noise():
    assert strength(0.1, 1e9) == pytest.approx(82 / 9) == strength(0.9, 1e9)
    assert strength(0.5, 5.0) == pytest.approx(2) and strength(0.9, 5.0) == 5.0
    assert strength(1.0, 7.0) == 7.0 == strength(0.0, 7.0) == strength(torch.tensor(1.0), 7.0)
    assert strength(0.5, 9.0, torch.tensor([1.0, 0.5])).tolist() == pytest.approx([2, 5])


def test_weights_fall_as_the_paper_says():
    delay, end = torch.tensor([2, 0, 3, 5]), torch.tensor([5, 0, 3, 6])
    c = np.array([3, 2, 1]) / 4
    found = weights(delay, end, 8, "linear").numpy()
    np.testing.assert_allclose(found[0], [1, 1, *c, 0, 0, 0], rtol=1e-6)
    assert found[1].sum() == 0 and found[2].tolist() == [1, 1, 1, 0, 0, 0, 0, 0]
    np.testing.assert_allclose(found[3], [1, 1, 1, 1, 1, 0.5, 0, 0])
    exp = weights(delay, end, 8, "exp").numpy()
    np.testing.assert_allclose(exp[0, 2:5], c * (np.exp(c) - 1) / (np.e - 1), rtol=1e-5)
    assert weights(delay, end, 8, "hard").sum(1).tolist() == [2, 0, 3, 5]


def affine(cov, steps, vjp, weight, clip, sigma=1.0):
    """The sampler as x_0 = M noise + C y; `weight` None is the plain one, "inpaint" moves committed rows straight."""
    eye, M, C = np.eye(H), np.eye(H), np.zeros((H, H))
    keep = np.diag((np.arange(H) < D) * 1.0)
    for k in range(steps):
        t = 1 - k / steps
        J = gauss(cov, t)
        V, b, extra = (eye - J) / t, np.zeros((H, H)), np.zeros((H, H))
        if isinstance(weight, str):
            V, b, extra = (eye - keep) @ V, -keep, keep
        elif weight is not None:
            pull = clip if t == 1 else min(clip, (1 - t) / t + t / (1 - t) / sigma**2)
            G = pull * (J.T if vjp else eye) @ np.diag(weight)
            V, b = V + G @ J, -G
        M, C = M - (V @ M + extra) / steps, C - (V @ C + b) / steps
    return M, C


def errors(cov, M, C):
    """rms of the committed rows' error, and of the error in the mean of the others, in units of the deviation."""
    pick = np.eye(H)[:D]
    off = C[:D] - pick
    prefix = np.sqrt(np.trace(M[:D] @ M[:D].T + off @ cov @ off.T) / D)
    gain = cov[D:, :D] @ np.linalg.inv(cov[:D, :D])
    rest = C[D:] - gain @ pick
    scale = np.sqrt(cov[0, 0])
    return prefix / scale, np.sqrt(np.trace(rest @ cov @ rest.T) / (H - D)) / scale


@pytest.mark.parametrize(
    ("options", "vjp", "expected"),
    [
        (None, False, {10: (1.310, 0.572), 4: (1.203, 0.572)}),
        ({"mode": "inpaint"}, False, {10: (0, 0.428), 4: (0, 0.442)}),
        ({"schedule": "hard", "jacobian": "vjp"}, True, {10: (0.023, 0.287), 4: (0.419, 0.356)}),
        ({"schedule": "hard", "jacobian": "identity", "clip": 10}, False, {10: (0.020, 0.195), 4: (0.107, 0.237)}),
        (
            {"schedule": "exp", "jacobian": "identity", "clip": 10, "end": H - 4},
            False,
            {10: (0.018, 0.450), 4: (0.121, 0.328)},
        ),
    ],
)
def test_smooth_chunks_of_gaussian_data(options, vjp, expected):
    """Correlation .9 from step to step; ten steps with deviation 1, four with deviation .3."""
    for steps, (prefix, rest) in expected.items():
        deviation = 1.0 if steps == 10 else 0.3
        cov = deviation**2 * 0.9 ** abs(np.subtract.outer(np.arange(H), np.arange(H)))
        noise, old = draw((5, H, 1)), draw((5, H, 1), 1)
        weight = None
        if options is None:
            steering = Steering(old, 0, 0, jacobian="identity")
        else:
            steering = Steering(old, D, **{"jacobian": "identity", **options})
            end = steering.end or H
            weight = "inpaint" if steering.mode == "inpaint" else np.where(np.arange(H) < D, 1.0, 0.0)
            if steering.schedule == "exp" and steering.mode == "guided":
                c = np.clip((end - np.arange(H)) / (end - D + 1), 0, 1)
                weight = np.where(np.arange(H) < D, 1.0, c * np.expm1(c) / (np.e - 1))
        clip = (options or {}).get("clip", steps)
        M, C = affine(cov, steps, vjp, weight, clip)
        _, x = euler(cov, steering, noise, steps)
        np.testing.assert_allclose(
            x[..., 0].numpy(), noise[..., 0].numpy() @ M.T + old[..., 0].numpy() @ C.T, atol=1e-6
        )
        found = errors(cov, M, C)
        for value, known in zip(found, (prefix, rest), strict=True):
            assert value == pytest.approx(known, abs=0.001), (options, steps, found)


def test_lerobots_processor_is_the_identity_formula():
    from lerobot.configs import RTCAttentionSchedule
    from lerobot.policies.rtc import RTCProcessor
    from lerobot.policies.rtc.configuration_rtc import RTCConfig

    processor = RTCProcessor(RTCConfig(prefix_attention_schedule=RTCAttentionSchedule.EXP, max_guidance_weight=10.0,
                                       execution_horizon=H - 4))  # fmt: skip
    cov = 0.9 ** abs(np.subtract.outer(np.arange(H), np.arange(H)))
    x, old, t = draw((1, H, 1)).float(), draw((1, H, 1), 1).float(), 0.6
    velocity = field(cov, t)

    def flow(points):
        return velocity(points.double()).float()

    theirs = processor.denoise_step(x, old, D, t, flow, H - 4)
    gaps = {}
    for jacobian in ("identity", "vjp"):
        guide = Guide(Steering(old, D, H - 4, jacobian=jacobian, clip=10.0), x, 10)
        gaps[jacobian] = (guide.velocity(flow, x, t) - theirs).abs().max().item()
    assert gaps["identity"] < 1e-5 and gaps["vjp"] > 0.1
    ours = weights(torch.tensor([D]), torch.tensor([H - 4]), H)[0]
    torch.testing.assert_close(processor.get_prefix_weights(D, H - 4, H), ours, rtol=0, atol=1e-6)


@pytest.mark.parametrize("jacobian", ["vjp", "identity"])
def test_no_weight_is_the_plain_sampler_and_the_own_guess_a_fixed_point(jacobian):
    cov = 0.9 ** abs(np.subtract.outer(np.arange(H), np.arange(H)))
    x = draw((2, H, 1))
    rows = Steering(draw((2, H, 1), 1), torch.tensor([0, D]), torch.tensor([0, H]), jacobian=jacobian)
    flow = field(cov, 0.5)
    found = Guide(rows, x, 4).velocity(flow, x, 0.5)
    assert found[0].equal(flow(x)[0]) and not found[1].equal(flow(x)[1])
    own = Steering(x - 0.5 * flow(x), D, jacobian=jacobian)
    assert Guide(own, x, 4).velocity(flow, x, 0.5).equal(flow(x))


def test_rows_that_do_not_exist_and_padded_dimensions_pull_nothing():
    """A pull towards zeros behind the old chunk's end would be one towards the mean action, at full weight."""
    x, old = draw((1, H, 3)), draw((1, 6, 3), 1)
    guide = Guide(Steering(old, 2, jacobian="identity"), x, 4, width=2)
    _, push = guide.split(lambda points: torch.zeros_like(points), x, 0.5)
    assert push[:, 6:].abs().max() == 0 and push[..., 2].abs().max() == 0 and push[:, :6, :2].abs().min() > 0
    filled = torch.cat([old, torch.zeros(1, H - 6, 3)], 1)
    _, wrong = Guide(Steering(filled, 2, jacobian="identity"), x, 4, width=2).split(torch.zeros_like, x, 0.5)
    assert wrong[:, 6:].abs().max() > 0
    lost = Guide(Steering(torch.cat([old, old * torch.nan], 1), 2, 6, jacobian="vjp"), x, 4)
    assert lost.velocity(lambda points: 2 * points, x, 0.5).isfinite().all()


def test_what_comes_back_is_what_was_executed():
    x, old = draw((2, H, 1)), draw((2, 8, 1), 1)
    done = Guide(Steering(old, torch.tensor([3, 0]), jacobian="identity"), x, 4).finish(x)
    assert done[0, :3].equal(old[0, :3]) and done[0, 3:].equal(x[0, 3:]) and done[1].equal(x[1])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"delay": 9}, "a delay of 9 and an end of 8"),
        ({"delay": -1}, "0 <= delay"),
        ({"delay": 5, "end": 3}, "an end of 3"),
        ({"delay": torch.tensor([1, 9])}, "a delay of 1 to 9"),
        ({"delay": 1, "mode": "soft"}, "one of guided"),
        ({"delay": 1, "clip": 0.0}, "above 0"),
    ],
)
def test_refusals(options, said):
    with pytest.raises(BurnishError, match=said):
        Steering(draw((2, 8, 1)), **options)


def test_a_guide_refuses_what_does_not_fit():
    with pytest.raises(BurnishError, match="at most"):
        Guide(Steering(draw((1, 8, 1)), 1, jacobian="vjp"), draw((1, 4, 1)), 4)
    with pytest.raises(BurnishError, match="auto"):
        Guide(Steering(draw((1, 4, 1)), 1), draw((1, 4, 1)), 4)
    with torch.inference_mode(), pytest.raises(BurnishError, match="inference_mode"):
        Guide(Steering(draw((1, 4, 1)), 1, jacobian="vjp"), draw((1, 4, 1)), 4)
