"""EarthStyle: eq. (5), from X to X_S."""

import pytest
import torch

from rsmodels.registry import Preprocessing
from rsmodels.style import ColorStyle, EarthStyle, StyleStatistics, from_unit, to_unit


def statistics(spread: float = 0.02) -> StyleStatistics:
    mean = torch.tensor([0.3, 0.5, 0.4, 0.1, 0.1, 0.1, 0.02, 0.01, 0.03], dtype=torch.float64)
    return StyleStatistics("color", mean, spread**2 * torch.eye(9, dtype=torch.float64), source="a test")


def images(count: int = 3, size: tuple[int, int] = (40, 56)) -> torch.Tensor:
    return 0.3 + 0.4 * torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(9))


def earth(**options) -> EarthStyle:
    return EarthStyle(ColorStyle(), statistics(), **{"ratio": 0.3, "patch": 8, **options})


def test_x_s_is_eq_5() -> None:
    module, x = earth(), images()
    torch.manual_seed(0)
    styled = module.styled(x)
    torch.manual_seed(0)
    sampled = statistics().sample(3)
    mask = module.masks(x)
    style = ColorStyle()
    injected = style.transfer(x, 0.5 * sampled + 0.5 * style.embed(x))
    torch.testing.assert_close(styled, injected * mask + x * (1 - mask), atol=1e-6, rtol=0)
    untouched = mask.expand_as(x) == 0
    assert torch.equal(styled[untouched], x[untouched]) and 0.5 < mask.mean() < 0.9
    assert (styled[~untouched] != x[~untouched]).float().mean() > 0.9


def test_mix_goes_from_the_image_s_own_style_to_the_sampled_one() -> None:
    x = images(2)
    own = earth(mix=0.0, ratio=0.0)
    torch.testing.assert_close(own.styled(x), x, atol=1e-5, rtol=0)
    torch.manual_seed(1)
    sampled = statistics().sample(2)
    torch.manual_seed(1)
    torch.testing.assert_close(earth(mix=1.0).embeddings(x), sampled)


def test_every_image_and_every_call_draws_anew() -> None:
    module = earth()
    x = images(1).repeat(2, 1, 1, 1)
    torch.manual_seed(4)
    first, second = module.embeddings(x), module.embeddings(x)
    assert not torch.equal(first[0], first[1]) and not torch.equal(first, second)
    torch.manual_seed(4)
    assert torch.equal(module.embeddings(x), first)


def test_the_masks_of_x_m_have_their_own_threshold_patch_and_reading() -> None:
    module, x = earth(mode="ratio"), images(4, (64, 64))
    masks = module.masks(x, ratio=0.7, patch=32, mode="eq4")
    assert masks.shape == (4, 1, 64, 64)
    blocks = masks.view(4, 2, 32, 2, 32).float()
    assert torch.equal(blocks.amax((2, 4)), blocks.amin((2, 4)))
    assert module.masks(images(1, (512, 512))).mean().item() == pytest.approx(0.3, abs=0.04)


def test_statistics_travel_in_the_state_and_are_all_of_it() -> None:
    filled, empty = earth(), EarthStyle(ColorStyle(), ratio=0.3, patch=8)
    assert set(filled.state_dict()) == {"mean", "covariance"} and not list(filled.parameters())
    empty.load_state_dict(filled.state_dict())
    x = images(1)
    torch.manual_seed(0)
    expected = filled.styled(x)
    torch.manual_seed(0)
    assert torch.equal(empty.styled(x), expected)


def test_no_gradient_in_training_autocast_or_half_precision() -> None:
    module, x = earth().train(), images(1)
    torch.manual_seed(2)
    expected = module.styled(x)
    torch.manual_seed(2)
    with torch.autocast("cpu", torch.bfloat16):
        styled = module.styled(x.requires_grad_())
    assert torch.equal(styled, expected) and not styled.requires_grad


def test_diagonal_sampling_is_handed_on() -> None:
    module, x = earth(mix=1.0, covariance="diagonal"), images(2)
    torch.manual_seed(5)
    drawn = module.embeddings(x)
    torch.manual_seed(5)
    torch.testing.assert_close(drawn, statistics().sample(2, covariance="diagonal"))


def test_what_it_refuses() -> None:
    other = StyleStatistics("ghiasi", torch.zeros(100).double(), torch.eye(100).double(), "ab" * 32)
    with pytest.raises(ValueError, match="of style 'ghiasi'"):
        EarthStyle(ColorStyle(), other, ratio=0.1, patch=8)
    for options, message in (
        ({"mix": 1.5}, r"mix=1\.5"),
        ({"ratio": -0.1}, r"ratio=-0\.1"),
        ({"patch": 0}, "patch=0"),
        ({"mode": "x"}, "mode='x'"),
        ({"covariance": "x"}, "covariance='x'"),
    ):
        with pytest.raises(ValueError, match=message):
            earth(**options)
    with pytest.raises(ValueError, match="three bands"):
        earth().styled(torch.rand(1, 4, 8, 8))


# --------------------------------------------------------------------------------------------- value ranges


def test_units_and_back() -> None:
    preprocessing = Preprocessing((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
    raw = torch.randint(0, 256, (2, 3, 8, 8), generator=torch.Generator().manual_seed(0)).float()
    normalised = preprocessing.normalize(raw)
    unit = to_unit(normalised, preprocessing.mean, preprocessing.std)
    torch.testing.assert_close(unit, raw / 255)
    torch.testing.assert_close(from_unit(unit, preprocessing.mean, preprocessing.std), normalised)
    sixteen = Preprocessing((1100.0, 1000.0, 900.0), (700.0, 600.0, 500.0))
    unit = to_unit(sixteen.normalize(raw * 30), sixteen.mean, sixteen.std, value_range=10_000)
    torch.testing.assert_close(unit, raw * 30 / 10_000)


def test_units_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="images have 4 bands, mean and std 3 and 3 values"):
        to_unit(torch.zeros(1, 4, 2, 2), (1, 1, 1), (1, 1, 1))
    with pytest.raises(ValueError, match="value_range=0"):
        from_unit(torch.zeros(1, 1, 2, 2), (1,), (1,), value_range=0)
