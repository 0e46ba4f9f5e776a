"""encoders/dinov2.py: timm's and transformers' DINOv2 parameter for parameter and number for number."""

from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import SwiGLUPacked
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn
from transformers import (
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
)

import rskernels
import rsmodels
from rsmodels.encoders import dinov2
from rsmodels.encoders.dinov2 import DinoViT

SIZES = dict(embed_dim=96, depth=4, num_heads=3)
TAPS = (0, 1, 2, 3)


@torch.no_grad()
def draw(module: nn.Module) -> nn.Module:
    """Random values for every parameter, layer scales and tokens included."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        std = 1.5 * parameter.shape[-1] ** -0.5 if parameter.ndim == 2 else 0.3
        center = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        parameter.copy_(center + std * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def of_timm(image_size: int, registers: int = 0, swiglu: bool = False) -> VisionTransformer:
    gated = dict(mlp_ratio=2.66667 * 2, mlp_layer=SwiGLUPacked, act_layer=nn.SiLU) if swiglu else {}
    return VisionTransformer(
        img_size=image_size,
        patch_size=14,
        init_values=1e-5,
        num_classes=0,
        reg_tokens=registers,
        no_embed_class=registers > 0,
        **SIZES,
        **gated,
    )


def of_transformers(registers: int = 0, swiglu: bool = False) -> nn.Module:
    options = dict(
        hidden_size=96,
        num_hidden_layers=4,
        num_attention_heads=3,
        image_size=518,
        patch_size=14,
        use_swiglu_ffn=swiglu,
        attn_implementation="eager",
    )
    if registers:
        return Dinov2WithRegistersModel(Dinov2WithRegistersConfig(num_register_tokens=registers, **options))
    return Dinov2Model(Dinov2Config(**options))


def ours_from(state: dict[str, Tensor], folder: Path, **options) -> DinoViT:
    path = folder / "dinov2.pth"
    torch.save(state, path)
    encoder = DinoViT(**SIZES, **options).eval()
    encoder.load_pretrained(str(path))
    return encoder


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected) == len(TAPS)
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert ((a - b).norm() / b.norm()).item() < 1e-4


@pytest.mark.parametrize("name", ("s", "b", "l", "g"))
@pytest.mark.parametrize("registers", (0, 4))
def test_parameters_are_the_published_ones(name: str, registers: int) -> None:
    family = dict(s="small", b="base", l="large", g="giant")[name]
    with torch.device("meta"):
        ours = getattr(dinov2, f"dinov2_vit_{name}")(registers=registers)
        theirs = timm.create_model(
            f"vit_{family}_patch14_{'reg4_' if registers else ''}dinov2", num_classes=0
        )
    # timm has no position for a class token that stands beside registers.
    extra = ours.embed_dim if registers else 0
    assert sum(p.numel() for p in ours.parameters()) - extra == sum(p.numel() for p in theirs.parameters())
    assert [block.attn.num_heads for block in ours.blocks] == [b.attn.num_heads for b in theirs.blocks]


@pytest.mark.parametrize(("registers", "swiglu"), ((0, False), (4, False), (0, True)))
@pytest.mark.parametrize("image_size", (224, 266, 518))
@torch.no_grad()
def test_equals_timm(image_size: int, registers: int, swiglu: bool, tmp_path: Path) -> None:
    checkpoint = draw(of_timm(518, registers, swiglu)).state_dict()
    theirs = of_timm(image_size, registers, swiglu).eval()
    theirs.load_state_dict(checkpoint_filter_fn(dict(checkpoint), theirs))
    ours = ours_from(
        checkpoint, tmp_path, image_size=image_size, registers=registers, swiglu=swiglu, antialias=True
    )
    images = torch.randn(2, 3, image_size, image_size)
    maps = theirs.forward_intermediates(images, indices=list(TAPS), intermediates_only=True)
    assert_same(ours.forward_intermediates(images, TAPS), maps)
    torch.testing.assert_close(ours(images), theirs.forward_features(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("registers", "swiglu"), ((0, False), (4, False), (0, True)))
@pytest.mark.parametrize("image_size", (224, 266, 518))
@torch.no_grad()
def test_equals_transformers(image_size: int, registers: int, swiglu: bool, tmp_path: Path) -> None:
    theirs = draw(of_transformers(registers, swiglu))
    ours = ours_from(theirs.state_dict(), tmp_path, image_size=image_size, registers=registers, swiglu=swiglu)
    images = torch.randn(2, 3, image_size, image_size)
    states = theirs(images, output_hidden_states=True).hidden_states[1:]
    side = image_size // 14
    maps = [s[:, 1 + registers :].transpose(1, 2).unflatten(2, (side, side)) for s in states]
    assert_same(ours.forward_intermediates(images, TAPS), maps)
    last = theirs(images).last_hidden_state
    torch.testing.assert_close(ours(images), last, rtol=1e-4, atol=1e-4)
    normed = ours.forward_intermediates(images, (1, 3), normed=(3,))
    torch.testing.assert_close(
        normed[1].flatten(2).transpose(1, 2), last[:, 1 + registers :], rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(normed[0], maps[1], rtol=1e-4, atol=1e-4)


def test_names_of_earlier_transformers(tmp_path: Path) -> None:
    """Files on the hub carry the names of the version that wrote them."""
    state = draw(of_transformers(swiglu=True)).state_dict()
    old = {}
    for key, value in state.items():
        for new, name in (
            (".attention.q_proj.", ".attention.attention.query."),
            (".attention.k_proj.", ".attention.attention.key."),
            (".attention.v_proj.", ".attention.attention.value."),
            (".attention.o_proj.", ".attention.output.dense."),
            (".mlp.down_proj.", ".mlp.weights_out."),
        ):
            key = key.replace(new, name)
        old[f"dinov2.{key}"] = value
    for key in [key for key in old if ".gate_proj." in key]:
        parts = [old.pop(key), old.pop(key.replace("gate_proj", "up_proj"))]
        old[key.replace("gate_proj", "weights_in")] = torch.cat(parts)
    options = dict(image_size=56, swiglu=True)
    new_names, old_names = (ours_from(s, tmp_path, **options).state_dict() for s in (state, old))
    assert all(torch.equal(new_names[key], old_names[key]) for key in new_names)


def test_patch_16_from_patch_14(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    encoder = ours_from(draw(of_timm(518)).state_dict(), tmp_path, image_size=64, patch_size=16)
    assert encoder.grid_size == (4, 4)
    assert torch.isfinite(encoder(torch.randn(1, 3, 64, 64))).all()
    said = capsys.readouterr().err
    assert "patch 14 → 16, bicubic" in said and "37x37 → 4x4 patches" in said


def test_checkpoint_of_another_variant(tmp_path: Path) -> None:
    state = draw(of_timm(56, registers=4)).state_dict()
    with pytest.raises(ValueError, match=r"width 96 and 4 registers, this model has .* and 0 registers"):
        ours_from(state, tmp_path, image_size=56)
    with pytest.raises(ValueError, match="no DINOv2 encoder in it"):
        ours_from({"conv1.weight": torch.zeros(1)}, tmp_path, image_size=56)
    del state["blocks.2.norm1.bias"]
    with pytest.raises(ValueError, match=r"1 encoder keys are missing .*blocks\.2\.norm1\.bias"):
        ours_from(state, tmp_path, image_size=56, registers=4)


def test_input_of_another_size() -> None:
    with pytest.raises(ValueError, match=r"\(1, 3, 112, 98\): this model takes \(B, 3, 112, 112\)"):
        dinov2.dinov2_vit_tiny()(torch.zeros(1, 3, 112, 98))
    with pytest.raises(ValueError, match="image_size=100"):
        dinov2.dinov2_vit_tiny(image_size=100)
    with pytest.raises(ValueError, match="patch_size=8"):
        dinov2.dinov2_vit_tiny(patch_size=8)


@pytest.mark.parametrize("registers", (0, 4))
def test_backbone_uses_every_parameter_and_any_shape(registers: int) -> None:
    torch.manual_seed(0)
    backbone = rsmodels.create_backbone(
        "dinov2_vit_tiny", out_indices=(0, 2), image_size=(56, 84), registers=registers
    )
    maps = backbone(torch.randn(2, 3, 56, 84))
    assert [tuple(m.shape) for m in maps] == [(2, 128, 4, 6)] * 2
    assert backbone.feature_info.reduction() == [14, 14]
    sum(m.square().mean() for m in maps).backward()
    assert all(p.grad is not None for p in backbone.parameters())


def test_backends_and_checkpointing_agree() -> None:
    torch.manual_seed(0)
    encoder = dinov2.dinov2_vit_tiny(image_size=70, registers=4)
    images = torch.randn(2, 3, 70, 70)

    def gradients() -> list[Tensor]:
        encoder.zero_grad()
        encoder(images).square().mean().backward()
        return [p.grad for p in encoder.parameters() if p.grad is not None]

    with rskernels.backend("reference"):
        expected = gradients()
    for checkpointing in (False, True):
        encoder.set_activation_checkpointing(checkpointing)
        for ours, theirs in zip(gradients(), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_exports_and_compiles() -> None:
    encoder = dinov2.dinov2_vit_tiny(image_size=56).eval()
    images = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        expected = encoder(images)
        torch.testing.assert_close(torch.export.export(encoder, (images,)).module()(images), expected)
        compiled = torch.compile(encoder, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(images), expected)


@pytest.mark.parametrize("size", ((84, 84), (126, 56), (70, 70)))
def test_positions_of_a_grid_that_is_no_square(size: tuple[int, int]) -> None:
    """4x9 patches are as many as 6x6 and 9x4: the count alone does not tell the grid."""
    saved = draw(dinov2.dinov2_vit_tiny(image_size=(56, 126))).state_dict()
    before = saved["pos_embed"].clone()
    encoder = dinov2.dinov2_vit_tiny(image_size=size)
    h, w = size[0] // 14, size[1] // 14
    changed = encoder.resize_state(saved, saved_size=[56, 126])
    assert changed == {"pos_embed": f"4x9 → {h}x{w} patches, bicubic"}
    grid = before[0, 1:].T.reshape(1, 128, 4, 9)
    expected = F.interpolate(grid, size=(h, w), mode="bicubic", align_corners=False)
    torch.testing.assert_close(saved["pos_embed"][:, 1:], expected.flatten(2).transpose(1, 2))
    assert torch.equal(saved["pos_embed"][:, 0], before[:, 0])


def test_a_grid_that_nobody_tells_has_to_be_a_square() -> None:
    wide = dinov2.dinov2_vit_tiny(image_size=(56, 112))  # 4x8
    with pytest.raises(ValueError, match=r"pos_embed has 32 positions .*expected a square grid"):
        wide.resize_state(wide.state_dict())
    with pytest.raises(ValueError, match="images of 56x56 pixels have 4x4 patches of 14"):
        wide.resize_state(wide.state_dict(), saved_size=(56, 56))
    assert wide.resize_state(wide.state_dict(), saved_size=(56, 112)) == {}
    square = dinov2.dinov2_vit_tiny(image_size=84).state_dict()
    assert dinov2.dinov2_vit_tiny(image_size=(56, 126)).resize_state(square) == {
        "pos_embed": "6x6 → 4x9 patches, bicubic"
    }
