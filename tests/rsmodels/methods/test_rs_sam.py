"""methods/rs_sam.py and sam_lora.py: parameter counts of the paper, every switch, every option."""

import itertools
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import rsmodels
from rsmodels.methods.losses import segmentation_losses
from rsmodels.registry import parameter_counts

ROOT = Path(__file__).resolve().parents[3]
# Table 7, in millions, at image size 512 and one class (DeepGlobe).
PAPER = {
    "rs_sam_vit_b": 107.4,
    "rs_sam_vit_l": 324.13,
    "sam_lora_vit_b": 90.36,
    "sam_lora_vit_l": 308.12,
}
TABLE_5 = [
    dict(neck=False, mff=False, mhff=False),
    dict(neck=True, mff=False, mhff=False),
    dict(neck=True, mff=True, mhff=False),
    dict(neck=True, mff=False, mhff=True),
    dict(neck=True, mff=True, mhff=True),
]


def tiny(name: str = "rs_sam_tiny", *, num_classes: int = 2, image_size=64, **options):
    torch.manual_seed(0)
    return rsmodels.create_model(name, num_classes=num_classes, image_size=image_size, **options)


def on_meta(name: str, *, num_classes: int = 1, **options):
    with torch.device("meta"):
        return rsmodels.create_model(name, num_classes=num_classes, image_size=512, **options)


@pytest.mark.parametrize("name, millions", PAPER.items())
def test_parameter_counts_of_the_paper(name: str, millions: float) -> None:
    total, _ = parameter_counts(on_meta(name))["total"]
    assert total / 1e6 == pytest.approx(millions, rel=0.03)


def test_model_card_is_true() -> None:
    """docs/methods/rs_sam.md prints the count per module; the table is checked cell by cell."""
    rows = re.findall(r"^\| (\w+) \| (.+) \|$", (ROOT / "docs/methods/rs_sam.md").read_text(), re.MULTILINE)
    names = ["rs_sam_vit_b", "rs_sam_vit_l", "rs_sam_vit_h", "sam_lora_vit_b", "rs_sam_tiny"]
    table = {module: cells.split(" | ") for module, cells in rows}
    for column, name in enumerate(names):
        model = rsmodels.create_model(name, num_classes=1) if name.endswith("tiny") else on_meta(name)
        counts = parameter_counts(model)
        for module in ("encoder", "neck", "decoders", "mff", "mhff", "upscaling", "total"):
            expected = f"{counts[module][0]:,}" if module in counts else "–"
            assert table[module][column] == expected, (name, module)
        assert table["trainable"][column] == f"{counts['total'][1]:,}", name


@pytest.mark.parametrize("switches", TABLE_5)
def test_table_5(switches: dict[str, bool]) -> None:
    model = tiny(**switches).train()
    image, mask = torch.randn(2, 3, 64, 64), torch.randint(0, 2, (2, 64, 64))
    assert model(image).shape == (2, 2, 64, 64)
    sum(model.losses({"image": image, "mask": mask}).values()).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert len(model.decoders) == (4 if switches["neck"] else 1)
    assert (model.mhff is None) != (model.upscaling is None)
    scales = [f.shape[-1] for f in model.forward_features(image)]
    assert scales == ([16, 8, 4, 2] if switches["neck"] else [4])


def test_all_switches_off_is_the_baseline() -> None:
    off, baseline = tiny(neck=False, mff=False, mhff=False), tiny("sam_lora_tiny")
    assert {k: v.shape for k, v in off.state_dict().items()} == {
        k: v.shape for k, v in baseline.state_dict().items()
    }


@pytest.mark.parametrize("switches", [dict(mff=True, mhff=False), dict(mff=False, mhff=True), {}])
def test_mprm_needs_the_neck(switches: dict[str, bool]) -> None:
    with pytest.raises(ValueError, match="neck=False with mff="):
        tiny(neck=False, **switches)


def test_mff_sums_the_scales() -> None:
    """With MFF the coarse tokens reach the embedding by themselves; without, through the finer ones only."""
    image = torch.randn(1, 3, 64, 64)
    for mff in (True, False):
        model = tiny(mff=mff).eval()
        seen = []
        model.mff.register_forward_pre_hook(lambda _m, args, seen=seen: seen.append(args[0]))
        outputs = []
        for decoder in model.decoders:
            decoder.register_forward_hook(lambda _m, _i, out, outputs=outputs: outputs.append(out[1]))
        with torch.no_grad():
            model(image)
        assert len(outputs) == 4
        torch.testing.assert_close(seen[0], sum(outputs) if mff else outputs[-1])


def test_decoders_run_coarse_to_fine_and_hand_on_tokens() -> None:
    model = tiny().eval()
    calls = []
    for decoder in model.decoders:
        decoder.register_forward_hook(lambda _m, args, out: calls.append((args, out)))
    with torch.no_grad():
        model(torch.randn(1, 3, 64, 64))
        pyramid = model.forward_features(torch.randn(1, 3, 64, 64))
    assert [args[0].shape[-1] for args, _ in calls] == [2, 4, 8, 16] == [f.shape[-1] for f in pyramid[::-1]]
    assert torch.equal(calls[0][0][2][0], model.mask_tokens)
    for (_, previous), (args, _) in itertools.pairwise(calls):
        assert torch.equal(args[2], previous[1])
    size = calls[1][0][1].shape[-2:]
    assert torch.equal(calls[1][0][1], model.pe_layer(size))


def test_no_mask_embed_is_added() -> None:
    model = tiny().eval()
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = model(image)
        model.no_mask_embed.add_(1.0)
        assert not torch.allclose(model(image), before)


