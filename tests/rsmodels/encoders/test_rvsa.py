"""encoders/rvsa.py against a plain reading of MTP's formulas, one window, head and key at a time."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import rskernels
import rsmodels
from rsmodels.encoders import rvsa
from rsmodels.encoders.rvsa import RVSAViT

State = dict[str, Tensor]
DIM, DEPTH, HEADS, GLOBAL = 16, 3, 2, (1,)
PYRAMID = ("fpn1.0", "fpn1.1.ln", "fpn1.3", "fpn2.0")


def layout(
    dim: int, depth: int, heads: int, global_blocks: Sequence[int], grid: tuple[int, int], s: int
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of an encoder of MTP, in the order of its code."""
    d = dim // heads
    shapes: dict[str, tuple[int, ...]] = {
        "pos_embed": (1, grid[0] * grid[1], dim),
        "patch_embed.proj.weight": (dim, 3, 16, 16),
        "patch_embed.proj.bias": (dim,),
    }
    for i in range(depth):
        own: dict[str, tuple[int, ...]] = {"norm1.weight": (dim,), "norm1.bias": (dim,)}
        if i in global_blocks:
            own["attn.full_attn_rel_pos_h"] = (2 * grid[0] - 1, d)
            own["attn.full_attn_rel_pos_w"] = (2 * grid[1] - 1, d)
        else:
            own |= {"attn.rel_pos_h": (2 * s - 1, d), "attn.rel_pos_w": (2 * s - 1, d)}
            own["attn.relative_position_bias_table"] = ((2 * s - 1) ** 2, heads)
            own["attn.relative_position_index"] = (s * s, s * s)
            for name, size in (("offsets", 2), ("scales", 2), ("angles", 1)):
                own[f"attn.sampling_{name}.2.weight"] = (size * heads, dim, 1, 1)
                own[f"attn.sampling_{name}.2.bias"] = (size * heads,)
        for name, rows, columns in (
            ("attn.qkv", 3 * dim, dim),
            ("attn.proj", dim, dim),
            ("mlp.fc1", 4 * dim, dim),
            ("mlp.fc2", dim, 4 * dim),
        ):
            own |= {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}
        own |= {"norm2.weight": (dim,), "norm2.bias": (dim,)}
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in own.items()}
    shapes |= {"norm.weight": (dim,), "norm.bias": (dim,)}
    for name in PYRAMID:
        shapes |= {f"{name}.weight": (dim,) if "ln" in name else (dim, dim, 2, 2), f"{name}.bias": (dim,)}
    return shapes


