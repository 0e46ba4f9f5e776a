"""encoders/sam_vit.py: SAM parameter for parameter and number for number; LoRA; other sizes and bands."""

from collections.abc import Callable
from functools import partial

import pytest
import segment_anything.modeling as sam
import torch
from torch import Tensor, nn

import rskernels
import rsmodels
from rsmodels.encoders.sam_vit import SamViT, sam_vit_b, sam_vit_h, sam_vit_l

RelativeError = Callable[[Tensor, Tensor], float]

OFFICIAL = {
    "vit_b": (sam_vit_b, dict(embed_dim=768, depth=12, num_heads=12, global_attn_indexes=(2, 5, 8, 11))),
    "vit_l": (sam_vit_l, dict(embed_dim=1024, depth=24, num_heads=16, global_attn_indexes=(5, 11, 17, 23))),
    "vit_h": (sam_vit_h, dict(embed_dim=1280, depth=32, num_heads=16, global_attn_indexes=(7, 15, 23, 31))),
}


def official(image_size: int, *, window_size: int = 14, out_chans: int = 256, **sizes) -> nn.Module:
    return sam.ImageEncoderViT(
        img_size=image_size,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=window_size,
        out_chans=out_chans,
        **sizes,
    ).eval()


@torch.no_grad()
def draw(module: nn.Module, seed: int = 0) -> nn.Module:
    """Small random values for every parameter, those that start at zero included."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        std = 0.3 if "rel_pos" in name else 1.5 * parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.1
        parameter.copy_(std * torch.randn(parameter.shape, generator=generator) + ("norm" in name))
    return module


def backends() -> list[str]:
    return ["reference", *([] if "cpp" in rskernels.dispatch.UNAVAILABLE else ["cpp"])]


@pytest.mark.parametrize("variant", OFFICIAL)
def test_parameters_are_the_official_ones(variant: str) -> None:
    build, sizes = OFFICIAL[variant]
    with torch.device("meta"):
        ours, theirs = build().state_dict(), official(1024, **sizes).state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("image_size, window", [(64, 3), (64, 2), (96, 14), (16, 14)])
def test_equals_segment_anything(
    image_size: int, window: int, backend: str, relative_error: RelativeError
) -> None:
    """With windows that do not divide the grid: padded tokens are attended to, as SAM does."""
    sizes = dict(embed_dim=32, depth=3, num_heads=2)
    theirs = draw(official(image_size, window_size=window, out_chans=16, global_attn_indexes=(1,), **sizes))
    ours = SamViT(32, 3, 2, (1,), image_size=image_size, window_size=window, neck_dim=16)
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, image_size, image_size)
    with torch.no_grad(), rskernels.backend(backend):
        assert relative_error(ours(images), theirs(images)) < 1e-5


@pytest.mark.parametrize("backend", backends())
def test_gradients_equal_segment_anything(backend: str, relative_error: RelativeError) -> None:
    """Of every parameter, the qkv bias included: part of its gradient comes from the padded tokens."""
    sizes = dict(embed_dim=32, depth=2, num_heads=2)
    theirs = draw(official(64, window_size=3, out_chans=16, global_attn_indexes=(1,), **sizes))
    ours = SamViT(32, 2, 2, (1,), image_size=64, window_size=3, neck_dim=16)
    ours.load_state_dict(theirs.state_dict())
    images, upstream = torch.randn(2, 3, 64, 64), torch.randn(2, 16, 4, 4)
    (theirs(images) * upstream).sum().backward()
    with rskernels.backend(backend):
        (ours(images) * upstream).sum().backward()
    for name, parameter in theirs.named_parameters():
        assert relative_error(ours.get_parameter(name).grad, parameter.grad) < 1e-4, name


@pytest.mark.parametrize("backend", backends())
def test_lora_adds_nothing_to_padded_tokens(backend: str, relative_error: RelativeError) -> None:
    """The official encoder with the update folded into its weights pads after norm1, with zeros: so do we."""
    adapted = small(image_size=64, lora_rank=4)
    train_a_little(adapted)
    adapted.merge_lora()
    state = {k: v for k, v in adapted.state_dict().items() if ".lora_" not in k}
    for i, block in enumerate(adapted.blocks):
        state[f"blocks.{i}.attn.qkv.weight"] = block.attn.qkv.merged_weight
    adapted.unmerge_lora()
    theirs = official(
        64, window_size=3, out_chans=16, embed_dim=32, depth=3, num_heads=2, global_attn_indexes=(1,)
    )
    theirs.load_state_dict(state)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad(), rskernels.backend(backend):
        assert relative_error(adapted(images), theirs(images)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("image_size", [512, 1024])
def test_vit_b_equals_segment_anything(image_size: int, relative_error: RelativeError) -> None:
    build, sizes = OFFICIAL["vit_b"]
    theirs = draw(official(image_size, **sizes))
    ours = build(image_size=image_size)
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(1, 3, image_size, image_size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(images)
        for backend in backends():
            with rskernels.backend(backend):
                assert relative_error(ours(images), expected) < 1e-4, backend


def small(**options) -> SamViT:
    options = {"image_size": (64, 96), "window_size": 3, "neck_dim": 16, **options}
    encoder = SamViT(32, 3, 2, (1,), **options)
    draw(encoder)
    for block in encoder.blocks:
        if options.get("lora_rank"):
            block.attn.qkv.reset_lora()
    return encoder.eval()


@pytest.mark.parametrize("backend", backends())
def test_lora_starts_as_sam_to_the_last_bit(backend: str) -> None:
    adapted, plain = small(lora_rank=4), small()
    plain.load_state_dict({k: v for k, v in adapted.state_dict().items() if ".lora_" not in k})
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad(), rskernels.backend(backend):
        assert torch.equal(adapted(images), plain(images))


def train_a_little(encoder: SamViT) -> None:
    for name, parameter in encoder.named_parameters():
        if ".lora_b" in name:
            nn.init.normal_(parameter, std=0.2)


def test_merge_and_unmerge_lora(relative_error: RelativeError) -> None:
    encoder = small(lora_rank=4)
    train_a_little(encoder)
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        before = encoder(images)
        encoder.merge_lora()
        merged = encoder(images)
        encoder.unmerge_lora()
        assert relative_error(merged, before) < 1e-5
        assert torch.equal(encoder(images), before)


def test_freeze_leaves_lora() -> None:
    encoder = small(lora_rank=4)
    encoder.freeze()
    trainable = {name for name, p in encoder.named_parameters() if p.requires_grad}
    assert len(trainable) == 3 * 4 and all(".lora_" in name for name in trainable)


@pytest.mark.skipif("cpp" not in backends(), reason="the extension is not built")
def test_lora_gradients_equal_the_reference(relative_error: RelativeError) -> None:
    encoder = small(lora_rank=4)
    encoder.freeze()
    train_a_little(encoder)
    images, upstream = torch.randn(2, 3, 64, 96), torch.randn(2, 16, 4, 6)
    gradients = {}
    for backend in ("reference", "cpp"):
        encoder.zero_grad()
        with rskernels.backend(backend):
            (encoder(images) * upstream).sum().backward()
        gradients[backend] = {n: p.grad for n, p in encoder.named_parameters() if p.requires_grad}
    for name, expected in gradients["reference"].items():
        assert expected.abs().max() > 0
        assert relative_error(gradients["cpp"][name], expected) < 1e-4, name


def test_activation_checkpointing_gives_equal_gradients() -> None:
    encoder = small(lora_rank=4).train()
    train_a_little(encoder)
    images = torch.randn(2, 3, 64, 96)
    gradients = []
    for enabled in (False, True):
        encoder.set_activation_checkpointing(enabled)
        encoder.zero_grad()
        encoder(images).square().sum().backward()
        gradients.append([p.grad for p in encoder.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_checkpointing_recomputes_the_blocks() -> None:
    encoder = small().train()
    calls = []
    encoder.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    encoder.set_activation_checkpointing(True)
    encoder(torch.randn(1, 3, 64, 96)).sum().backward()
    assert len(calls) == 2


def test_wrong_input_is_named() -> None:
    encoder = small()
    for shape in ((1, 3, 96, 64), (1, 4, 64, 96), (3, 64, 96)):
        with pytest.raises(ValueError, match=r"takes \(B, 3, 64, 96\)") as error:
            encoder(torch.zeros(shape))
        assert str(shape) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("image_size", [100, (64, 90), 0])
def test_sizes_that_the_patch_does_not_divide(image_size) -> None:
    with pytest.raises(ValueError, match="multiple of 16"):
        small(image_size=image_size)


def test_other_bands_are_never_silent() -> None:
    with pytest.raises(ValueError, match=r"in_chans=4.*'repeat' or 'learned'"):
        small(in_chans=4)
    with pytest.raises(ValueError, match="in_chans_mode='guess'"):
        small(in_chans=4, in_chans_mode="guess")
    repeated = small(in_chans=4, in_chans_mode="repeat")
    assert repeated(torch.randn(1, 4, 64, 96)).shape == (1, 16, 4, 6)
    learned = small(in_chans=5, in_chans_mode="learned", lora_rank=2)
    learned.freeze()
    trainable = {n.split(".")[0] for n, p in learned.named_parameters() if p.requires_grad}
    assert trainable == {"patch_embed", "blocks"}


@pytest.mark.parametrize("bands", [4, 5, 6])
def test_repeated_bands_keep_the_magnitude(bands: int) -> None:
    weight = torch.ones(8, 3, 16, 16) * torch.tensor([1.0, 2.0, 3.0])[:, None, None]
    adapted = small(in_chans=bands, in_chans_mode="repeat").adapt_input_weight(weight)
    expected = torch.tensor([1.0, 2.0, 3.0, 1.0, 2.0, 3.0])[:bands] * 3 / bands
    torch.testing.assert_close(adapted[0, :, 0, 0], expected)


def test_backbone_is_timm_like() -> None:
    backbone = rsmodels.create_backbone("sam_vit_tiny", out_indices=(0, 2), image_size=(64, 96))
    features = backbone(torch.randn(2, 3, 64, 96))
    assert [tuple(f.shape) for f in features] == [(2, 128, 4, 6)] * 2
    info = backbone.feature_info
    assert info.channels() == [128, 128] and info.reduction() == [16, 16]
    assert info.module_name() == ["blocks.0", "blocks.2"]
    assert info.get_dicts(["num_chs", "module"])[1] == {"num_chs": 128, "module": "blocks.2"}
    assert len(info) == 2 and info[1]["index"] == 2 and info.out_indices == (0, 2)
    sum(f.sum() for f in features).backward()
    assert all(p.grad is not None for p in backbone.parameters())


def test_backbone_taps_are_the_blocks_outputs() -> None:
    torch.manual_seed(0)
    backbone = rsmodels.create_backbone("sam_vit_tiny", out_indices=(1, -1), image_size=64)
    seen = {}
    for i, block in enumerate(backbone.encoder.blocks):
        block.register_forward_hook(lambda _m, _i, out, i=i: seen.update({i: out}))
    features = backbone(torch.randn(1, 3, 64, 64))
    assert torch.equal(features[0], seen[1].permute(0, 3, 1, 2))
    assert torch.equal(features[1], seen[3].permute(0, 3, 1, 2))


@pytest.mark.parametrize("indices", [(), (2, 1), (0, 0), (4,), (-5,)])
def test_bad_out_indices(indices: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="0 to 3"):
        rsmodels.create_backbone("sam_vit_tiny", out_indices=indices)