@pytest.mark.parametrize("options, blocks", [({}, (3, 3, 3, 3)), ({"neck_source": "layers"}, (0, 1, 2, 3))])
def test_neck_source(options, blocks: tuple[int, ...]) -> None:
    model = tiny(**options)
    assert model.neck_blocks == blocks
    assert model(torch.randn(1, 3, 64, 64)).isfinite().all()


def test_neck_source_of_vit_b_is_table_6() -> None:
    assert on_meta("rs_sam_vit_b", neck_source="layers").neck_blocks == (2, 5, 8, 11)  # 3rd, 6th, 9th, 12th
    assert on_meta("rs_sam_vit_b").early_block == 2


@pytest.mark.parametrize("block", [0, 1, 3])
def test_early_block(block: int) -> None:
    model = tiny(early_block=block).eval()
    taken, blocks = [], []
    model.mhff.up_early.register_forward_pre_hook(lambda _m, args: taken.append(args[0]))
    model.encoder.blocks[block].register_forward_hook(lambda _m, _i, out: blocks.append(out))
    with torch.no_grad():
        model(torch.randn(1, 3, 64, 64))
    assert torch.equal(taken[0], blocks[0].permute(0, 3, 1, 2))
    assert tiny().early_block == 1  # the first global block


def test_prediction_is_the_product_of_both_fusions() -> None:
    model = tiny(num_classes=3, mff_last_relu=True).eval()
    parts = {}
    for name in ("mff", "mhff"):
        getattr(model, name).register_forward_hook(lambda _m, _i, out, name=name: parts.update({name: out}))
    with torch.no_grad():
        logits = model(torch.randn(2, 3, 64, 64))
    assert parts["mff"].shape == (2, 3, 32) and parts["mhff"].shape == (2, 32, 16, 16)
    assert parts["mff"].min() >= 0  # eq. (5) to the letter
    small = torch.einsum("bchw,bkc->bkhw", parts["mhff"], parts["mff"])
    torch.testing.assert_close(logits, F.interpolate(small, (64, 64), mode="bilinear"))


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_loss_weights(activation: str) -> None:
    model = tiny(num_classes=3, activation=activation).eval()
    batch = {"image": torch.randn(1, 3, 64, 64), "mask": torch.randint(0, 3, (1, 64, 64))}
    with torch.no_grad():
        losses = model.losses(batch)
        terms = segmentation_losses(model(batch["image"]), batch["mask"], activation=activation)
    assert losses == {"ce": 0.2 * terms["ce"], "dice": 0.8 * terms["dice"]}


@pytest.mark.parametrize("size", [(64, 96), (256, 256)])
def test_other_sizes(size: tuple[int, int]) -> None:
    with torch.no_grad():
        assert tiny(image_size=size)(torch.randn(1, 3, *size)).shape == (1, 2, *size)


def test_sizes_that_a_scale_does_not_divide() -> None:
    with pytest.raises(ValueError, match=r"image_size=80: .*multiple of 32"):
        tiny(image_size=80)
    assert tiny("sam_lora_tiny", image_size=80).image_size == (80, 80)


@pytest.mark.parametrize(
    "options",
    [dict(neck_source="first"), dict(activation="tanh"), dict(early_block=4), dict(lora_rank=-1)],
)
def test_bad_options_are_named(options) -> None:
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=re.escape(f"{name}={value!r}")):
        tiny(**options)


def test_without_lora() -> None:
    model = tiny(lora_rank=0, freeze_encoder=True)
    assert not any(p.requires_grad for p in model.encoder.parameters())
    model(torch.randn(1, 3, 64, 64)).sum().backward()
    assert all(p.requires_grad for p in tiny(lora_rank=0, freeze_encoder=False).parameters())


@pytest.mark.parametrize("name", ["rs_sam_tiny", "sam_lora_tiny"])
@pytest.mark.parametrize("freeze", [True, False])
def test_frozen_encoder(name: str, freeze: bool) -> None:
    model = tiny(name, freeze_encoder=freeze)
    trains = {n for n, p in model.encoder.named_parameters() if p.requires_grad}
    lora = {n for n, _ in model.encoder.named_parameters() if ".lora_" in n}
    carries_lora = {
        n for n, _ in model.encoder.named_parameters() if n.endswith((".qkv.weight", ".qkv.bias"))
    }
    everything = {n for n, _ in model.encoder.named_parameters()}
    assert lora and trains == (lora if freeze else everything - carries_lora)


def test_merged_model_predicts_the_same() -> None:
    model = tiny().eval()
    for block in model.encoder.blocks:
        torch.nn.init.normal_(block.attn.qkv.lora_b_q, std=0.2)
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = model(image)
        model.merge_lora()
        torch.testing.assert_close(model(image), before, rtol=1e-3, atol=1e-4)
        model.unmerge_lora()
        assert torch.equal(model(image), before)


def test_four_bands() -> None:
    model = tiny(in_chans=4, in_chans_mode="learned", bands=(4, 3, 2, 1), freeze_encoder=True)
    assert len(model.preprocessing.mean) == 4 and model.preprocessing.bands == (4, 3, 2, 1)
    image = model.preprocessing.normalize(torch.randint(0, 255, (1, 4, 64, 64)))
    model(image).sum().backward()
    assert model.encoder.patch_embed.proj.weight.grad is not None
    with pytest.raises(ValueError, match="in_chans=4"):
        tiny(in_chans=4)
    with pytest.raises(ValueError, match="one value per band"):
        tiny(bands=(1, 2, 3, 4))