def drawn(grid: tuple[int, int], s: int, dtype: torch.dtype = torch.float64) -> State:
    """An encoder of MTP with random values in every parameter: windows that move, grow and turn."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, shape in layout(DIM, DEPTH, HEADS, GLOBAL, grid, s).items():
        value = torch.randn(shape, generator=generator, dtype=torch.float64)
        scale = 1.2 * shape[1] ** -0.5 if name.endswith("weight") and len(shape) == 2 else 0.3
        state[name] = (scale * value + ("norm" in name and name.endswith("weight"))).to(dtype)
    for name in state:
        if name.endswith("relative_position_index"):
            state[name] = torch.arange(s**4).view(s * s, s * s)
    return state


def named_as_theirs(name: str, global_blocks: Sequence[int] = GLOBAL) -> str:
    """The name in MTP's file of a parameter of RVSAViT."""
    for kind in ("offsets", "scales", "angles"):
        name = name.replace(f"sampling_{kind}.", f"sampling_{kind}.2.")
    if ".rel_pos_" in name and int(name.split(".")[1]) in global_blocks:
        name = name.replace(".rel_pos_", ".full_attn_rel_pos_")
    return name


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
    maps = []
    for i in range(DEPTH):
        p = {k.removeprefix(f"blocks.{i}."): v for k, v in state.items() if k.startswith(f"blocks.{i}.")}
        attend = plain_global if i in GLOBAL else plain_windows
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
    d = DIM // HEADS
    qkv = (x @ p["attn.qkv.weight"].T + p["attn.qkv.bias"]).view(h * w, 3, HEADS, d)
    outputs = []
    for head in range(HEADS):
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
    top, left = (-h % s) // 2, (-w % s) // 2
    H, W = h + -h % s, w + -w % s
    padding = (0, 0, left, W - w - left, top, H - h - top)
    padded = F.pad(x.view(h, w, DIM), padding)
    qkv = F.pad((x @ p["attn.qkv.weight"].T + p["attn.qkv.bias"]).view(h, w, 3 * DIM), padding)
    qkv = qkv.view(H, W, 3, HEADS, DIM // HEADS)
    ticks_x, ticks_y = (torch.linspace(-1, 1, side, dtype=x.dtype) for side in (W, H))
    rows = []
    for y0 in range(0, H, s):
        row = []
        for x0 in range(0, W, s):
            mean = padded[y0 : y0 + s, x0 : x0 + s].reshape(s * s, DIM).mean(0)
            mean = torch.where(mean > 0, mean, 0.01 * mean)
            offsets, scales, angles = (
                p[f"attn.sampling_{kind}.2.weight"].flatten(1) @ mean + p[f"attn.sampling_{kind}.2.bias"]
                for kind in ("offsets", "scales", "angles")
            )
            heads = []
            for n in range(HEADS):
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
                heads.append(plain_window(p, q, torch.stack(keys), torch.stack(values), n, s))
            row.append(torch.cat(heads, dim=-1).view(s, s, DIM))
        rows.append(torch.cat(row, dim=1))
    return torch.cat(rows)[top : top + h, left : left + w].reshape(h * w, DIM)


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


def ours(
    state: State, folder: Path, grid: tuple[int, int], s: int = 3, dtype: torch.dtype = torch.float64
) -> RVSAViT:
    path = folder / "mtp.pth"
    torch.save({"state_dict": state}, path)
    size = (16 * grid[0], 16 * grid[1])
    encoder = RVSAViT(DIM, DEPTH, HEADS, GLOBAL, image_size=size, window_size=s).to(dtype)
    encoder.load_pretrained(str(path))
    return encoder


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(
    ("grid", "s"),
    [
        ((6, 6), 3),  # no padding
        ((8, 5), 3),  # one row and one column
        ((5, 6), 4),  # three rows, of which one is at the top
        ((4, 9), 7),  # fewer rows than a window has
    ],
)
def test_equals_the_plain_reading(grid: tuple[int, int], s: int, tmp_path: Path) -> None:
    """Every block and the gradient of every parameter, in float64 and on the kernels in float32."""
    state = drawn(grid, s)
    leaves = {k: v.clone().requires_grad_() for k, v in state.items() if v.is_floating_point()}
    generator = torch.Generator().manual_seed(1)
    size = (1, 3, 16 * grid[0], 16 * grid[1])
    images = 0.1 * torch.randn(size, generator=generator, dtype=torch.float64)
    maps = plain_encoder(leaves, images, s)
    upstream = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in maps]
    sum((x * u).sum() for x, u in zip(maps, upstream, strict=True)).backward()

    for dtype, allowed in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        encoder = ours(state, tmp_path, grid, s, dtype)
        found = encoder.forward_intermediates(images.to(dtype), range(DEPTH))
        assert all(x.shape == (1, DIM, *grid) for x in found)
        tokens = [x.flatten(2).transpose(1, 2) for x in found] + [encoder(images.to(dtype))]
        for x, expected in zip(tokens, maps, strict=True):
            assert relative_error(x, expected) < allowed
        sum((x * u).sum() for x, u in zip(tokens, upstream, strict=True)).backward()
        for name, parameter in encoder.named_parameters():
            expected = leaves[named_as_theirs(name)].grad.view_as(parameter)
            assert expected.norm() > 0
            assert relative_error(parameter.grad, expected) < allowed, (dtype, name)


