"""methods/rein.py: a frozen encoder, tokens after its blocks, Mask2Former, and nothing else."""

import hashlib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rsmodels
from rsmodels.encoders.dinov2 import dinov2_vit_tiny
from rsmodels.methods.crossearth import CrossEarth
from rsmodels.training.build import make_optimizer
from rsmodels.training.config import OptimConfig

SIZE = 64
TAPS = (0, 1, 2, 3)
FROZEN = dict.fromkeys(("rein", "gse", "mim", "style"), False)


def build(name: str = "rein_tiny", **options) -> CrossEarth:
    torch.manual_seed(0)
    return rsmodels.create_model(name, num_classes=3, image_size=SIZE, **options).train()


def batch_for(size: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(size, 3, SIZE, SIZE, generator=generator)
    return {"image": image, "mask": torch.randint(0, 3, (size, SIZE, SIZE), generator=generator)}


def bits(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode() + value.numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize(
    "name, options",
    [("rein_tiny", {}), ("crossearth_tiny", FROZEN), ("crossearth_tiny", {"style_probability": 0.5})],
)
def test_nothing_frozen_ever_changes(name: str, options: dict) -> None:
    """Bit for bit, over steps of the trainer's own optimiser, which holds no state for it."""
    model = build(name, **options)
    frozen = dict(model.encoder.named_parameters())
    assert frozen and not any(p.requires_grad for p in frozen.values())
    before, trained = bits(model.encoder), bits(model.head)
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    optimizer = make_optimizer(model, OptimConfig(lr=1e-2, weight_decay=0.5))
    for _ in range(3):
        sum(model.losses(batch_for()).values()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert bits(model.encoder) == before and bits(model.head) != trained
    assert all(p.grad is None for p in frozen.values())
    assert not any(p in optimizer.state for p in frozen.values())
    assert all(torch.equal(b, buffers[n]) for n, b in model.named_buffers())
    known = ("rein.", "head.", "gse.", "injectors.", "mim.")
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if n.startswith(known)
    }


def test_tokens_and_embeddings_do_not_decay() -> None:
    model = build("crossearth_tiny")
    decayed, spared = (group["params"] for group in make_optimizer(model, OptimConfig(lr=1.0)).param_groups)
    names = {id(p): n for n, p in model.named_parameters()}
    of = {names[id(p)] for p in spared if p.ndim >= 2}
    assert of == {
        "rein.token_a",
        "rein.token_b",
        "mim.prompt",
        "head.level_embed",
        "head.pixel_decoder.level_embed",
    }
    assert "rein.scale" in {names[id(p)] for p in spared}
    assert {"head.class_predictor.weight", "rein.mlp_token.weight"} <= {names[id(p)] for p in decayed}
    own = build("crossearth_tiny", **FROZEN)
    assert {"head.query_position", "head.query_features"} <= own.no_weight_decay()


@torch.no_grad()
def test_what_the_decoder_sees() -> None:
    """The blocks one after the other, tokens after each, raw taps, each resized from its own stage."""
    model = build()
    model.rein.scale.fill_(0.3)  # at its first value it would hardly show
    image = batch_for()["image"]
    x = model.encoder.embed(image)
    expected = []
    for i, block in enumerate(model.encoder.blocks):
        x = model.rein(block(x), i, 1)
        side = SIZE // (4, 8, 16, 32)[i]
        stage = x[:, 1:].mT.unflatten(2, (4, 4))
        expected.append(F.interpolate(stage, size=(side, side), mode="bilinear", align_corners=False))
    for found, wanted in zip(model.forward_features(image), expected, strict=True):
        torch.testing.assert_close(found, wanted)


@torch.no_grad()
def test_queries_are_the_tokens() -> None:
    model = build().eval()
    image = batch_for()["image"]
    seen = []
    model.head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1]))
    model(image)
    for given, own in zip(seen[0], model.rein.queries(), strict=True):
        torch.testing.assert_close(given, own)
    assert model.head.query_position is None
    assert build("crossearth_tiny", **FROZEN).head.query_position.shape == (20, 64)


