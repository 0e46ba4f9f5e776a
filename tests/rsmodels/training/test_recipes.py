"""Every recipe parses, validates, builds its model, and takes one step with the tiny variant swapped in."""

import functools
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import rsmodels
from rsmodels.cli.options import parse
from rsmodels.evaluation.rsdg import setting
from rsmodels.training.config import LoaderConfig, TrainConfig, resolve
from rsmodels.training.trainer import train

RECIPES = sorted((Path(rsmodels.__file__).parent / "recipes").glob("*.yaml"))
CLASSES = {"deepglobe": 1, "whu-aerial": 1, "whdld": 6, "grass": 5, "l8-biome": 4, "synthetic": 6}


def run(config: TrainConfig) -> int:
    """What the command line's parser is built from."""
    return 0


@functools.cache
def read(recipe: Path) -> TrainConfig:
    return parse("train", "train", run, ["--config", str(recipe)])


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_builds_its_model(recipe: Path) -> None:
    config = read(recipe)
    config = resolve(config if config.data == "synthetic" else replace(config, root="/data"))
    with torch.device("meta"):
        model = rsmodels.create_model(
            config.model,
            num_classes=CLASSES[config.data],
            image_size=config.image_size,
            **config.model_args,
        )
    assert model.image_size == (config.image_size, config.image_size)
    if config.data != "synthetic":
        assert f"--config rsmodels/recipes/{recipe.name}" in recipe.read_text(), "how to start it, on its top"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_takes_a_step_with_the_tiny_model(recipe: Path, tmp_path: Path) -> None:
    config = read(recipe)
    binary = CLASSES[config.data] == 1
    config = replace(
        config,
        model="tiny",
        data="synthetic",
        data_args={"size": 32, "length": 4, **({"classes": "road"} if binary else {})},
        image_size=32,
        batch_size=2,
        epochs=None,
        steps=1,
        optim=replace(config.optim, warmup=None),  # as the documentation says how to shorten one
        loader=LoaderConfig(cache=True),
        num_workers=0,
        run_dir=str(tmp_path / "run"),
        device="cpu",
        report=False,
    )
    assert (train(config) / "best" / "model.safetensors").is_file()


def experiments(*methods: str) -> set[tuple[str, str | None, str, tuple]]:
    return {
        (c.method, c.model, c.data, tuple(sorted(c.model_args.items())))
        for c in map(read, RECIPES)
        if c.data != "synthetic" and c.method in methods
    }


@pytest.mark.parametrize(
    "stems",
    [
        ("rs_sam_deepglobe", "sam_lora_deepglobe"),
        ("rs_sam_whdld", "sam_lora_whdld"),
        ("rs_sam_whu", "sam_lora_whu"),
        ("ktda_grass",),
        ("crossearth_synthetic", "rein_synthetic"),
        ("crossearth_512", "rein_512"),
    ],
)
def test_the_rows_of_a_table_are_trained_alike(stems: tuple[str, ...]) -> None:
    """A recipe is whole, so that it can be read and replayed alone; what rows share is the same in each."""
    found = [p for p in RECIPES if p.stem.startswith(stems) and not p.stem.endswith("_authors")]
    first, *others = (replace(read(path), method="", model="", model_args={}) for path in found)
    assert others
    for path, other in zip(found[1:], others, strict=True):
        assert other == first, f"{path.name} against {found[0].name}"


def test_rs_sams_tables_are_all_there() -> None:
    """Three data sets by two methods; the rows of Tables 5 and 6; ViT-L of Table 7."""
    tables = {
        (method, "vit_b", data, ())
        for method in ("rs-sam", "sam-lora")
        for data in ("deepglobe", "whdld", "whu-aerial")
    }
    tables |= {
        ("rs-sam", "vit_b", "deepglobe", (("mff", False), ("mhff", False))),
        ("rs-sam", "vit_b", "deepglobe", (("mhff", False),)),
        ("rs-sam", "vit_b", "deepglobe", (("mff", False),)),
        ("rs-sam", "vit_b", "deepglobe", (("neck_source", "layers"),)),
        ("rs-sam", "vit_l", "deepglobe", ()),
        ("sam-lora", "vit_l", "deepglobe", ()),
    }
    assert experiments("rs-sam", "sam-lora") == tables


