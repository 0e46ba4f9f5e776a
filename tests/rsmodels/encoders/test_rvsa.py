"""encoders/rvsa.py against a plain reading of MTP's formulas, one window, head and key at a time."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import rskernels
import rsmodels
from rsmodels.encoders import rvsa
from rsmodels.encoders.rvsa import RVSAViT

State = dict[str, Tensor]
RelativeError = Callable[[Tensor, Tensor], float]


# ------------------------------------------------------------------ the plain reading


def plain_encoder(state: State, images: Tensor, s: int) -> list[Tensor]:
    """What RVSA's forward computes of `state`: after each block, and after the final norm: (B, N, D) each."""
    h, w = images.shape[2] // 16, images.shape[3] // 16
    results = [plain_image(state, image, h, w, s) for image in images]
    return [torch.stack(maps) for maps in zip(*results, strict=True)]


def plain_image(state: State, image: Tensor, h: int, w: int, s: int) -> list[Tensor]:
    weight, bias = state["patch_embed.proj.weight"].flatten(1), state["patch_embed.proj.bias"]
    patches = [
        weight @ image[:, 16 * y : 16 * y + 16, 16 * x : 16 * x + 16].flatten() + bias
        for y in range(h)
        for x in range(w)
    ]
    x = torch.stack(patches) + state["pos_embed"][0]
    depth = sum(name.endswith("norm1.weight") for name in state)
    maps = []
    for i in range(depth):
        p = {k.removeprefix(f"blocks.{i}."): v for k, v in state.items() if k.startswith(f"blocks.{i}.")}
        attend = plain_global if "attn.full_attn_rel_pos_h" in p else plain_windows
        normed = plain_norm(x, p["norm1.weight"], p["norm1.bias"])
        x = x + (attend(p, normed, h, w, s) @ p["attn.proj.weight"].T + p["attn.proj.bias"])
        hidden = plain_norm(x, p["norm2.weight"], p["norm2.bias"]) @ p["mlp.fc1.weight"].T + p["mlp.fc1.bias"]
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        x = x + (hidden @ p["mlp.fc2.weight"].T + p["mlp.fc2.bias"])
        maps.append(x)
    return [*maps, plain_norm(x, state["norm.weight"], state["norm.bias"])]