@torch.no_grad()
def test_logits_are_the_logarithms_of_the_scores() -> None:
    """So that a softmax over them is the scores, scaled; a binary model's one logit is their contrast."""
    for classes in (1, 3):
        torch.manual_seed(0)
        model = rsmodels.create_model("rein_tiny", num_classes=classes, image_size=SIZE).eval()
        image = batch_for()["image"]
        outputs = []
        model.head.register_forward_hook(lambda module, inputs, output, kept=outputs: kept.append(output))
        found = model.probabilities(model(image))
        chance = outputs[0].classes[-1].softmax(-1)[..., :-1]
        masks = F.interpolate(outputs[0].masks[-1], size=(SIZE, SIZE), mode="bilinear").sigmoid()
        scores = torch.einsum("bqk,bqhw->bkhw", chance, masks)
        expected = scores / scores.sum(1, keepdim=True)
        torch.testing.assert_close(found, expected if classes > 1 else expected[:, 1:], rtol=1e-4, atol=1e-4)


def test_without_rein_no_gradient_runs_through_the_encoder() -> None:
    """And nothing of it is kept for a backward pass."""
    model = build("crossearth_tiny", **FROZEN)
    data = batch_for()
    alone: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: alone.append(t.numel()) or t, lambda t: t):
        stages = model._encode(data["image"])
    assert not alone and not any(stage.requires_grad for stage in stages)
    sum(model.losses(data).values()).backward()
    assert all(p.grad is not None for p in model.head.parameters())


def test_checkpointing_keeps_the_inputs_of_blocks_alone() -> None:
    model = build()
    image = batch_for()["image"]
    tokens = 2 * 17 * 128
    kept: dict[bool, int] = {}
    for enabled in (False, True):
        model.set_activation_checkpointing(enabled)
        sizes: dict[int, int] = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, sizes=sizes: sizes.update({t.untyped_storage().data_ptr(): t.numel()}) or t, lambda t: t
        ):
            model._encode(image)
        kept[enabled] = sum(sizes.values())
    assert kept[True] <= 4 * tokens and kept[False] > 40 * tokens


def test_the_larger_models_checkpoint_unless_told_not_to() -> None:
    with torch.device("meta"):
        model = rsmodels.create_model("rein_vit_s", num_classes=2, image_size=SIZE)
    assert model.encoder.activation_checkpointing and not build().encoder.activation_checkpointing
    model.set_activation_checkpointing(False)
    assert not model.encoder.activation_checkpointing


@pytest.mark.parametrize(
    "variant, taps",
    [("s", (2, 5, 8, 11)), ("b", (2, 5, 8, 11)), ("l", (7, 11, 15, 23)), ("g", (9, 19, 29, 39))],
)
def test_published_variants(variant: str, taps: tuple[int, ...]) -> None:
    for family in ("rein", "crossearth"):
        with torch.device("meta"):
            model = rsmodels.create_model(f"{family}_vit_{variant}", num_classes=6, registers=4)
        assert (model.taps, model.image_size, model.encoder.patch_size) == (taps, (512, 512), 16)
        assert model.rein.token_a.shape == (len(model.encoder.blocks), 100, 16)
        assert model.encoder.prefix_tokens == 5


def test_pretrained_weights_of_patch_14_load(tmp_path: Path) -> None:
    torch.manual_seed(1)
    encoder = dinov2_vit_tiny(image_size=112)
    path = tmp_path / "dinov2.pth"
    torch.save(encoder.state_dict(), path)
    model = build(pretrained=str(path))
    assert model.base_weights is not None
    assert torch.equal(model.encoder.blocks[2].mlp.fc1.weight, encoder.blocks[2].mlp.fc1.weight)
    assert model.encoder.patch_embed.proj.weight.shape[-1] == 16


def test_saved_and_loaded_at_another_size(tmp_path: Path) -> None:
    model = build().eval()
    rsmodels.save_model(model, tmp_path / "best")
    image = batch_for()["image"]
    loaded, _ = rsmodels.load_model(tmp_path / "best")
    larger, _ = rsmodels.load_model(tmp_path / "best", image_size=96)
    with torch.no_grad():
        assert torch.equal(loaded(image), model(image))
        assert larger(torch.randn(1, 3, 96, 96)).shape == (1, 3, 96, 96)


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"mim_loss": "mse"}, "rein_tiny has no option 'mim_loss'"),
        ({"gse": True}, "rein_tiny has no option 'gse'"),
        ({"taps": (0, 1, 3)}, r"taps=\(0, 1, 3\): expected 4 ascending block indices from 0 to 3"),
        ({"taps": (1, 2, 3, 4)}, "from 0 to 3"),
        ({"num_queries": 1}, "tokens=1"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(options: dict, expected: str) -> None:
    with pytest.raises(ValueError, match=expected) as error:
        build(**options)
    assert "\n" not in str(error.value)


def test_rein_without_rein_is_no_model_of_that_name() -> None:
    with pytest.raises(ValueError, match="rein_tiny has no option 'rein'"):
        build(rein=False)