def test_ktdas_tables_are_all_there() -> None:
    """Tables V and VI, the rows of Tables II, III and IV, and the authors' variant."""

    def ktda(data: str = "grass", **options: object) -> tuple[str, str, str, tuple]:
        return "ktda", "convnext_b", data, tuple(sorted(options.items()))

    tables = {ktda(), ktda("l8-biome"), ("dinov2-upernet", "vit_b", "grass", ())}
    tables |= {ktda(**{f"{term}_weight": 0}) for term in ("kl", "mse", "aux")}
    tables |= {
        ktda(scales="single", fmm_depth=0, aux_weight=0),
        ktda(fmm_depth=0, aux_weight=0),
        ktda(transfer=False, fmm_depth=0),
    }
    tables |= {ktda(fmm_depth=depth) for depth in (0, 1, 2, 3)}
    tables |= {ktda(data, kl="authors", fmm_position="after_neck") for data in ("grass", "l8-biome")}
    assert experiments("ktda", "dinov2-upernet") == tables


def test_ktdas_schedules_are_the_papers() -> None:
    """Section IV-B, and the authors' configuration for the cloud data."""
    for config in map(read, RECIPES):
        if config.method not in ("ktda", "dinov2-upernet"):
            continue
        authors = config.model_args.get("kl") == "authors"
        cloud = config.data == "l8-biome"
        assert config.image_size == (512 if cloud else 256)
        length = (80_000, 2_000, 2) if authors and cloud else (23_000, 1_150, 4)
        assert (config.steps, config.optim.warmup, config.batch_size) == length
        assert config.optim.lr == (6e-4 if authors else 1e-3)
        assert (config.optim.power, config.optim.weight_decay, config.optim.clip) == (0.9, 0.01, 0)
        assert config.loader.flip and config.loader.photometric


def test_crossearths_tables_are_all_there() -> None:
    """On generated scenes the rows of Tables 8, 9 and 13 (11 and 12 vary options of the whole), and the row
    below Table 8 that the paper has not."""
    masks = {"style_ratio": 0.1, "style_patch": 16, "mask_ratio": 0.7, "mask_patch": 16}  # 64 of 1024 pixels
    restoring = {"mask_ratio": 0.7, "mask_patch": 16, "mim_loss": "l1"}
    rows = [
        ("rein", {}),
        ("crossearth", {"mim": False, "style": False}),
        ("crossearth", {"style": False, **restoring}),
        ("crossearth", {**masks, "mim_loss": "l1"}),
        ("crossearth", {**masks, "mim_loss": "l1", "mim_decoder": "linear"}),
        ("crossearth", {**masks, "mim_loss": "mse"}),
        ("crossearth", dict.fromkeys(("rein", "gse", "mim", "style"), False)),
    ]
    found = [
        read(path) for path in RECIPES if path.stem.startswith(("crossearth_synthetic", "rein_synthetic"))
    ]
    assert sorted((c.method, sorted(c.model_args.items())) for c in found) == sorted(
        (method, sorted(arguments.items())) for method, arguments in rows
    )


@pytest.mark.parametrize(
    ("stem", "name"), [("crossearth_512", "A2S"), ("crossearth_1024", "D2M"), ("rein_512", "A2S")]
)
def test_crossearths_recipe_is_the_published_one(stem: str, name: str) -> None:
    """Section 5.1, the authors' configuration, and the setting's row of Table 14."""
    config, row = read(RECIPES[0].with_name(f"{stem}.yaml")), setting(name)
    assert config.model == "vit_l" and config.image_size == row.size
    assert (config.steps, config.batch_size, config.optim.warmup, config.optim.horizon) == (
        30_000,
        1,
        0,
        40_000,
    )
    optim = config.optim
    assert (optim.lr, optim.power, optim.weight_decay, optim.clip) == (1e-4, 0.9, 0.05, 0)
    loader = config.loader
    assert loader.scale is not None and tuple(loader.scale) == (0.5, 2.0) and loader.max_class_share == 0.75
    assert loader.flip and loader.photometric
    if config.method == "crossearth":
        expected = {"style_ratio": row.style.ratio, "style_patch": row.style.patch, "mim_loss": row.loss}
        assert config.model_args == {
            **expected, "mask_ratio": row.mask.ratio, "mask_patch": row.mask.patch
        }  # fmt: skip
    else:
        assert config.method == "rein" and config.model_args == {}
