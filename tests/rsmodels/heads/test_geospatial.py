"""heads/geospatial.py and heads/aspp.py against plain PyTorch."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rsmodels.heads.aspp import ASPPDecoder, LinearDecoder
from rsmodels.heads.geospatial import GeospatialExtractor, Injector

DIM, GRID = 32, (3, 5)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def assert_same(module: nn.Module, found: Tensor, expected: Tensor) -> None:
    """Outputs, and gradients of every parameter."""
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    direction = torch.randn_like(expected)
    parameters = list(module.parameters())
    ours = torch.autograd.grad(found, parameters, direction)
    theirs = torch.autograd.grad(expected, parameters, direction)
    for (name, _), a, b in zip(module.named_parameters(), ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("stride", (1, 2, 16, 32))
def test_extractor_lands_on_the_grid(stride: int) -> None:
    gse = GeospatialExtractor(DIM, stride=stride, width=4)
    images = torch.randn(2, 3, stride * GRID[0], stride * GRID[1])
    queries = gse(images)
    assert queries.shape == (2, GRID[0] * GRID[1], DIM)
    convs = [m for m in gse.modules() if isinstance(m, nn.Conv2d)]
    assert len(convs) == 5 and all(c.kernel_size == (3, 3) for c in convs)
    assert [c.out_channels for c in convs] == [4, 8, 16, 32, DIM]
    x = images
    for conv in convs:
        x = F.conv2d(x, conv.weight, conv.bias, stride=conv.stride, padding=1).clamp(min=0)
    torch.testing.assert_close(queries, x.flatten(2).mT)


def test_extractor_knows_which_strides_it_can_land_on() -> None:
    for options in ({"stride": 14}, {"stride": 64}, {"stride": 0}, {"width": 0}):
        with pytest.raises(ValueError, match=str(next(iter(options)))):
            GeospatialExtractor(DIM, **options)


def test_injector_is_cross_attention_behind_a_scale() -> None:
    inject = Injector(DIM, num_heads=4)
    feature, queries = torch.randn(2, DIM, *GRID), torch.randn(2, 15, DIM)
    assert torch.equal(inject(feature, queries), feature), "a new one adds nothing"
    nn.init.normal_(inject.scale)
    plain = nn.MultiheadAttention(DIM, 4, batch_first=True)
    weight = torch.cat([inject.q_proj.weight, inject.kv_proj.weight])
    bias = torch.cat([inject.q_proj.bias, inject.kv_proj.bias])
    tokens = feature.flatten(2).mT
    found, _ = F.multi_head_attention_forward(
        *(x.transpose(0, 1) for x in (queries, tokens, tokens)),
        DIM, 4, weight, bias, None, None, False, 0.0, inject.out_proj.weight, inject.out_proj.bias,
        training=plain.training, need_weights=False,
    )  # fmt: skip
    expected = feature + (inject.scale * found.transpose(0, 1)).mT.unflatten(2, GRID)
    assert_same(inject, inject(feature, queries), expected)


def test_a_new_injector_learns_through_its_scale_first() -> None:
    inject = Injector(DIM, num_heads=4)
    inject(torch.randn(2, DIM, *GRID), torch.randn(2, 15, DIM)).square().sum().backward()
    assert inject.scale.grad.any()
    assert not any(p.grad.any() for n, p in inject.named_parameters() if n != "scale")


def test_injector_heads_must_divide_its_width() -> None:
    with pytest.raises(ValueError, match="5 heads: expected a divisor of its width 32"):
        Injector(DIM, num_heads=5)


def as_image(tokens: Tensor, patch: int) -> Tensor:
    """(B, h, w, 3·p·p), a token's channels one after the other, each of p rows → (B, 3, H, W), by hand."""
    batch, h, w, _ = tokens.shape
    image = tokens.new_zeros(batch, 3, h * patch, w * patch)
    for y in range(h):
        for x in range(w):
            pixels = tokens[:, y, x].reshape(batch, 3, patch, patch)
            image[:, :, y * patch : (y + 1) * patch, x * patch : (x + 1) * patch] = pixels
    return image


def test_aspp_decoder_is_equations_8_and_9() -> None:
    decoder = ASPPDecoder(DIM, patch_size=4, width=6)
    stages = [torch.randn(2, DIM, *GRID) for _ in range(4)]
    maps = [
        F.conv2d(x, conv.weight, conv.bias, padding=d, dilation=d)
        for x, conv, d in zip(stages, decoder.convs, (1, 6, 12, 18), strict=True)
    ]
    tokens = F.linear(torch.cat(maps, 1).permute(0, 2, 3, 1), *decoder.to_pixels.parameters())
    assert_same(decoder, decoder(stages), as_image(tokens, 4))


def test_linear_decoder_looks_at_each_token_alone() -> None:
    decoder = LinearDecoder(DIM, patch_size=4)
    stages = [torch.randn(2, DIM, *GRID) for _ in range(4)]
    tokens = F.linear(torch.cat(stages, 1).permute(0, 2, 3, 1), *decoder.to_pixels.parameters())
    assert_same(decoder, decoder(stages), as_image(tokens, 4))
