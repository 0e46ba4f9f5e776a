"""methods/ktda.py: every switch of Tables II to IV, what learns from which term, the loss by hand."""

import itertools
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

import rsmodels
from rsmodels.methods.losses import cross_entropy_loss
from rsmodels.methods.teacher import Teacher
from rsmodels.registry import parameter_counts

ROOT = Path(__file__).resolve().parents[3]
SIZE = 64
PARTS = ("student", "align", "modulation", "neck", "head", "aux_head")


def tiny(*, num_classes: int = 3, image_size=SIZE, **options):
    torch.manual_seed(0)
    return rsmodels.create_model("ktda_tiny", num_classes=num_classes, image_size=image_size, **options)


def maps_for(model, batch: int = 2) -> list[Tensor]:
    return [torch.randn(batch, model.teacher_dim, *model.grid_size) for _ in range(4)]


def batch_for(model, *, size: int = 2) -> dict:
    torch.manual_seed(1)
    return {
        "image": torch.randn(size, 3, *model.image_size),
        "mask": torch.randint(0, max(2, model.num_classes), (size, *model.image_size)),
        "teacher": maps_for(model, size),
    }


def inputs_of(module, call) -> list:
    seen: list = []
    handle = module.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    call()
    handle.remove()
    return seen


def by_hand(ours: Tensor, theirs: Tensor, *, authors: bool, temperature: float) -> tuple[float, float]:
    """One scale's KL and MSE, in float64 and from exponentials."""
    s, t = ours.double(), theirs.double()
    dim = 3 if authors else 1
    p, q = ((x / temperature).exp() for x in (s, t))
    p, q = p / p.sum(dim, keepdim=True), q / q.sum(dim, keepdim=True)
    divergence = (q * (q / p).log()) if authors else (p * (p / q).log())
    count = len(s) if authors else len(s) * s.shape[2] * s.shape[3]
    return float(divergence.sum() / count * temperature**2), float(((s - t) ** 2).mean())


@pytest.mark.parametrize("kl, temperature", [("paper", 1.0), ("paper", 2.0), ("authors", 1.0)])
@pytest.mark.parametrize("scales", ["multi", "single"])
def test_losses_by_hand(kl: str, temperature: float, scales: str) -> None:
    model = tiny(kl=kl, temperature=temperature, scales=scales, kl_weight=0.3, mse_weight=0.7).train()
    data = batch_for(model)
    aligned: list = []
    model.align.register_forward_hook(lambda _m, _i, out: aligned.extend(out))
    logits: dict = {}
    for name in ("head", "aux_head"):
        getattr(model, name).register_forward_hook(lambda _m, _i, out, name=name: logits.update({name: out}))
    terms, output = model.losses_and_logits(data)
    assert len(aligned) == (4 if scales == "multi" else 1)
    pairs = zip(aligned, data["teacher"][-len(aligned) :], strict=True)
    values = [by_hand(a.detach(), b, authors=kl == "authors", temperature=temperature) for a, b in pairs]
    kl_mean, mse_mean = (sum(column) / len(values) for column in zip(*values, strict=True))
    assert terms["kl"].item() == pytest.approx(0.3 * kl_mean, rel=1e-5)
    assert terms["mse"].item() == pytest.approx(0.7 * mse_mean, rel=1e-5)
    # Cross entropy at the size of the image, in float64.
    for name, weight in (("head", 1.0), ("aux_head", 0.4)):
        full = torch.nn.functional.interpolate(logits[name].double(), size=SIZE, mode="bilinear")
        ce = full.logsumexp(1) - full.gather(1, data["mask"].unsqueeze(1))[:, 0]
        term = terms["ce" if name == "head" else "aux"]
        assert term.item() == pytest.approx(weight * ce.mean().item(), rel=1e-5)
    assert list(terms) == ["kl", "mse", "ce", "aux"]
    assert model.losses(data).keys() == terms.keys()
    assert output.shape == (2, 3, SIZE, SIZE)


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"aux_weight": 0}, {"kl", "mse", "ce"}),
        ({"mse_weight": 0}, {"kl", "ce", "aux"}),
        ({"kl_weight": 0}, {"mse", "ce", "aux"}),
        ({"kl_weight": 0, "mse_weight": 0}, {"ce", "aux"}),
        ({"transfer": False}, {"ce", "aux"}),
    ],
)
def test_table_2(options: dict, expected: set[str]) -> None:
    model = tiny(**options).train()
    data = batch_for(model)
    if not model.transfers:
        del data["teacher"]  # nobody needs one
    terms = model.losses(data)
    assert terms.keys() == expected
    sum(terms.values()).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert (model.aux_head is None) == ("aux" not in expected)