def plain_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    return (x - mean) / ((x - mean).square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight + bias


def plain_global(p: State, x: Tensor, h: int, w: int, _: int) -> Tensor:
    d = p["attn.full_attn_rel_pos_h"].shape[-1]
    heads = x.shape[-1] // d
    qkv = (x @ p["attn.qkv.weight"].T + p["attn.qkv.bias"]).view(h * w, 3, heads, d)
    outputs = []
    for head in range(heads):
        q, k, v = (qkv[:, part, head] for part in range(3))
        q = q * d**-0.5  # before the tables meet it
        down = torch.tensor([[i // w - j // w + h - 1 for j in range(h * w)] for i in range(h * w)])
        across = torch.tensor([[i % w - j % w + w - 1 for j in range(h * w)] for i in range(h * w)])
        scores = q @ k.T
        scores = scores + (p["attn.full_attn_rel_pos_h"][down] * q[:, None]).sum(-1)
        scores = scores + (p["attn.full_attn_rel_pos_w"][across] * q[:, None]).sum(-1)
        outputs.append(scores.softmax(-1) @ v)
    return torch.cat(outputs, dim=-1)


def plain_windows(p: State, x: Tensor, h: int, w: int, s: int) -> Tensor:
    dim, heads = x.shape[-1], p["attn.relative_position_bias_table"].shape[-1]
    top, left = (-h % s) // 2, (-w % s) // 2
    H, W = h + -h % s, w + -w % s
    padding = (0, 0, left, W - w - left, top, H - h - top)
    padded = F.pad(x.view(h, w, dim), padding)
    qkv = F.pad((x @ p["attn.qkv.weight"].T + p["attn.qkv.bias"]).view(h, w, 3 * dim), padding)
    qkv = qkv.view(H, W, 3, heads, dim // heads)
    ticks_x, ticks_y = (torch.linspace(-1, 1, side, dtype=x.dtype) for side in (W, H))
    rows = []
    for y0 in range(0, H, s):
        row = []
        for x0 in range(0, W, s):
            mean = padded[y0 : y0 + s, x0 : x0 + s].reshape(s * s, dim).mean(0)
            mean = torch.where(mean > 0, mean, 0.01 * mean)
            offsets, scales, angles = (
                p[f"attn.sampling_{kind}.2.weight"].flatten(1) @ mean + p[f"attn.sampling_{kind}.2.bias"]
                for kind in ("offsets", "scales", "angles")
            )
            outputs = []
            for n in range(heads):
                # Their code would divide by zero where the grid is smaller than a window.
                offset_x, offset_y = offsets[2 * n] / max(h // s, 1), offsets[2 * n + 1] / max(w // s, 1)
                keys, values = [], []
                for i in range(s):
                    for j in range(s):
                        u = (j - (s - 1) / 2) * 2 / (W - 1) * (scales[2 * n] + 1)
                        v = (i - (s - 1) / 2) * 2 / (H - 1) * (scales[2 * n + 1] + 1)
                        sin, cos = torch.sin(angles[n]), torch.cos(angles[n])
                        at_x = ticks_x[x0 : x0 + s].mean() + (-v * sin + u * cos) + offset_x
                        at_y = ticks_y[y0 : y0 + s].mean() + (v * cos + u * sin) + offset_y
                        keys.append(bilinear(qkv[:, :, 1, n], at_x, at_y))
                        values.append(bilinear(qkv[:, :, 2, n], at_x, at_y))
                q = qkv[y0 : y0 + s, x0 : x0 + s, 0, n].reshape(s * s, -1)
                outputs.append(plain_window(p, q, torch.stack(keys), torch.stack(values), n, s))
            row.append(torch.cat(outputs, dim=-1).view(s, s, dim))
        rows.append(torch.cat(row, dim=1))
    return torch.cat(rows)[top : top + h, left : left + w].reshape(h * w, dim)


def plain_window(p: State, q: Tensor, k: Tensor, v: Tensor, head: int, s: int) -> Tensor:
    area = range(s * s)
    down = torch.tensor([[i // s - j // s + s - 1 for j in area] for i in area])
    across = torch.tensor([[i % s - j % s + s - 1 for j in area] for i in area])
    scores = q @ k.T * q.shape[-1] ** -0.5
    scores = scores + (p["attn.rel_pos_h"][down] * q[:, None]).sum(-1)
    scores = scores + (p["attn.rel_pos_w"][across] * q[:, None]).sum(-1)
    scores = scores + p["attn.relative_position_bias_table"][down * (2 * s - 1) + across, head]
    return scores.softmax(-1) @ v


def bilinear(image: Tensor, at_x: Tensor, at_y: Tensor) -> Tensor:
    """(H, W, d) at one place, -1 and 1 being the centres of the corner tokens; zero outside."""
    H, W, _ = image.shape
    x, y = (at_x + 1) / 2 * (W - 1), (at_y + 1) / 2 * (H - 1)
    left, above = int(x.detach().floor()), int(y.detach().floor())
    total = torch.zeros_like(image[0, 0])
    for column in (left, left + 1):
        for row in (above, above + 1):
            if 0 <= column < W and 0 <= row < H:
                total = total + (1 - (x - column).abs()) * (1 - (y - row).abs()) * image[row, column]
    return total


# ------------------------------------------------------------------ the encoder against it


@pytest.mark.parametrize(
    ("grid", "s"),
    [
        ((6, 6), 3),  # no padding
        ((8, 5), 3),  # one row and one column
        ((5, 6), 4),  # three rows, of which one is at the top
        ((4, 9), 7),  # fewer rows than a window has
    ],
)
def test_equals_the_plain_reading(
    grid: tuple[int, int], s: int, tmp_path: Path, mtp: Any, relative_error: RelativeError
) -> None:
    """Every block and the gradient of every parameter, in float64 and on the kernels in float32."""
    state = mtp.draw(grid, s)
    leaves = {k: v.clone().requires_grad_() for k, v in state.items() if v.is_floating_point()}
    generator = torch.Generator().manual_seed(1)
    size = (1, 3, 16 * grid[0], 16 * grid[1])
    images = 0.1 * torch.randn(size, generator=generator, dtype=torch.float64)
    maps = plain_encoder(leaves, images, s)
    upstream = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in maps]
    sum((x * u).sum() for x, u in zip(maps, upstream, strict=True)).backward()

    for dtype, allowed in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        encoder = mtp.load(state, tmp_path, grid, s, dtype)
        found = encoder.forward_intermediates(images.to(dtype), range(mtp.depth))
        assert all(x.shape == (1, mtp.dim, *grid) for x in found)
        tokens = [x.flatten(2).transpose(1, 2) for x in found] + [encoder(images.to(dtype))]
        for x, expected in zip(tokens, maps, strict=True):
            assert relative_error(x, expected) < allowed
        sum((x * u).sum() for x, u in zip(tokens, upstream, strict=True)).backward()
        for name, parameter in encoder.named_parameters():
            expected = leaves[mtp.named_as_theirs(name)].grad.view_as(parameter)
            assert expected.norm() > 0
            assert relative_error(parameter.grad, expected) < allowed, (dtype, name)


def test_windows_that_stay_are_plain_windows(tmp_path: Path, mtp: Any) -> None:
    """No move, no growth, no turn and no table: the operator's own windowed attention."""
    state = mtp.draw((6, 9), 3, torch.float32)
    for name in state:
        if "sampling" in name or "bias_table" in name:
            state[name] = torch.zeros_like(state[name])
    attention = mtp.load(state, tmp_path, (6, 9), dtype=torch.float32).blocks[0].attn
    x = torch.randn(2, 54, mtp.dim)
    expected = rskernels.rel_pos_attention(
        attention.qkv(x.view(2, 6, 9, mtp.dim)),
        attention.rel_pos_h,
        attention.rel_pos_w,
        num_heads=mtp.heads,
        window_size=3,
    )
    torch.testing.assert_close(attention(x), attention.proj(expected.flatten(1, 2)), rtol=1e-4, atol=1e-5)


def test_a_grid_smaller_than_its_window() -> None:
    """Where MTP's code divides zero by zero, also for windows that stay."""
    encoder = rvsa.rvsa_vit_tiny(image_size=(16, 48))
    for name, parameter in encoder.named_parameters():
        if "sampling" in name:
            torch.nn.init.zeros_(parameter)
    encoder(torch.randn(1, 3, 16, 48)).square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in encoder.parameters())


# ------------------------------------------------------------------ use


@pytest.mark.parametrize("checkpointing", (False, True))
def test_hook_after_every_block_of_a_frozen_encoder(checkpointing: bool) -> None:
    torch.manual_seed(0)
    encoder = rvsa.rvsa_vit_tiny(image_size=64).requires_grad_(False)
    encoder.set_activation_checkpointing(checkpointing)
    added = torch.randn(4, 128, requires_grad=True)
    calls = []

    def after_block(tokens: Tensor, index: int) -> Tensor:
        assert tokens.shape == (2, 16, 128)
        calls.append(index)
        return tokens * (1 + added[index])

    images = torch.randn(2, 3, 64, 64)
    first, second = encoder.forward_intermediates(images, (0, 2), after_block=after_block, normed=(2,))
    assert calls == [0, 1, 2] and encoder.prefix_tokens == 0
    x = encoder.embed(images)
    for i in range(3):
        x = encoder.blocks[i](x) * (1 + added[i])
        if i == 0:
            torch.testing.assert_close(first, x.transpose(1, 2).unflatten(2, (4, 4)))
    expected = encoder.norm(x).transpose(1, 2).unflatten(2, (4, 4))
    torch.testing.assert_close(second, expected)
    (right,) = torch.autograd.grad(expected.square().sum(), added)
    second.square().sum().backward()
    assert (len(calls) > 3) == checkpointing
    torch.testing.assert_close(added.grad, right, rtol=1e-4, atol=1e-5)
    assert (right[:3].abs().amax(1) > 0).all() and not right[3].any()
    assert all(p.grad is None for p in encoder.parameters())


def test_bfloat16(relative_error: RelativeError) -> None:
    """Under autocast, and with parameters in bfloat16: places stay in float32, so windows stay put."""
    torch.manual_seed(0)
    encoder = rvsa.rvsa_vit_tiny(image_size=(80, 112)).eval()
    images = torch.randn(2, 3, 80, 112)
    with torch.no_grad():
        expected = encoder(images)
        with torch.autocast("cpu", torch.bfloat16):
            assert relative_error(encoder(images).float(), expected) < 0.02
            x = torch.randn(1, 8, 8, 128)
            assert encoder.blocks[0].attn.places(x).dtype == torch.float32
        half = encoder.bfloat16()(images.bfloat16())
    assert half.dtype == torch.bfloat16 and relative_error(half.float(), expected) < 0.02


def test_checkpointing_gives_the_same_gradients() -> None:
    torch.manual_seed(0)
    encoder = rvsa.rvsa_vit_tiny(image_size=80)
    images = torch.randn(2, 3, 80, 80)
    gradients = []
    for enabled in (False, True):
        encoder.set_activation_checkpointing(enabled)
        encoder.zero_grad()
        encoder(images).square().mean().backward()
        gradients.append([p.grad for p in encoder.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_backbone_uses_every_parameter() -> None:
    torch.manual_seed(0)
    backbone = rsmodels.create_backbone("rvsa_vit_tiny", out_indices=(0, 2), image_size=(64, 96))
    maps = backbone(torch.randn(2, 3, 64, 96))
    assert [tuple(m.shape) for m in maps] == [(2, 128, 4, 6)] * 2
    assert backbone.feature_info.reduction() == [16, 16]
    sum(m.square().mean() for m in maps).backward()
    assert all(p.grad is not None for p in backbone.parameters())


def test_input_of_another_size() -> None:
    with pytest.raises(ValueError, match=r"\(1, 3, 128, 112\): this model takes \(B, 3, 128, 128\)"):
        rvsa.rvsa_vit_tiny()(torch.zeros(1, 3, 128, 112))
    with pytest.raises(ValueError, match="image_size=100"):
        rvsa.rvsa_vit_tiny(image_size=100)
    with pytest.raises(ValueError, match="window_size=1: expected a side of at least 2 tokens"):
        rvsa.rvsa_vit_tiny(window_size=1)


def test_exports_and_compiles(mtp: Any) -> None:
    encoder = RVSAViT(mtp.dim, 2, mtp.heads, mtp.global_blocks, image_size=(80, 64), window_size=3).eval()
    images = torch.randn(2, 3, 80, 64)
    with torch.no_grad():
        expected = encoder(images)
        torch.testing.assert_close(torch.export.export(encoder, (images,)).module()(images), expected)
        compiled = torch.compile(encoder, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(images), expected)
        assert encoder.to("meta")(images.to("meta")).shape == expected.shape