def test_windows_that_stay_are_plain_windows(tmp_path: Path) -> None:
    """No move, no growth, no turn and no table: the operator's own windowed attention."""
    state = drawn((6, 9), 3, torch.float32)
    for name in state:
        if "sampling" in name or "bias_table" in name:
            state[name] = torch.zeros_like(state[name])
    attention = ours(state, tmp_path, (6, 9), dtype=torch.float32).blocks[0].attn
    x = torch.randn(2, 54, DIM)
    expected = rskernels.rel_pos_attention(
        attention.qkv(x.view(2, 6, 9, DIM)),
        attention.rel_pos_h,
        attention.rel_pos_w,
        num_heads=HEADS,
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


# ------------------------------------------------------------------ checkpoints


@pytest.mark.parametrize(
    ("build", "sizes"),
    [
        (rvsa.rvsa_vit_b, (768, 12, 12, (2, 5, 8, 11))),
        (rvsa.rvsa_vit_l, (1024, 24, 16, (5, 11, 17, 23))),
    ],
)
def test_parameters_are_those_of_mtp(build: Any, sizes: tuple) -> None:
    with torch.device("meta"):
        encoder = build(image_size=448)
    found = {named_as_theirs(name, sizes[3]): tuple(p.shape) for name, p in encoder.state_dict().items()}
    theirs = {
        name: shape[:2] if "sampling" in name else shape  # 1x1 convolutions
        for name, shape in layout(*sizes, (28, 28), 7).items()
        if not name.startswith("fpn") and not name.endswith("relative_position_index")
    }
    assert found == theirs


@pytest.mark.parametrize("home", (b"numpy.core.multiarray", b"numpy._core.multiarray"))
def test_loads_what_mtp_saves(home: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its training state, an array of either NumPy included; every key is loaded or said to be left out."""
    state = drawn((4, 4), 3, torch.float32)
    saved = {
        "epoch": 3,
        "iteration": 80000,
        "state_dict": state,
        "optimizer": {"state": {0: {"step": 1, "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 6e-5}]},
        "scheduler": {"T_max": 80000, "_last_lr": [0.0]},
        "loss_pretrain": np.array([3.5, 1.25]),
    }
    path = tmp_path / "last_vit_b_rvsa_ss_is_rd_pretrn_model_encoder.pth"
    torch.save(saved, tmp_path / "any.pth")
    with ZipFile(tmp_path / "any.pth") as source, ZipFile(path, "w") as target:
        for name in source.namelist():
            target.writestr(name, re.sub(rb"numpy\._?core\.multiarray", home, source.read(name)))
    encoder = RVSAViT(DIM, DEPTH, HEADS, GLOBAL, image_size=64, window_size=3)
    report = encoder.load_pretrained(str(path))
    own = encoder.state_dict()
    assert set(report.loaded) == set(own) and not report.initialised and not report.resized
    assert {named_as_theirs(name) for name in report.loaded} | set(report.dropped) == set(state)
    assert len(report.loaded) + len(report.dropped) == len(state)
    assert all(torch.equal(value, state[named_as_theirs(name)].view_as(value)) for name, value in own.items())
    said = capsys.readouterr().err
    assert "dropped: fpn1.*.weight" in said and "of MTP's pyramid" in said
    assert "relative_position_index [2 tensors] (follows from the window size)" in said


def test_loads_other_layouts(tmp_path: Path) -> None:
    state = drawn((4, 4), 3, torch.float32)
    expected = ours(state, tmp_path, (4, 4), dtype=torch.float32).state_dict()
    encoder = RVSAViT(DIM, DEPTH, HEADS, GLOBAL, image_size=64, window_size=3)

    def reload(state: State) -> Any:
        torch.save(state, tmp_path / "other.pth")
        for parameter in encoder.parameters():
            torch.nn.init.ones_(parameter)
        report = encoder.load_pretrained(str(tmp_path / "other.pth"))
        assert all(torch.equal(v, expected[k]) for k, v in encoder.state_dict().items() if k in report.loaded)
        return report

    # MTP's whole model, from inside DistributedDataParallel.
    whole = {f"module.encoder.{key}": value for key, value in state.items()}
    whole |= {f"module.semsegdecoder.{i}.weight": torch.zeros(2) for i in range(3)}
    report = reload(whole)
    assert report.dropped["semsegdecoder.*"] == "not part of the encoder" and not report.initialised
    # Remote-Sensing-RVSA.
    assert not reload({k.replace("full_attn_rel", "rel"): v for k, v in state.items()}).initialised
    # MTP for fine-tuning.
    report = reload({k: v for k, v in state.items() if not k.startswith("norm.")})
    assert report.initialised == ["norm.weight", "norm.bias"]
    # Our own.
    report = reload(expected)
    assert not report.dropped and not report.initialised


def test_checkpoints_that_do_not_fit(tmp_path: Path) -> None:
    state = drawn((4, 4), 3, torch.float32)
    without = {k: v for k, v in state.items() if k != "blocks.2.attn.sampling_angles.2.bias"}
    with pytest.raises(
        ValueError, match=r"1 encoder keys are missing .*blocks\.2\.attn\.sampling_angles\.bias"
    ):
        ours(without, tmp_path, (4, 4))
    with pytest.raises(ValueError, match=r"1 encoder keys match nothing .*cls_token"):
        ours({**state, "cls_token": torch.zeros(1, 1, DIM)}, tmp_path, (4, 4))
    with pytest.raises(ValueError, match=r"rel_pos_h has shape \(5, 8\), this model expects \(13, 8\)"):
        ours(state, tmp_path, (4, 4), s=7)
    longer = {**state, "blocks.3.norm1.weight": torch.zeros(DIM)}
    with pytest.raises(ValueError, match=r"4 blocks of width 16, this model has 3 of width 16"):
        ours(longer, tmp_path, (4, 4))
    plain = {k: v for k, v in state.items() if "sampling" not in k}
    with pytest.raises(ValueError, match=r"mtp\.pth: no RVSA encoder in it \(first keys: pos_embed,"):
        ours(plain, tmp_path, (4, 4))
    (tmp_path / "broken.pth").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"broken\.pth: not readable as weights"):
        rvsa.rvsa_vit_tiny().load_pretrained(str(tmp_path / "broken.pth"))


def test_tables_of_another_image_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = drawn((4, 4), 3, torch.float32)
    encoder = ours(state, tmp_path, (5, 7), dtype=torch.float32)
    said = capsys.readouterr().err
    assert "4x4 → 5x7 tokens, bicubic" in said and "7 → 13 rows, bicubic" in said
    grid = state["pos_embed"].reshape(1, 4, 4, DIM).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(5, 7), mode="bicubic", align_corners=False)
    assert torch.equal(encoder.pos_embed, grid.flatten(2).transpose(1, 2))
    table = state["blocks.1.attn.full_attn_rel_pos_w"].reshape(1, 1, 7, DIM // HEADS)
    table = F.interpolate(table, size=(13, DIM // HEADS), mode="bicubic", align_corners=False)
    assert torch.equal(encoder.blocks[1].attn.rel_pos_w, table[0, 0])
    assert torch.equal(encoder.blocks[0].attn.rel_pos_w, state["blocks.0.attn.rel_pos_w"])


def test_a_saved_state_of_another_grid() -> None:
    """2x8 tokens are as many as 4x4: the count alone does not tell the grid, the global tables do."""
    wide = {f"encoder.{k}": v for k, v in rvsa.rvsa_vit_tiny(image_size=(32, 128)).state_dict().items()}
    encoder = rvsa.rvsa_vit_tiny(image_size=64)
    torn = {**wide, "encoder.pos_embed": torch.zeros(1, 15, 128)}
    with pytest.raises(ValueError, match=r"encoder\.pos_embed has 15 positions; expected 2x8"):
        encoder.resize_state(torn, "encoder.")
    changed = encoder.resize_state(wide, "encoder.")
    assert changed["encoder.pos_embed"] == "2x8 → 4x4 tokens, bicubic"
    assert changed["encoder.blocks.3.attn.rel_pos_h"] == "3 → 7 rows, bicubic" and len(changed) == 5
    encoder.load_state_dict({k.removeprefix("encoder."): v for k, v in wide.items()})


def test_a_saved_state_without_global_blocks() -> None:
    encoder = rvsa.rvsa_vit_tiny(image_size=64)
    state = {"pos_embed": torch.randn(1, 32, 128)}
    with pytest.raises(ValueError, match="pos_embed has 32 positions; expected a square grid"):
        encoder.resize_state(state)
    with pytest.raises(ValueError, match="pos_embed has 32 positions; expected 4x4"):
        encoder.resize_state(state, saved_size=(64, 64))
    assert encoder.resize_state(state, saved_size=[64, 128]) == {"pos_embed": "4x8 → 4x4 tokens, bicubic"}


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


def test_bfloat16() -> None:
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


def test_exports_and_compiles() -> None:
    encoder = RVSAViT(DIM, 2, HEADS, GLOBAL, image_size=(80, 64), window_size=3).eval()
    images = torch.randn(2, 3, 80, 64)
    with torch.no_grad():
        expected = encoder(images)
        torch.testing.assert_close(torch.export.export(encoder, (images,)).module()(images), expected)
        compiled = torch.compile(encoder, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(images), expected)
        assert encoder.to("meta")(images.to("meta")).shape == expected.shape
