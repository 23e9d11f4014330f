import torch

from burnish.core.seeding import generator
from burnish.data import augment


def images(batch=5, size=50):
    return torch.randint(0, 256, (batch, size, size, 3), generator=generator("images"), dtype=torch.uint8)


def test_shift_moves_whole_images_by_few_pixels():
    before = images()
    after = augment.shift_by(before, augment.draw_shift(before, generator(1)))
    most = round(50 * augment.SHIFT)
    seen = set()
    for b in range(len(before)):
        inside = after[b, most:-most, most:-most]
        offsets = [
            (y, x)
            for y in range(-most, most + 1)
            for x in range(-most, most + 1)
            if torch.equal(inside, before[b, most + y : 50 - most + y, most + x : 50 - most + x])
        ]
        assert len(offsets) == 1
        seen.add(offsets[0])
    assert len(seen) > 1


def test_jitter_is_brightness_contrast_saturation_in_closed_form():
    picture = augment.to_float(images(3, 8)) * 0.4 + 0.3  # far enough from 0 and 1 that nothing is clamped
    out = augment.colour_jitter(picture, generator(2))
    draws = torch.rand(3, 3, generator=generator(2)) * 2 - 1
    weights = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    for b in range(3):
        brightness, contrast, saturation = 0.1 * draws[b, 0], 1 + 0.2 * draws[b, 1], 1 + 0.2 * draws[b, 2]
        grey = (picture[b] * weights).sum(0)
        saturated = saturation * picture[b] + (1 - saturation) * grey
        expected = contrast * saturated + (1 - contrast) * grey.mean() + brightness
        torch.testing.assert_close(out[b], expected.clamp(0, 1))


def test_range_shape_and_repeatability():
    (a, moved), (b, _) = (augment.augment(images(), generator(3)) for _ in range(2))
    assert moved.shape == (5, 2) and moved.abs().max() <= round(50 * augment.SHIFT)
    assert torch.equal(a, b) and a.shape == (5, 3, 50, 50) and a.min() >= 0 and a.max() <= 1
    assert torch.equal(augment.to_float(images())[0, 1], images()[0, :, :, 1] / 255)
