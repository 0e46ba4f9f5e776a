"""weights.py: every layout loads, what does not fit is one line of error, the report tells the rest."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from segment_anything.modeling import Sam

import rsmodels
from rsmodels import weights
from rsmodels.encoders.sam_vit import SamViT, sam_vit_tiny


def images(*, size: int = 128, seed: int = 0) -> torch.Tensor:
    return torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_official_layout(miniature_sam: Sam, tmp_path: Path, suffix: str) -> None:
    path, state = tmp_path / f"sam{suffix}", miniature_sam.state_dict()
    torch.save(state, path) if suffix == ".pth" else save_file(state, path)
    encoder = sam_vit_tiny()
    report = encoder.load_pretrained(str(path))
    with torch.no_grad():
        expected = miniature_sam.image_encoder(images())
        torch.testing.assert_close(encoder(images()), expected, rtol=1e-4, atol=1e-4)
    assert set(report.loaded) == set(encoder.state_dict())
    assert report.initialised == [] and report.resized == {}
    assert {key.split(".")[0] for key in report.dropped} == {"prompt_encoder", "mask_decoder"}
    assert report.sha256 == weights.sha256_of(path)


@pytest.mark.parametrize("wrapper", ["model", "state_dict"])
def test_wrapped_state_dicts(miniature_sam: Sam, tmp_path: Path, wrapper: str) -> None:
    torch.save({wrapper: miniature_sam.state_dict(), "epoch": 3}, tmp_path / "sam.pth")
    assert sam_vit_tiny().load_pretrained(str(tmp_path / "sam.pth")).initialised == []


@pytest.mark.parametrize("size", [96, 64, 160])
def test_timm_layout_and_resizing(tmp_path: Path, size: int) -> None:
    """timm resizes its tables at run time, we do at load time: the results agree at every size."""
    torch.manual_seed(0)
    sizes = dict(embed_dim=32, depth=3, num_heads=2, global_attn_indexes=(1,), window_size=3)
    theirs = timm.create_model("samvit_base_patch16", img_size=96, num_classes=0, **sizes).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "rel_pos" in name or "pos_embed" in name:
                torch.nn.init.normal_(parameter, std=0.3)
    save_file(theirs.state_dict(), tmp_path / "timm.safetensors")
    theirs.patch_embed.strict_img_size = False
    ours = SamViT(32, 3, 2, (1,), image_size=size, window_size=3, neck_dim=256).eval()
    report = ours.load_pretrained(str(tmp_path / "timm.safetensors"))
    with torch.no_grad():
        expected = theirs.forward_features(images(size=size))
        torch.testing.assert_close(ours(images(size=size)), expected, rtol=1e-4, atol=1e-4)
    changed = {"pos_embed", "blocks.1.attn.rel_pos_h", "blocks.1.attn.rel_pos_w"}
    assert set(report.resized) == (set() if size == 96 else changed)


def test_every_part_of_sam_finds_its_place(miniature_sam: Sam, sam_checkpoint: Path) -> None:
    model = rsmodels.create_model(
        "rs_sam_tiny", num_classes=3, embedding_dim=8, mhff=False, pretrained=str(sam_checkpoint)
    )
    state, official = model.state_dict(), miniature_sam.state_dict()
    pairs = {
        "encoder.blocks.2.attn.qkv.weight": "image_encoder.blocks.2.attn.qkv.weight",
        "neck.neck_16.2.weight": "image_encoder.neck.2.weight",
        **{
            f"decoders.{i}.layers.1.norm4.bias": "mask_decoder.transformer.layers.1.norm4.bias"
            for i in range(4)
        },
        "pe_layer.positional_encoding_gaussian_matrix": (
            "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"
        ),
        "upscaling.3.weight": "mask_decoder.output_upscaling.3.weight",
    }
    for ours, theirs in pairs.items():
        assert torch.equal(state[ours], official[theirs]), ours
    assert torch.equal(state["no_mask_embed"], official["prompt_encoder.no_mask_embed.weight"][0])
    assert model.base_weights == weights.sha256_of(sam_checkpoint)


def test_report_accounts_for_everything(miniature_sam: Sam, sam_checkpoint: Path, capsys) -> None:
    model = rsmodels.create_model("rs_sam_tiny", num_classes=3, image_size=64)
    capsys.readouterr()
    report = model.load_pretrained(str(sam_checkpoint))
    printed = capsys.readouterr().err
    assert printed.strip() == str(report)
    assert set(report.loaded) | set(report.initialised) == set(model.state_dict())
    assert not set(report.loaded) & set(report.initialised)
    used = {"image_encoder", "pe_layer", "transformer", "no_mask_embed"}
    kept = {k for k in miniature_sam.state_dict() if not used & set(k.split("."))}
    assert set(report.dropped) == kept
    assert "resized: encoder.pos_embed (8x8 → 4x4 tokens, bicubic)" in printed
    assert "resized: encoder.blocks.*.attn.rel_pos_h [2 tensors] (15 → 7 rows, linear)" in printed
    assert "newly initialised: encoder.blocks.*.attn.qkv.lora_a_q [4 tensors]" in printed
    assert "newly initialised: mask_tokens\n" in printed
    assert "dropped: mask_decoder.iou_token.weight (no place in a prompt-free model)" in printed
    assert "[4 tensors]" in printed and len(printed.splitlines()) < 120


def test_report_is_printed_by_the_first_rank_only(sam_checkpoint: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("RANK", "1")
    sam_vit_tiny().load_pretrained(str(sam_checkpoint))
    assert capsys.readouterr().err == ""


def test_encoder_alone_is_enough(miniature_sam: Sam, tmp_path: Path) -> None:
    """A bare encoder without its neck: decoders, neck and position encoding start anew, and it says so."""
    state = {k: v for k, v in miniature_sam.image_encoder.state_dict().items() if not k.startswith("neck.")}
    torch.save(state, tmp_path / "encoder.pth")
    model = rsmodels.create_model("sam_lora_tiny", num_classes=2)
    report = model.load_pretrained(str(tmp_path / "encoder.pth"))
    new = {name.split(".")[0] for name in report.initialised}
    assert new == {
        "encoder",
        "neck",
        "mask_tokens",
        "no_mask_embed",
        "pe_layer",
        "decoders",
        "mff",
        "upscaling",
    }
    assert all(".lora_" in name for name in report.initialised if name.startswith("encoder."))


def test_repeated_and_learned_bands(sam_checkpoint: Path, miniature_sam: Sam) -> None:
    official = miniature_sam.image_encoder.patch_embed.proj.weight
    repeat = sam_vit_tiny(in_chans=4, in_chans_mode="repeat")
    report = repeat.load_pretrained(str(sam_checkpoint))
    assert torch.equal(repeat.patch_embed.proj.weight[:, 3], official[:, 0] * 0.75)
    assert report.resized["patch_embed.proj.weight"] == "3 → 4 bands, repeated"
    learned = sam_vit_tiny(in_chans=4, in_chans_mode="learned")
    before = learned.patch_embed.proj.weight.clone()
    report = learned.load_pretrained(str(sam_checkpoint))
    assert torch.equal(learned.patch_embed.proj.weight, before)
    assert report.initialised == ["patch_embed.proj.weight", "patch_embed.proj.bias"]
    assert report.dropped["image_encoder.patch_embed.proj.weight"] == "in_chans_mode='learned'"


def edited(sam_checkpoint: Path, path: Path, edit) -> str:
    state = torch.load(sam_checkpoint, weights_only=True)
    edit(state)
    torch.save(state, path)
    return str(path)


def test_encoder_key_that_matches_nothing(sam_checkpoint: Path, tmp_path: Path, one_line: Any) -> None:
    def add(state):
        state["image_encoder.blocks.0.attn.extra"] = torch.zeros(3)

    source = edited(sam_checkpoint, tmp_path / "extra.pth", add)
    with pytest.raises(ValueError, match="match nothing") as error:
        rsmodels.create_model("rs_sam_tiny", num_classes=2, pretrained=source)
    one_line(error, source, "1 encoder keys", "blocks.0.attn.extra", "give a checkpoint")


def test_missing_encoder_key(sam_checkpoint: Path, tmp_path: Path, one_line: Any) -> None:
    source = edited(
        sam_checkpoint, tmp_path / "less.pth", lambda state: state.pop("image_encoder.blocks.3.norm2.bias")
    )
    with pytest.raises(ValueError, match="missing") as error:
        rsmodels.create_model("rs_sam_tiny", num_classes=2, pretrained=source)
    one_line(error, source, "blocks.3.norm2.bias")


def test_half_a_neck_is_an_error(sam_checkpoint: Path, tmp_path: Path, one_line: Any) -> None:
    source = edited(
        sam_checkpoint, tmp_path / "neck.pth", lambda state: state.pop("image_encoder.neck.1.bias")
    )
    with pytest.raises(ValueError, match="neck keys are missing") as error:
        sam_vit_tiny().load_pretrained(source)
    one_line(error, source, "1.bias")


def test_window_tables_are_never_resized(sam_checkpoint: Path, one_line: Any) -> None:
    with pytest.raises(ValueError, match="rel_pos") as error:
        sam_vit_tiny(window_size=2).load_pretrained(str(sam_checkpoint))
    one_line(error, sam_checkpoint, "(7, 32)", "(3, 32)")


def test_checkpoint_of_another_variant(sam_checkpoint: Path, one_line: Any) -> None:
    with torch.device("meta"):
        model = rsmodels.create_model("rs_sam_vit_b", num_classes=2)
    with pytest.raises(ValueError, match="holds a SAM tiny") as error:
        model.load_pretrained(str(sam_checkpoint))
    one_line(error, sam_checkpoint, "4 blocks of width 128", "vit_b (12 blocks of width 768)")


def test_not_a_sam_checkpoint(tmp_path: Path, one_line: Any) -> None:
    torch.save({"layer1.weight": torch.zeros(2)}, tmp_path / "resnet.pth")
    with pytest.raises(ValueError, match="no SAM image encoder") as error:
        sam_vit_tiny().load_pretrained(str(tmp_path / "resnet.pth"))
    one_line(error, "resnet.pth", "layer1.weight", "image_encoder.*")


@pytest.mark.parametrize("name", ["broken.pth", "broken.safetensors", "code.pth", "list.pth", "empty.pth"])
def test_unreadable_files(tmp_path: Path, name: str, one_line: Any) -> None:
    path = tmp_path / name
    if name == "code.pth":
        torch.save({"weight": Path("somewhere")}, path)  # an object: would need to run code
    elif name == "list.pth":
        torch.save([1, 2], path)
    elif name == "empty.pth":
        path.touch()
    else:
        path.write_bytes(b"not a checkpoint at all")
    with pytest.raises(ValueError, match=re.escape(str(path))) as error:
        sam_vit_tiny().load_pretrained(str(path))
    one_line(error, path, "expected")


def test_missing_file_and_folder(tmp_path: Path, one_line: Any) -> None:
    for source in (tmp_path / "nowhere.pth", "weights/sam_vit_b.pth", "./weights/sam"):
        with pytest.raises(FileNotFoundError, match="no such file") as error:
            weights.resolve(source)
        one_line(error, source, "hub id")
    with pytest.raises(ValueError, match="is a folder") as error:
        weights.resolve(tmp_path)
    one_line(error, tmp_path)


def test_hub_id_without_the_package(monkeypatch, one_line: Any) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match="huggingface_hub") as error:
        weights.resolve("timm/samvit_base_patch16.sa1b")
    one_line(error, "pip install huggingface_hub")


@pytest.mark.parametrize(
    "source, expected",
    [("owner/name.v1", ("owner/name.v1", "model.safetensors")), ("a/b/c/sam.pth", ("a/b", "c/sam.pth"))],
)
def test_hub_id_is_downloaded(
    monkeypatch, tmp_path: Path, source: str, expected: tuple[str, str], one_line: Any
) -> None:
    hub = pytest.importorskip("huggingface_hub")
    asked = []

    def download(repo: str, filename: str) -> str:
        asked.append((repo, filename))
        return str(tmp_path / "file")

    monkeypatch.setattr(hub, "hf_hub_download", download)
    assert weights.resolve(source) == tmp_path / "file" and asked == [expected]

    def fail(repo: str, filename: str) -> str:
        raise OSError("offline\nand more lines")

    monkeypatch.setattr(hub, "hf_hub_download", fail)
    with pytest.raises(FileNotFoundError, match="offline") as error:
        weights.resolve(source)
    one_line(error, source)


def test_saved_encoder_loads_everywhere(miniature_sam: Sam, tmp_path: Path) -> None:
    """save_encoder folds LoRA in and writes the official layout: segment-anything itself can load it."""
    torch.manual_seed(0)
    encoder = sam_vit_tiny(lora_rank=2)
    for block in encoder.blocks:
        torch.nn.init.normal_(block.attn.qkv.lora_b_v, std=0.1)
    path = tmp_path / "base.safetensors"
    weights.save_encoder(encoder, path)
    plain = sam_vit_tiny()
    plain.load_pretrained(str(path))
    state = {k.removeprefix("image_encoder."): v for k, v in weights.read_state(path).items()}
    assert state.keys() == miniature_sam.image_encoder.state_dict().keys()
    with torch.no_grad():
        torch.testing.assert_close(plain(images()), encoder(images()), rtol=1e-4, atol=1e-4)


def adapted_model(sam_checkpoint: Path, **options):
    return rsmodels.create_model(
        "rs_sam_tiny", num_classes=2, freeze_encoder=True, pretrained=str(sam_checkpoint), **options
    )


def test_adapter_round_trip(sam_checkpoint: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = adapted_model(sam_checkpoint)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    path = tmp_path / "adapter.safetensors"
    weights.save_adapter(model, path)
    stored = weights.read_state(path)
    assert not any(key.startswith("encoder.") and ".lora_" not in key for key in stored)
    assert {n for n, p in model.named_parameters() if p.requires_grad} <= set(stored)
    other = adapted_model(sam_checkpoint)
    weights.load_adapter(other, path)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in other.state_dict().items())


def test_adapter_needs_its_base(
    sam_checkpoint: Path, tmp_path: Path, miniature_sam: Sam, one_line: Any
) -> None:
    path = tmp_path / "adapter.safetensors"
    without = rsmodels.create_model("rs_sam_tiny", num_classes=2)
    with pytest.raises(ValueError, match="without pretrained=") as error:
        weights.save_adapter(without, path)
    one_line(error, path)
    weights.save_adapter(adapted_model(sam_checkpoint), path)
    with pytest.raises(ValueError, match="adapter for base_weights") as error:
        weights.load_adapter(without, path)
    one_line(error, path, weights.sha256_of(sam_checkpoint))
    baseline = rsmodels.create_model("sam_lora_tiny", num_classes=2, embedding_dim=8)
    baseline.load_pretrained(str(sam_checkpoint))
    with pytest.raises(ValueError, match="adapter for model rs_sam_tiny, this model has sam_lora_tiny"):
        weights.load_adapter(baseline, path)
    with pytest.raises(ValueError, match=r"mask_tokens.*shape"):
        other = rsmodels.create_model(
            "rs_sam_tiny", num_classes=5, freeze_encoder=True, pretrained=str(sam_checkpoint)
        )
        weights.load_adapter(other, path)