def test_single_scale_is_the_last_stage_everywhere() -> None:
    """Table III."""
    model = tiny(scales="single", fmm_depth=0)
    data = batch_for(model)
    aligned: list = []
    model.align.register_forward_hook(lambda _m, _i, out: aligned.extend(out))
    (levels,) = inputs_of(model.neck, lambda: model(data["image"]))
    assert len(aligned) == 1 and len(levels) == 4 and all(level is aligned[0] for level in levels)
    assert model.align.convs[0].in_channels == 128
    # The other blocks of the teacher have no say.
    terms = model.transfer_losses(aligned, data["teacher"])
    others = [torch.randn_like(data["teacher"][0]) for _ in range(3)]
    assert model.transfer_losses(aligned, [*others, data["teacher"][3]]) == terms


@pytest.mark.parametrize("depth", [0, 1, 2, 3, 4])
def test_table_4(depth: int) -> None:
    model = tiny(fmm_depth=depth)
    counts = parameter_counts(model)
    one = 12 * 128**2 + 13 * 128  # qkv, proj, mlp of ratio 4, biases, two norms
    assert counts["modulation"][0] == 4 * depth * one
    with torch.no_grad():
        assert model(torch.randn(2, 3, SIZE, SIZE)).isfinite().all()


@pytest.mark.parametrize("position", ["before_neck", "after_neck"])
def test_aligned_features_go_through_fmm_to_the_decoder(position: str) -> None:
    model = tiny(fmm_position=position).eval()
    image = torch.randn(1, 3, SIZE, SIZE)
    order = ("align", "modulation", "neck") if position == "before_neck" else ("align", "neck", "modulation")
    seen: dict = {}
    for name in (*order, "head"):
        hook = lambda _m, args, out, name=name: seen.update({name: (args[0], out)})  # noqa: E731
        getattr(model, name).register_forward_hook(hook)
    with torch.no_grad():
        model(image)
    for first, second in itertools.pairwise((*order, "head")):
        assert all(a is b for a, b in zip(seen[first][1], seen[second][0], strict=True)), (first, second)
    assert [m.shape[1:] for m in seen["align"][1]] == [(128, 5, 5)] * 4
    assert [m.shape[-1] for m in seen["head"][0]] == [20, 10, 5, 2]


# What each term reaches, and no more.
REACH = {
    "kl": {"student", "align"},
    "mse": {"student", "align"},
    "ce": {"student", "align", "modulation", "neck", "head"},
    "aux": {"student", "align", "modulation", "neck", "aux_head"},
}


@pytest.mark.parametrize("term", REACH)
@pytest.mark.parametrize("position", ["before_neck", "after_neck"])
def test_gradients_reach_every_part(term: str, position: str) -> None:
    model = tiny(fmm_position=position).train()
    data = batch_for(model)
    for teacher in data["teacher"]:
        teacher.requires_grad_()
    model.losses(data)[term].backward()
    reached = {
        part
        for part in PARTS
        if any(p.grad is not None and p.grad.any() for p in getattr(model, part).parameters())
    }
    assert reached == REACH[term]
    assert all(teacher.grad is None for teacher in data["teacher"])


