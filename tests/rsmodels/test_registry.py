"""registry.py: names, options, method lookup, saving and loading, and the errors of each."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import rsmodels
from rsmodels import registry
from rsmodels.registry import Preprocessing, load_model, model_for_method, save_model


def tiny(**options):
    torch.manual_seed(0)
    return rsmodels.create_model("rs_sam_tiny", num_classes=3, image_size=64, **options)


def test_list_models() -> None:
    assert rsmodels.list_models("rs_sam*") == ["rs_sam_tiny", "rs_sam_vit_b", "rs_sam_vit_h", "rs_sam_vit_l"]
    assert set(rsmodels.list_models("sam_lora*")) < set(rsmodels.list_models())
    assert rsmodels.list_encoders("sam*") == ["sam_vit_b", "sam_vit_h", "sam_vit_l", "sam_vit_tiny"]
    assert rsmodels.list_models("nothing*") == []


def test_the_package_offers_predict_and_nothing_made_up() -> None:
    assert callable(rsmodels.predict)
    with pytest.raises(AttributeError, match="no attribute 'predicts'"):
        _ = rsmodels.predicts


def test_unknown_names_get_near_ones(one_line: Any) -> None:
    with pytest.raises(ValueError, match="no such model") as error:
        rsmodels.create_model("rs_sam_vitb", num_classes=2)
    one_line(error, "'rs_sam_vitb'", "did you mean rs_sam_vit_b")
    with pytest.raises(ValueError, match="no such encoder") as error:
        rsmodels.create_backbone("zzz", out_indices=(0,))
    one_line(error, "sam_vit_tiny")


def test_unknown_options_are_listed(one_line: Any) -> None:
    with pytest.raises(ValueError, match="rs_sam_tiny has no option 'necks'") as error:
        tiny(necks=False)
    one_line(error, "neck_source", "mff_last_relu", "lora_rank")
    with pytest.raises(ValueError, match="sam_vit_tiny has no option 'depth'"):
        rsmodels.create_backbone("sam_vit_tiny", out_indices=(0,), depth=3)


@pytest.mark.parametrize("switch", ["neck", "mff", "mhff"])
def test_the_baseline_has_no_switches(switch: str) -> None:
    with pytest.raises(ValueError, match=f"sam_lora_tiny has no option '{switch}'"):
        rsmodels.create_model("sam_lora_tiny", num_classes=2, **{switch: True})


def test_an_encoder_keeps_what_its_builder_settles() -> None:
    with pytest.raises(ValueError, match="dinov2_vit_g has no option 'swiglu'"):
        rsmodels.create_backbone("dinov2_vit_g", out_indices=(0,), swiglu=False)
    with pytest.raises(ValueError, match="dinov2_vit_g has no option 'swiglu'"):
        rsmodels.create_teacher("dinov2_vit_g", image_size=64, swiglu=True)


@pytest.mark.parametrize("classes", [0, -1, 2.0, None])
def test_num_classes(classes) -> None:
    with pytest.raises(ValueError, match="num_classes="):
        rsmodels.create_model("rs_sam_tiny", num_classes=classes)


def test_methods() -> None:
    assert model_for_method("rs-sam", "vit_b") == "rs_sam_vit_b"
    assert model_for_method("rs-sam", "rs_sam_vit_l") == "rs_sam_vit_l"
    assert model_for_method("sam-lora", "tiny") == "sam_lora_tiny"
    assert {name: method.family for name, method in registry.METHODS.items()}["sam-lora"] == "sam_lora"
    with pytest.raises(ValueError, match="no such method; did you mean rs-sam"):
        model_for_method("rssam", "tiny")
    for variant in ("vit_g", "sam_lora_tiny"):
        with pytest.raises(ValueError, match=f"{variant}.*expected one of rs_sam_tiny, rs_sam_vit_b"):
            model_for_method("rs-sam", variant)


def test_a_model_of_ones_own(monkeypatch) -> None:
    monkeypatch.setattr(registry, "MODELS", dict(registry.MODELS))

    class Mine(nn.Module):
        def __init__(self, *, num_classes: int, image_size: int = 32, width: int = 4) -> None:
            super().__init__()
            self.image_size, self.width = (image_size, image_size), width

    @registry.register_model
    def mine(*, num_classes: int, **options) -> Mine:
        return Mine(num_classes=num_classes, **options)

    model = rsmodels.create_model("mine", num_classes=2, width=8)
    assert model.width == 8 and model.model_name == "mine"
    assert model.arguments == {"num_classes": 2, "width": 8, "image_size": [32, 32]}
    with pytest.raises(ValueError, match="mine has no option 'depth'; it has image_size, width"):
        rsmodels.create_model("mine", num_classes=2, depth=8)
    with pytest.raises(AssertionError, match="twice"):
        registry.register_model(mine)


def test_preprocessing_normalises() -> None:
    preprocessing = Preprocessing(mean=[1.0, 2.0], std=[2.0, 4.0], bands=[4, 1])
    images = torch.full((1, 2, 3, 3), 5, dtype=torch.uint8)
    normalised = preprocessing.normalize(images)
    assert normalised.dtype == torch.float32
    assert torch.equal(normalised[0, :, 0, 0], torch.tensor([2.0, 0.75]))
    assert preprocessing == Preprocessing((1.0, 2.0), (2.0, 4.0), (4, 1))


@pytest.mark.parametrize(
    "arguments",
    [
        dict(mean=(1.0,), std=(1.0, 2.0)),
        dict(mean=(1.0,), std=(1.0,), bands=(1, 2)),
        dict(mean=(1.0,), std=(0.0,)),
        dict(mean=(1.0,), std=(1.0,), bands=(0,)),
    ],
)
def test_bad_preprocessing(arguments) -> None:
    with pytest.raises(ValueError, match="expected"):
        Preprocessing(**arguments)


def test_normalize_names_the_bands() -> None:
    with pytest.raises(ValueError, match=r"\(1, 4, 8, 8\): this model takes \(B, 3, H, W\)"):
        tiny().preprocessing.normalize(torch.zeros(1, 4, 8, 8))


def test_save_and_load(tmp_path: Path) -> None:
    model = tiny(activation="softmax", bands=(3, 2, 1), mean=(1.0, 2.0, 3.0), std=(1.0, 1.0, 2.0))
    info = {"classes": ["a", "b", "c"], "palette": [[0, 0, 0]] * 3, "training": {"step": 7}}
    save_model(model, tmp_path / "best", info)
    assert {path.name for path in (tmp_path / "best").iterdir()} == {"model.safetensors", "model.json"}
    assert [path.name for path in tmp_path.iterdir()] == ["best"]
    record = json.loads((tmp_path / "best" / "model.json").read_text())
    assert set(record) == {
        "model", "arguments", "classes", "palette", "binary", "ignore_index", "bands", "mean", "std",
        "image_size", "base_weights", "library_version", "training",
    }  # fmt: skip
    loaded, read = load_model(tmp_path / "best")
    assert read == record
    assert (record["binary"], record["bands"], record["image_size"]) == (False, [3, 2, 1], [64, 64])
    assert record["library_version"] == rsmodels.__version__
    assert not loaded.training and loaded.activation == "softmax"
    assert loaded.preprocessing == model.preprocessing and loaded.arguments == model.arguments
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(loaded(images), model.eval()(images))
    save_model(loaded, tmp_path / "best", info)  # over an earlier save


def test_preprocessing_of_the_record_wins(tmp_path: Path) -> None:
    model = tiny()
    model.preprocessing = Preprocessing((9.0, 8.0, 7.0), (1.0, 2.0, 3.0), (2, 3, 5))
    save_model(model, tmp_path / "best")
    assert load_model(tmp_path / "best")[0].preprocessing == model.preprocessing


def test_preprocessing_that_the_caller_gives_goes_before_the_record(tmp_path: Path) -> None:
    model = tiny()
    model.preprocessing = Preprocessing((9.0, 8.0, 7.0), (1.0, 2.0, 3.0), (2, 3, 5))
    save_model(model, tmp_path / "best")
    loaded, _ = load_model(tmp_path / "best", bands=(3, 2, 1), std=(4.0, 5.0, 6.0))
    assert loaded.preprocessing == Preprocessing((9.0, 8.0, 7.0), (4.0, 5.0, 6.0), (3, 2, 1))


def test_load_at_another_size(tmp_path: Path) -> None:
    save_model(tiny(), tmp_path / "best")
    larger, _ = load_model(tmp_path / "best", image_size=(96, 128))
    assert larger.image_size == (96, 128)
    with torch.no_grad():
        assert larger(torch.randn(1, 3, 96, 128)).shape == (1, 3, 96, 128)


def test_save_given_weights(tmp_path: Path) -> None:
    """As a sharded trainer does: the full state dict comes from elsewhere."""
    model = tiny()
    state = {key: torch.full_like(value, 0.5) for key, value in model.state_dict().items()}
    save_model(model, tmp_path / "best", state_dict=state)
    loaded, _ = load_model(tmp_path / "best")
    assert all((value == 0.5).all() for value in loaded.state_dict().values())


def test_save_never_removes_what_it_did_not_write(tmp_path: Path, one_line: Any) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds other files") as error:
        save_model(tiny(), tmp_path)
    one_line(error, tmp_path, "notes.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_interrupted_save_leaves_the_previous_one(tmp_path: Path, monkeypatch) -> None:
    model = tiny()
    save_model(model, tmp_path / "best", {"training": {"step": 1}})

    def full_disk(*_args) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(registry, "write_json", full_disk)
    with pytest.raises(OSError, match="No space"):
        save_model(model, tmp_path / "best", {"training": {"step": 2}})
    assert load_model(tmp_path / "best")[1]["training"] == {"step": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


def test_load_errors(tmp_path: Path, one_line: Any) -> None:
    with pytest.raises(FileNotFoundError, match=r"model\.json: no such file") as error:
        load_model(tmp_path)
    one_line(error, tmp_path, "runs/NAME/best")
    save_model(tiny(), tmp_path / "best")
    with pytest.raises(FileNotFoundError) as error:
        load_model(tmp_path)
    one_line(error, f"did you mean {tmp_path / 'best'}?")
    with pytest.raises(ValueError, match="holds rs_sam_tiny, expected rs_sam_vit_b") as error:
        load_model(tmp_path / "best", model="rs_sam_vit_b")
    one_line(error, tmp_path / "best")

    other = rsmodels.create_model("sam_lora_tiny", num_classes=3, image_size=64)
    save_model(other, tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").replace(tmp_path / "best" / "model.safetensors")
    with pytest.raises(ValueError, match="weights of another variant") as error:
        load_model(tmp_path / "best")
    one_line(error, tmp_path / "best", "expected rs_sam_tiny", "missing")

    record = tmp_path / "best" / "model.json"
    record.write_text("{}")
    with pytest.raises(ValueError, match="no entry 'model'") as error:
        load_model(tmp_path / "best")
    one_line(error, record)
    record.write_text("{")
    with pytest.raises(ValueError, match="not a readable JSON"):
        load_model(tmp_path / "best")


def test_parameter_counts_add_up() -> None:
    model = tiny(freeze_encoder=True)
    counts = registry.parameter_counts(model)
    total = counts.pop("total")
    assert total == tuple(map(sum, zip(*counts.values(), strict=True)))
    assert total[0] == sum(p.numel() for p in model.parameters())
    lora = sum(p.numel() for n, p in model.encoder.named_parameters() if ".lora_" in n)
    assert counts["encoder"][1] == lora


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("mff", "flase", "bool"),
        ("mff", 0, "bool"),
        ("lora_rank", "four", "int"),
        ("lora_rank", True, "int"),
        ("early_block", 1.5, "int | None"),
        ("image_size", 128.0, "int | tuple"),
        ("mean", ["a"], "tuple"),
    ],
)
def test_an_option_of_the_wrong_type_is_refused(option: str, value: object, expected: str) -> None:
    with pytest.raises(ValueError, match=f"rs_sam_tiny: {option}=.* is not of the expected type {expected}"):
        rsmodels.create_model("rs_sam_tiny", **{"num_classes": 2, option: value})


def test_sizes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="decoder_heads=7"):
        rsmodels.create_model("rs_sam_tiny", num_classes=2, decoder_heads=7)


def test_a_backbone_runs_on_the_meta_device() -> None:
    with torch.device("meta"):
        backbone = rsmodels.create_backbone("sam_vit_l", out_indices=(5, 23))
        features = backbone(torch.empty(1, 3, 1024, 1024))
    assert [tuple(f.shape) for f in features] == [(1, 1024, 64, 64)] * 2
