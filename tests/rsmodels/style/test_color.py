"""ColorStyle: mean and covariance in, mean and covariance out."""

import pytest
import torch

from rsmodels.style import ColorStyle, StyleModel

STYLE: StyleModel = ColorStyle()


def coloured(count: int = 4, size: tuple[int, int] = (48, 40), spread: float = 0.05) -> torch.Tensor:
    """Images of correlated bands, well inside [0, 1]."""
    generator = torch.Generator().manual_seed(11)
    mixing = torch.rand(count, 3, 3, generator=generator) + 0.5 * torch.eye(3)
    noise = torch.randn(count, 3, size[0] * size[1], generator=generator).clamp(-3, 3)
    mean = 0.4 + 0.2 * torch.rand(count, 3, 1, generator=generator)
    return (mean + spread * mixing @ noise).view(count, 3, *size).clamp(0, 1)


def moments(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Means (B, 3) and covariances (B, 3, 3), in float64."""
    pixels = images.double().flatten(2)
    covariance = torch.stack([torch.cov(one, correction=0) for one in pixels])
    return pixels.mean(2), covariance


def root_of(embedding: torch.Tensor) -> torch.Tensor:
    """The symmetric matrix as the documentation orders it."""
    b = embedding.double()
    rows = [[b[:, 3], b[:, 6], b[:, 7]], [b[:, 6], b[:, 4], b[:, 8]], [b[:, 7], b[:, 8], b[:, 5]]]
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


def test_embedding_is_the_mean_and_the_root_of_the_covariance() -> None:
    images = coloured()
    embedding = STYLE.embed(images)
    assert embedding.shape == (4, STYLE.size) and embedding.dtype == torch.float32
    mean, covariance = moments(images)
    torch.testing.assert_close(embedding[:, :3].double(), mean, atol=1e-6, rtol=0)
    root = root_of(embedding)
    torch.testing.assert_close(root @ root, covariance, atol=1e-7, rtol=1e-4)
    assert (torch.linalg.eigvalsh(root) > 0).all()


def test_its_own_style_gives_an_image_back() -> None:
    images = coloured()
    torch.testing.assert_close(STYLE.transfer(images, STYLE.embed(images)), images, atol=1e-5, rtol=0)


def test_transfer_gives_the_wanted_moments() -> None:
    images = coloured()
    wanted = STYLE.embed(coloured().flip(0, 1))
    styled = STYLE.transfer(images, wanted)
    mean, covariance = moments(styled)
    torch.testing.assert_close(mean, wanted[:, :3].double(), atol=1e-3, rtol=0)
    root = root_of(wanted)
    # Where the image varies by some grey levels only, less is added: see the test of flat images.
    torch.testing.assert_close(covariance, root @ root, atol=3e-4, rtol=0.1)
    almost = ColorStyle(noise=1e-5).transfer(images, wanted)
    torch.testing.assert_close(moments(almost)[1], root @ root, atol=1e-5, rtol=2e-3)


def test_transfer_is_the_documented_map() -> None:
    """Against whitening and colouring written out in float64."""
    images, wanted = coloured(2), STYLE.embed(coloured(4)[2:])
    mean, covariance = moments(images)
    values, vectors = torch.linalg.eigh(covariance)
    root = vectors @ torch.diag_embed(values.sqrt()) @ vectors.mT
    slack = torch.eye(3, dtype=torch.float64) / 255**2
    gain = (root_of(wanted) @ root + slack) @ torch.linalg.inv(covariance + slack)
    centred = images.double().flatten(2) - mean[..., None]
    expected = (wanted[:, :3, None].double() + gain @ centred).view_as(images).clamp(0, 1)
    torch.testing.assert_close(STYLE.transfer(images, wanted).double(), expected, atol=1e-5, rtol=0)


def test_flat_and_grey_images_get_the_colour_and_no_noise() -> None:
    wanted = STYLE.embed(coloured(2))
    flat = torch.full((1, 3, 16, 16), 0.3)
    styled = STYLE.transfer(flat, wanted[:1])
    torch.testing.assert_close(styled, wanted[:1, :3, None, None].expand_as(styled), atol=1e-5, rtol=0)

    # Half a grey level of noise, as rounding to 8 bits leaves, stays of that size.
    noisy = flat + (torch.rand(flat.shape, generator=torch.Generator().manual_seed(0)) - 0.5) / 255
    strong = torch.tensor([[0.5, 0.5, 0.5, 0.1, 0.1, 0.1, 0.0, 0.0, 0.0]])
    assert STYLE.transfer(noisy, strong).std() < 13 * noisy.std()
    assert ColorStyle(noise=1e-6).transfer(noisy, strong).std() > 50 * noisy.std()  # what it is spared

    grey = coloured(1)[:, :1].expand(1, 3, -1, -1)
    assert STYLE.transfer(grey, wanted[1:]).isfinite().all()


def test_embeddings_of_no_image_are_clamped_to_one() -> None:
    """A sample may have a negative eigenvalue: contrast is taken away, never turned over."""
    images = coloured(1)
    negative = torch.tensor([[0.5, 0.5, 0.5, -0.1, 0.1, 0.1, 0.0, 0.0, 0.0]])
    flat = negative.clamp(min=0)
    assert torch.equal(STYLE.transfer(images, negative), STYLE.transfer(images, flat))
    wild = STYLE.transfer(images, 100 * torch.ones(1, 9))
    assert wild.min() >= 0 and wild.max() <= 1


def test_half_precision_and_autocast_change_nothing_but_rounding() -> None:
    images = coloured(2)
    wanted = STYLE.embed(images.flip(0))
    expected = STYLE.transfer(images, wanted)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(STYLE.embed(images.flip(0)), wanted)
        assert torch.equal(STYLE.transfer(images, wanted), expected)
    assert STYLE.transfer(images.bfloat16(), wanted).dtype == torch.float32


def test_no_gradient_and_nothing_is_changed_in_place() -> None:
    images = coloured(1).requires_grad_()
    before = images.detach().clone()
    wanted = STYLE.embed(images)
    assert not wanted.requires_grad and not STYLE.transfer(images, wanted).requires_grad
    assert torch.equal(images, before)


def test_nan_stays_with_its_image() -> None:
    images = coloured(2)
    images[0, 0, 0, 0] = torch.nan
    styled = STYLE.transfer(images, STYLE.embed(images))
    assert styled[0].isnan().any() and styled[1].isfinite().all()


def test_what_it_cannot_take() -> None:
    images = coloured(1)
    with pytest.raises(ValueError, match=r"images of shape \(1, 4, 8, 8\).*three bands"):
        STYLE.embed(torch.zeros(1, 4, 8, 8))
    with pytest.raises(TypeError, match=r"torch\.uint8; give floating-point values in \[0, 1\]"):
        STYLE.embed(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"embeddings of shape \(2, 9\) for 1 images; expected \(1, 9\)"):
        STYLE.transfer(images, torch.zeros(2, 9))
    with pytest.raises(ValueError, match="noise=0"):
        ColorStyle(noise=0)
