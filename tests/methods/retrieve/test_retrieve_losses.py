"""The losses in closed form, and against a plain loop."""

import math

import pytest
import torch
import torch.nn.functional as F

from burnish.methods.retrieve.head import Moments, info_nce, progress_loss, related, sentence_loss, time_loss, view_loss


def draw(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=-1)


def moments(episodes, times):
    return Moments(torch.tensor(episodes), torch.tensor(times))


APART = moments(range(6), [0] * 6)
MIXED = moments([0, 0, 0, 1, 1, 2], [0, 3, 30, 0, 4, 9])


def test_collapsed_vectors_cost_the_logarithm_of_their_number():
    alike = draw(1, 1, 8).expand(6, 3, 8)
    assert view_loss(alike, APART, 10.0) == pytest.approx(math.log(6))
    assert time_loss(alike, alike, APART, APART, 10.0, 5, 20) == pytest.approx(math.log(6))
    # of six sentences each frame has one, and the other way round
    assert sentence_loss(alike, alike[:, 0], torch.arange(6), 10.0) == pytest.approx(math.log(6))
    assert progress_loss(torch.zeros(6), torch.arange(6), torch.zeros(6)) == pytest.approx(math.log(2))


@pytest.mark.parametrize("scale", [1.0, 14.0])
def test_perfect_positives_cost_the_softmax_of_one_among_orthogonal_others(scale):
    perfect = torch.eye(6, dtype=torch.float64)[:, None].expand(6, 2, 6)
    value = -math.log(math.exp(scale) / (math.exp(scale) + 5))
    assert view_loss(perfect, APART, scale) == pytest.approx(value)
    assert time_loss(perfect, perfect, APART, APART, scale, 5, 20) == pytest.approx(value)


def by_loops(queries, keys, positive, neither, scale):
    """Every exponential written out."""
    means = []
    for i, query in enumerate(queries):
        power = [math.exp(scale * float(query @ key)) for key in keys]
        against = sum(p for p, yes, out in zip(power, positive[i], neither[i], strict=True) if not yes and not out)
        own = [p for p, yes in zip(power, positive[i], strict=True) if yes]
        if own:
            means.append(sum(-math.log(p / (p + against)) for p in own) / len(own))
    return sum(means) / len(means)


def test_the_masks_remove_exactly_the_frames_of_the_same_episode():
    x, y = draw(6, 8), draw(6, 8, seed=1)
    positive, neither = related(MIXED, MIXED)
    same = MIXED.episode[:, None] == MIXED.episode[None]
    assert torch.equal(positive, torch.eye(6, dtype=torch.bool)) and torch.equal(neither, same & ~positive)
    value = info_nce(x, y, positive, neither, 7.0)
    assert value == pytest.approx(by_loops(x, y, positive, neither, 7.0))
    moved = y.clone()  # what is neither changes nothing, whatever it is
    moved[1] = draw(8, seed=2)
    others = torch.tensor([0, 2])
    before = info_nce(x[others], y, positive[others], neither[others], 7.0)
    assert torch.equal(before, info_nce(x[others], moved, positive[others], neither[others], 7.0))
    assert not torch.equal(value, info_nce(x, moved, positive, neither, 7.0))


def test_in_time_the_window_is_right_and_far_frames_of_the_episode_are_wrong():
    positive, neither = related(MIXED, MIXED, window=3, far=20)
    assert positive[0].tolist() == [True, True, False, False, False, False]
    assert not neither[0].any()  # 30 frames away is a negative
    assert neither[3].tolist() == [False, False, False, False, True, False]  # four away is neither
    x, y = draw(6, 2, 8), draw(6, 2, 8, seed=1)
    value = time_loss(x, y, MIXED, MIXED, 7.0, 3, 20)
    sides = [by_loops(a[:, v], b[:, v], positive, neither, 7.0) for a, b in ((x, y), (y, x)) for v in range(2)]
    assert value == pytest.approx(sum(sides) / 4)


def test_order_does_not_matter_and_one_view_has_no_loss_between_views():
    x, order = draw(6, 3, 8), torch.tensor([4, 2, 0, 5, 1, 3])
    mixed = Moments(*(part[order] for part in MIXED))
    assert view_loss(x[order], mixed, 5.0) == pytest.approx(float(view_loss(x, MIXED, 5.0)))
    assert view_loss(x[:, [2, 0, 1]], MIXED, 5.0) == pytest.approx(float(view_loss(x, MIXED, 5.0)))
    one = draw(6, 1, 8).requires_grad_()
    view_loss(one, MIXED, 5.0).backward()
    assert torch.equal(one.grad, torch.zeros_like(one))


def test_gradients_agree_with_finite_differences():
    x, y, words = draw(5, 2, 4), draw(5, 2, 4, seed=1), draw(3, 4, seed=2)
    some, which = moments([0, 0, 0, 1, 2], [0, 3, 30, 0, 4]), torch.tensor([0, 0, 1, 2, 2])

    def whole(a, b, sentences, scale):
        return (view_loss(a, some, scale, 20.0) + time_loss(a, b, some, some, scale, 3, 20)
                + sentence_loss(a, sentences, which, scale)
                + progress_loss(a[:, 0, 0], torch.tensor([4, 3, 2, 1, 0]), torch.tensor([0, 0, 0, 1, 1])))  # fmt: skip

    inputs = [one.clone().requires_grad_() for one in (x, y, words, torch.tensor(3.0, dtype=torch.float64))]
    assert torch.autograd.gradcheck(whole, inputs, eps=1e-6, atol=1e-6)


def test_one_episode_alone_has_a_finite_gradient():
    x = draw(4, 2, 8).requires_grad_()
    loss = view_loss(x, moments([0] * 4, range(4)), 5.0)
    loss.backward()
    assert loss == 0 and torch.isfinite(x.grad).all()
