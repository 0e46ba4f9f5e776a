"""heads/mask2former.py and heads/pixel_decoder.py: equal to transformers' Mask2Former on the same weights."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

from rsmodels.heads.mask2former import Mask2FormerHead, Mask2FormerOutput, semantic_scores
from rsmodels.heads.mask2former_weights import from_transformers
from rsmodels.layers import resize

CHANNELS = (8, 16, 32, 64)
EVEN = ((16, 24), (8, 12), (4, 6), (2, 3))
ODD = ((17, 13), (9, 7), (5, 4), (3, 2))
SIZES = {
    "num_queries": 7,
    "dim": 32,
    "num_heads": 4,
    "encoder_layers": 2,
    "encoder_mlp_dim": 48,
    "decoder_layers": 4,
    "decoder_mlp_dim": 40,
}


@pytest.fixture(scope="module")
def theirs() -> Mask2FormerForUniversalSegmentation:
    swin = SwinConfig(
        image_size=64,
        embed_dim=CHANNELS[0],
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 1, 1],
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = Mask2FormerConfig(
        backbone_config=swin,
        feature_size=SIZES["dim"],
        mask_feature_size=SIZES["dim"],
        hidden_dim=SIZES["dim"],
        encoder_feedforward_dim=SIZES["encoder_mlp_dim"],
        dim_feedforward=SIZES["decoder_mlp_dim"],
        encoder_layers=SIZES["encoder_layers"],
        decoder_layers=SIZES["decoder_layers"] + 1,  # counts the prediction of the queries alone
        num_attention_heads=SIZES["num_heads"],
        num_queries=SIZES["num_queries"],
        num_labels=5,
    )
    model = Mask2FormerForUniversalSegmentation(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():  # those that start at 0 or 1 shall matter
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def their_output(model: Mask2FormerForUniversalSegmentation, features: list[Tensor]) -> Mask2FormerOutput:
    pixels = model.model.pixel_level_module.decoder(features)
    found = model.model.transformer_module(
        pixels.multi_scale_features, pixels.mask_features, output_hidden_states=True
    )
    classes = [model.class_predictor(tokens.transpose(0, 1)) for tokens in found.intermediate_hidden_states]
    return Mask2FormerOutput(classes, list(found.masks_queries_logits))


def our_head(model: Mask2FormerForUniversalSegmentation, **options) -> Mask2FormerHead:
    head = Mask2FormerHead(CHANNELS, 5, **{**SIZES, **options})
    head.load_state_dict(from_transformers(model.state_dict()))
    return head


def make_features(sizes=EVEN, batch: int = 2, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(batch, channels, *size, generator=generator)
        for channels, size in zip(CHANNELS, sizes, strict=True)
    ]


def projected(output: Mask2FormerOutput) -> Tensor:
    """One number that depends on every output."""
    generator = torch.Generator().manual_seed(2)
    flat = torch.cat([x.flatten() for x in (*output.classes, *output.masks)])
    return (flat * torch.randn(flat.shape, generator=generator)).mean()


@pytest.mark.parametrize("sizes, batch", [(EVEN, 2), (ODD, 1)])
def test_equals_transformers(theirs: Mask2FormerForUniversalSegmentation, sizes: tuple, batch: int) -> None:
    head = our_head(theirs)
    features = [x.requires_grad_() for x in make_features(sizes, batch)]
    copies = [x.detach().clone().requires_grad_() for x in features]
    expected = their_output(theirs, copies)
    mask_features, levels = head.pixel_decoder(features)
    pixels = theirs.model.pixel_level_module.decoder(copies)
    torch.testing.assert_close(mask_features, pixels.mask_features, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(tuple(levels), pixels.multi_scale_features, rtol=1e-4, atol=1e-4)

    found = head(features)
    assert len(found.classes) == len(found.masks) == SIZES["decoder_layers"] + 1
    assert found.classes[0].shape == (batch, 7, 6) and found.masks[0].shape == (batch, 7, *sizes[0])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    if sizes == EVEN:  # the masks differ from stage to stage, and hide something and not all
        hidden = [(mask < 0).float().mean() for mask in found.masks]
        assert all(0.05 < share < 0.95 for share in hidden) and len(set(hidden)) == len(hidden)

    theirs.zero_grad()
    projected(expected).backward()
    projected(found).backward()
    gradients = {k: p.grad for k, p in theirs.named_parameters() if p.grad is not None}
    expected_gradients = from_transformers(gradients)
    ours = dict(head.named_parameters())
    assert ours.keys() == expected_gradients.keys()
    for name, parameter in ours.items():
        assert parameter.grad is not None
        scale = expected_gradients[name].abs().max().item()
        torch.testing.assert_close(
            parameter.grad, expected_gradients[name], rtol=1e-3, atol=1e-4 * max(scale, 1e-3), msg=name
        )
    for ours_grad, theirs_grad in zip(features, copies, strict=True):
        torch.testing.assert_close(ours_grad.grad, theirs_grad.grad, rtol=1e-3, atol=1e-6)


def test_a_query_masked_everywhere_attends_everywhere(theirs: Mask2FormerForUniversalSegmentation) -> None:
    head = our_head(theirs)
    state = {key: tensor.clone() for key, tensor in theirs.state_dict().items()}
    try:
        projection = theirs.model.pixel_level_module.decoder.mask_projection
        with torch.no_grad():
            for p in (projection, head.pixel_decoder.mask_projection):
                p.weight.zero_()
                p.bias.fill_(1.0)
            last = theirs.model.transformer_module.decoder.mask_predictor.mask_embedder.layers[-1].layers[0]
            for p in (last, head.mask_mlp[-1]):
                p.weight.zero_()
                p.bias.fill_(-1.0)
        features = make_features()
        found, expected = head(features), their_output(theirs, features)
        assert all((mask < 0).all() for mask in found.masks)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        projected(found).backward()
        assert all(torch.isfinite(p.grad).all() for p in head.parameters())
    finally:
        theirs.load_state_dict(state)


def test_default_sizes_are_the_published_ones() -> None:
    with torch.device("meta"):
        head = Mask2FormerHead([256, 512, 1024, 2048], 150)
    # Published: 44 M with a ResNet-50 of 23.5 M (conv and norms), on 133 classes: about 20.5 M for the head.
    assert sum(p.numel() for p in head.parameters()) == pytest.approx(20.5e6, rel=0.02)
    assert len(head.layers) == 9 and len(head.pixel_decoder.layers) == 6


def test_first_sampling_offsets_are_the_authors() -> None:
    config = {"feature_size": 64, "mask_feature_size": 64, "hidden_dim": 64, "num_attention_heads": 8}
    swin = SwinConfig(
        image_size=64,
        embed_dim=8,
        depths=[1] * 4,
        num_heads=[1] * 4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    model = Mask2FormerForUniversalSegmentation(
        Mask2FormerConfig(backbone_config=swin, encoder_layers=1, decoder_layers=2, **config)
    )
    expected = from_transformers(model.state_dict())["pixel_decoder.layers.0.attention.sampling_offsets.bias"]
    attention = Mask2FormerHead(CHANNELS, 5, dim=64).pixel_decoder.layers[0].attention
    torch.testing.assert_close(attention.sampling_offsets.bias.detach(), expected)
    assert not attention.sampling_offsets.weight.any() and not attention.attention_weights.weight.any()


def test_queries_from_outside(theirs: Mask2FormerForUniversalSegmentation) -> None:
    head = our_head(theirs)
    bare = Mask2FormerHead(CHANNELS, 5, **{**SIZES, "num_queries": None})
    missing, unexpected = bare.load_state_dict(head.state_dict(), strict=False)
    assert not missing and set(unexpected) == {"query_position", "query_features"}
    features = make_features()
    position = head.query_position.detach().clone().requires_grad_()
    content = head.query_features.detach().clone().requires_grad_()
    found = bare(features, (position, content))
    torch.testing.assert_close(found, head(features), rtol=0, atol=0)
    projected(found).backward()
    assert position.grad.abs().sum() > 0 and content.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="num_queries=None"):
        bare(features)
    with pytest.raises(ValueError, match=r"\(7, 16\).*\(Q, 32\)"):
        bare(features, (position[:, :16], content[:, :16]))


def test_maps_of_one_size_are_resized_to_the_levels() -> None:
    """A plain ViT's four maps: the same as resizing them before the head, gradients too."""
    torch.manual_seed(0)
    head = Mask2FormerHead([24] * 4, 3, **SIZES).double()
    sizes = [(16, 20), (8, 10), (4, 5), (2, 3)]
    features = torch.randn(4, 2, 24, 4, 5, dtype=torch.float64, requires_grad=True)
    resized = [resize(x, size) for x, size in zip(features, sizes, strict=True)]
    expected, found = head(resized), head(list(features), sizes=sizes)
    for a, b in zip(expected.classes + expected.masks, found.classes + found.masks, strict=True):
        torch.testing.assert_close(a, b)
    loss_a, loss_b = (output.masks[-1].square().sum() for output in (expected, found))
    torch.testing.assert_close(*(torch.autograd.grad(loss, features)[0] for loss in (loss_a, loss_b)))