def test_all_terms_reach_all_parameters() -> None:
    model = tiny(drop_path=0.0).train()
    sum(model.losses(batch_for(model)).values()).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_it_learns_what_the_teacher_knows() -> None:
    """A real teacher beside it: the transfer terms fall, the teacher stays as it is."""
    model = tiny().train()
    teacher = Teacher("dinov2_vit_tiny", image_size=SIZE)
    before = [p.clone() for p in teacher.parameters()]
    data = batch_for(model)
    data["teacher"] = teacher(data["image"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    transfer = []
    for _ in range(25):
        optimizer.zero_grad()
        terms = model.losses(data)
        sum(terms.values()).backward()
        optimizer.step()
        transfer.append((terms["kl"] + terms["mse"]).item())
    assert transfer[-1] < 0.9 * transfer[0]
    assert all(torch.equal(a, b) for a, b in zip(before, teacher.parameters(), strict=True))


def test_what_is_saved_is_the_student_alone(tmp_path: Path) -> None:
    model = tiny().eval()
    rsmodels.save_model(model, tmp_path / "best")
    loaded, info = rsmodels.load_model(tmp_path / "best")
    assert {key.split(".")[0] for key in loaded.state_dict()} == set(PARTS)
    assert "teacher" not in {key for key in info["arguments"]}
    image = torch.randn(1, 3, SIZE, SIZE)
    with torch.no_grad():
        assert torch.equal(loaded(image), model(image))
        larger, _ = rsmodels.load_model(tmp_path / "best", image_size=96)
        assert larger(torch.randn(1, 3, 96, 96)).shape == (1, 3, 96, 96)


def test_a_student_of_one_size_says_so(tmp_path: Path) -> None:
    model = tiny(student="swin_tiny_patch4_window7_224", student_options=SWIN, image_size=224)
    rsmodels.save_model(model, tmp_path / "best")
    assert rsmodels.load_model(tmp_path / "best")[0].image_size == (224, 224)
    with pytest.raises(ValueError, match=r"bias_table\).* one image size, load it without image_size="):
        rsmodels.load_model(tmp_path / "best", image_size=64)


SWIN = {"depths": (1, 1, 1, 1), "embed_dim": 8, "num_heads": (1, 1, 2, 2)}


@pytest.mark.parametrize(
    "student, options",
    [("resnet18", {}), ("mobilenetv3_small_050", {}), ("swin_tiny_patch4_window7_224", SWIN)],
)
def test_other_students(student: str, options: dict) -> None:
    model = tiny(student=student, student_options=options).train()
    terms = model.losses(batch_for(model))
    sum(terms.values()).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_the_tiny_student_keeps_its_sizes() -> None:
    model = tiny(student_options={"use_grn": True})
    assert model.student.feature_info.channels() == [24, 48, 96, 128]
    assert any("grn" in name for name, _ in model.student.named_parameters())


def test_other_teachers() -> None:
    model = tiny(teacher_dim=64, patch_size=16)
    assert model.grid_size == (4, 4) and tiny().grid_size == (5, 5)
    model.losses(batch_for(model))
    assert tiny(image_size=(64, 96)).grid_size == (5, 7)


def test_drop_path_and_dropout_work_in_training_only() -> None:
    for options in (
        {"drop_path": 0.9, "student_options": None, "student": "convnext_atto"},
        {"dropout": 0.5},
    ):
        model = tiny(**options).train()
        image = torch.randn(2, 3, SIZE, SIZE)
        with torch.no_grad():
            assert not torch.equal(model(image), model(image)), options
            model.eval()
            assert torch.equal(model(image), model(image)), options


def test_without_a_teacher_it_says_what_is_missing() -> None:
    model = tiny()
    data = batch_for(model)
    del data["teacher"]
    with pytest.raises(ValueError, match=r"no 'teacher' maps .*transfer=False"):
        model.losses(data)
    for count in (3, 5):
        data["teacher"] = [torch.randn(2, 128, 5, 5)] * count
        with pytest.raises(ValueError, match=f"losses: {count} teacher maps, expected 4"):
            model.losses(data)
    data["teacher"] = [torch.randn(2, 64, 5, 5)] * 4
    with pytest.raises(ValueError, match=r"maps of \(64, 5, 5\) .*from \(128, 5, 5\); .*teacher_dim="):
        model.losses(data)


@pytest.mark.parametrize(
    "options, match",
    [
        ({"scales": "two"}, "scales='two'"),
        ({"fmm_position": "between"}, "fmm_position='between'"),
        ({"kl": "reverse"}, "kl='reverse'"),
        ({"activation": "tanh"}, "activation='tanh'"),
        ({"kl_weight": -1}, "kl_weight=-1"),
        ({"temperature": 0}, "temperature=0"),
        ({"temperature": float("nan")}, "temperature=nan: expected a finite number above 0"),
        ({"mse_weight": float("inf")}, "mse_weight=inf: expected a finite number of at least 0"),
        ({"drop_path": 1.5}, "drop_path=1.5: expected a finite number of at least 0 and below 1"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"teacher_dim": 0}, "teacher_dim=0: expected a finite number of at least 1"),
        ({"neck_dim": 0}, "neck_dim=0"),
        ({"head_dim": -3}, "head_dim=-3"),
        ({"aux_dim": 0}, "aux_dim=0"),
        ({"fmm_heads": 0}, "fmm_heads=0"),
        ({"mean": (1.0, 2.0, 3.0, 4.0)}, r"mean=\(1.0, 2.0, 3.0, 4.0\): expected 3 values, one for each"),
        ({"student_options": {"in_chans": 4}, "bands": (3, 2, 1)}, r"bands=\(3, 2, 1\): expected 4 values"),
        ({"std": (1.0, float("nan"), 1.0)}, "expected finite numbers, and std above 0"),
        ({"fmm_depth": -1}, "fmm_depth=-1"),
        ({"fmm_heads": 3}, "fmm_heads=3.* divide 128"),
        ({"image_size": 80}, "image_size=80: .*multiple of 32"),
        ({"student": "alexnet"}, "student 'alexnet'"),
        ({"student": "inception_v4"}, "student 'inception_v4': cannot take images of 64x64"),
        ({"drop_path": 0.4, "student_options": {"drop_path_rate": 0.1}}, "=0.1 beside drop_path=0.4"),
        *(
            ({"student_options": {"in_chans": bands}}, f"in_chans={bands!r}: expected a whole number")
            for bands in ("abc", None, 3.5, 0, -1, True)
        ),
    ],
)
def test_bad_options_are_named(options: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match) as error:
        tiny(**options)
    assert "\n" not in str(error.value)


def test_the_teachers_weights_are_not_the_students(tmp_path: Path) -> None:
    torch.save(Teacher("dinov2_vit_tiny", image_size=SIZE).encoder.state_dict(), tmp_path / "dinov2.pth")
    with pytest.raises(ValueError, match=r"dinov2.pth: not weights of this student \(first keys: ") as error:
        tiny(pretrained=str(tmp_path / "dinov2.pth"))
    assert "convnext_atto; a teacher's go to --teacher-weights" in str(error.value)


def test_ignored_pixels_have_no_part() -> None:
    model = tiny().eval()
    data = batch_for(model)
    data["mask"][:, :20] = 255
    terms, logits = model.losses_and_logits(data)
    expected = cross_entropy_loss(logits[:, :, 20:], data["mask"][:, 20:])
    torch.testing.assert_close(terms["ce"], expected)


def on_meta(name: str, **options):
    with torch.device("meta"):
        return rsmodels.create_model(name, num_classes=5, **options)


def test_as_published() -> None:
    model = on_meta("ktda_convnext_b")
    assert model.student.feature_info.channels() == [128, 256, 512, 1024]
    assert model.grid_size == (19, 19) and on_meta("ktda_convnext_b", image_size=512).grid_size == (37, 37)
    assert (model.kl_weight, model.mse_weight, model.aux_weight, model.temperature) == (0.5, 0.5, 0.4, 1.0)
    assert len(model.modulation.scales) == 4 and len(model.modulation.scales[0]) == 4
    assert model.modulation.scales[0][0].attn.num_heads == 8
    assert model.head.conv_seg.in_channels == 512 and model.aux_head.conv_seg.in_channels == 256
    assert model.fmm_first


def test_model_card_is_true() -> None:
    """docs/methods/ktda.md prints the count per module; the table is checked cell by cell."""
    rows = re.findall(r"^\| (\w+) \| (.+) \|$", (ROOT / "docs/methods/ktda.md").read_text(), re.MULTILINE)
    names = ["ktda_convnext_b", "ktda_tiny", "dinov2_upernet_vit_b", "dinov2_upernet_tiny"]
    table = {module: cells.split(" | ") for module, cells in rows}
    for column, name in enumerate(names):
        counts = parameter_counts(on_meta(name))
        for module in ("backbone", *PARTS, "total"):
            expected = f"{counts[module][0]:,}" if module in counts else "–"
            assert table[module][column] == expected, (name, module)
        assert table["trainable"][column] == f"{counts['total'][1]:,}", name