@pytest.mark.parametrize(
    "channels, options, expected",
    [
        ((8, 16, 32), {}, "four maps"),
        (CHANNELS, {"dim": 30, "num_heads": 3, "norm_groups": 3}, "multiple of 4"),
        (CHANNELS, {"dim": 64, "num_heads": 3}, "num_heads=3"),
        (CHANNELS, {"dim": 48}, "norm_groups=32"),
        (CHANNELS, {"num_heads": 0}, "num_heads=0"),
        (CHANNELS, {"num_queries": 0}, "num_queries=0"),
        (CHANNELS, {"encoder_mlp_dim": -1}, "encoder_mlp_dim=-1"),
        (CHANNELS, {"decoder_layers": 0}, "decoder_layers=0"),
    ],
)
def test_sizes_that_do_not_fit(channels: tuple, options: dict, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        Mask2FormerHead(channels, 5, **options)


@pytest.mark.parametrize("size", [(16, 24), (37, 50)])
def test_semantic_scores(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    classes, masks = torch.randn(2, 20, 6), 3 * torch.randn(2, 20, 16, 24)
    output = Mask2FormerOutput([torch.zeros(2, 20, 6), classes], [torch.zeros(2, 20, 16, 24), masks])
    found = semantic_scores(output, size)
    resized = F.interpolate(masks.double(), size=size, mode="bilinear").sigmoid()
    expected = torch.einsum("bqk,bqhw->bkhw", classes.double().softmax(-1)[..., :5], resized)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    half = Mask2FormerOutput([classes.bfloat16()], [masks.bfloat16()])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = semantic_scores(half, size)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low.double(), expected, rtol=0.05, atol=0.05)


def test_compiles_without_a_break() -> None:
    head = Mask2FormerHead(CHANNELS, 5, num_queries=7, dim=32, encoder_layers=1, decoder_layers=1)
    features = make_features(ODD)
    compiled = torch.compile(head, fullgraph=True, backend="eager")
    torch.testing.assert_close(tuple(compiled(features)), tuple(head(features)), rtol=1e-4, atol=1e-4)


def test_bf16_autocast(theirs: Mask2FormerForUniversalSegmentation) -> None:
    head = our_head(theirs)
    features = make_features(ODD)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = head(features)
        mask_features, _ = head.pixel_decoder(features)
    wanted, _ = head.pixel_decoder(features)
    assert mask_features.dtype == torch.bfloat16
    # Later stages may attend elsewhere: a mask logit near 0 has another sign. The pixels' embedding must not.
    assert ((mask_features - wanted).norm() / wanted.norm()).item() < 0.03
    projected(Mask2FormerOutput(*([x.float() for x in part] for part in found))).backward()
    assert all(torch.isfinite(p.grad).all() and p.grad.abs().sum() > 0 for p in head.parameters())
