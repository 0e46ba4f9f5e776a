"""GhiasiStyle against a plain reading of the published layout, on checkpoints that this test writes."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from rsmodels.style import EarthStyle, GhiasiStyle, StyleStatistics

State = dict[str, torch.Tensor]


def random_state(module: torch.nn.Module, prefix: str = "") -> State:
    """Weights that keep activations alive and depend on every key."""
    generator = torch.Generator().manual_seed(8)
    state = {}
    for key, value in module.state_dict().items():
        drawn = torch.randn(value.shape, generator=generator)
        if key.endswith("running_var"):
            drawn = 0.5 + torch.rand(value.shape, generator=generator)
        elif value.ndim == 4:
            drawn *= (2 / value[0].numel()) ** 0.5
        elif value.ndim == 2:
            drawn *= value.shape[1] ** -0.5
        elif ".bn.weight" in key:
            drawn = 1 + 0.2 * drawn
        else:
            drawn *= 0.2
        state[prefix + key] = drawn
    return state


@pytest.fixture(scope="module")
def states() -> tuple[State, State]:
    empty = GhiasiStyle()
    return random_state(empty.predictor), random_state(empty.transformer)


@pytest.fixture(scope="module")
def folder(states: tuple[State, State], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The two files as they were published: old ones, with what training left beside the weights."""
    path = tmp_path_factory.mktemp("styleaug")
    counters = {
        key.replace("running_mean", "num_batches_tracked"): torch.tensor(3)
        for key in states[0]
        if key.endswith("running_mean")
    }
    torch.save(
        {"epoch": 7, "state_dict_stylepredictor": {**states[0], **counters}},
        path / "checkpoint_stylepredictor.pth",
    )
    torch.save(
        {"state_dict_ghiasi": {**states[1], "layers.0.instancenorm.running_mean": torch.zeros(32)}},
        path / "checkpoint_transformer.pth",
        _use_new_zipfile_serialization=False,
    )
    return path


@pytest.fixture(scope="module")
def style(folder: Path) -> GhiasiStyle:
    loaded = GhiasiStyle()
    loaded.load_checkpoints(folder)
    return loaded


def images(count: int = 2, size: tuple[int, int] = (64, 80)) -> torch.Tensor:
    return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(1))


# --------------------------------------------------------------------------------------- the plain reading
# Straight from the keys, in float64: which convolution has which stride and padding, and what is joined.

STRIDED = {"Conv2d_1a_3x3", "Mixed_6a.branch3x3", "Mixed_6a.branch3x3dbl_3"}
UNPADDED = STRIDED | {"Conv2d_2a_3x3", "Conv2d_4a_3x3"}
A = [
    "branch1x1",
    "branch5x5_1 branch5x5_2",
    "branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3",
    "pool branch_pool",
]
B = ["branch3x3", "branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3", "max"]
C = [
    "branch1x1",
    "branch7x7_1 branch7x7_2 branch7x7_3",
    "branch7x7dbl_1 branch7x7dbl_2 branch7x7dbl_3 branch7x7dbl_4 branch7x7dbl_5",
    "pool branch_pool",
]
PREDICTOR = "Conv2d_1a_3x3 Conv2d_2a_3x3 Conv2d_2b_3x3 max Conv2d_3b_1x1 Conv2d_4a_3x3 max"


def read_predictor(state: State, images: torch.Tensor) -> torch.Tensor:
    weights = {key: value.double() for key, value in state.items()}

    def layer(name: str, x: torch.Tensor) -> torch.Tensor:
        if name == "max":
            return F.max_pool2d(x, 3, 2)
        if name == "pool":
            return F.avg_pool2d(x, 3, 1, 1)
        kernel = weights[f"{name}.conv.weight"]
        padding = (0, 0) if name in UNPADDED else tuple((side - 1) // 2 for side in kernel.shape[2:])
        x = F.conv2d(x, kernel, None, 2 if name in STRIDED else 1, padding)
        g, b, m, v = (
            weights[f"{name}.bn.{part}"][:, None, None]
            for part in ("weight", "bias", "running_mean", "running_var")
        )
        return ((x - m) / (v + 1e-3).sqrt() * g + b).relu()

    # First PyTorch's ImageNet normalisation, with 0.255 for blue, then Inception's own from there.
    mean, first, second = (
        torch.tensor(v, dtype=torch.float64)[:, None, None]
        for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.255), (0.229, 0.224, 0.225))
    )
    x = (images.double() - mean) / first * (second / 0.5) + (mean - 0.5) / 0.5
    for name in PREDICTOR.split():
        x = layer(name, x)
    for block, branches in [*((f"5{c}", A) for c in "bcd"), ("6a", B), *((f"6{c}", C) for c in "bcde")]:
        outputs = []
        for branch in branches:
            y = x
            for name in branch.split():
                y = layer(name if name in ("max", "pool") else f"Mixed_{block}.{name}", y)
            outputs.append(y)
        x = torch.cat(outputs, 1)
    return x.mean(3).mean(2) @ weights["fc.weight"].T + weights["fc.bias"]


def read_transformer(state: State, images: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
    weights = {key: value.double() for key, value in state.items()}
    style = embedding.double()

    def conv(name: str, x: torch.Tensor, stride: int = 1) -> torch.Tensor:
        kernel = weights[f"{name}.weight"]
        x = F.conv2d(
            F.pad(x, (kernel.shape[-1] // 2,) * 4, mode="reflect"), kernel, weights[f"{name}.bias"], stride
        )
        variance, mean = torch.var_mean(x, (2, 3), correction=0, keepdim=True)
        return (x - mean) / (variance + 1e-5).sqrt()

    def restyle(layer: int, number: str, x: torch.Tensor) -> torch.Tensor:
        gamma, beta = (
            style @ weights[f"layers.{layer}.fc_{part}{number}.weight"].T
            + weights[f"layers.{layer}.fc_{part}{number}.bias"]
            for part in ("gamma", "beta")
        )
        return gamma[..., None, None] * x + beta[..., None, None]

    x = images.double()
    for layer, stride in enumerate((1, 2, 2)):
        x = conv(f"layers.{layer}.conv", x, stride).relu()
    for layer in range(3, 8):
        y = restyle(layer, "1", conv(f"layers.{layer}.conv1", x)).relu()
        x = x + restyle(layer, "2", conv(f"layers.{layer}.conv2", y))
    for layer in (8, 9):
        x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        x = restyle(layer, "", conv(f"layers.{layer}.conv", x)).relu()
    return restyle(10, "", conv("layers.10.conv", x)).sigmoid()


# --------------------------------------------------------------------------------------------------- tests


def test_embeddings_are_the_plain_reading_s(style: GhiasiStyle, states: tuple[State, State]) -> None:
    embedding = style.embed(images())
    assert embedding.shape == (2, style.size)
    torch.testing.assert_close(embedding.double(), read_predictor(states[0], images()), atol=1e-4, rtol=1e-4)


def test_transfer_is_the_plain_reading_s(style: GhiasiStyle, states: tuple[State, State]) -> None:
    embedding = torch.randn(2, 100, generator=torch.Generator().manual_seed(3))
    styled = style.transfer(images(), embedding)
    expected = read_transformer(states[1], images(), embedding)
    torch.testing.assert_close(styled.double(), expected, atol=1e-4, rtol=0)
    assert expected.std() > 0.1 and (styled[0] - style.transfer(images(), embedding.flip(0))[0]).std() > 0.05


@pytest.mark.parametrize("size", [(45, 50), (5, 9), (64, 64)])
def test_any_size_comes_back(style: GhiasiStyle, size: tuple[int, int]) -> None:
    assert style.transfer(images(1, size), torch.zeros(1, 100)).shape == (1, 3, *size)


def test_train_mode_autocast_and_gradients_change_nothing(style: GhiasiStyle) -> None:
    x = images(1)
    expected = style.transfer(x, style.embed(x))
    style.train()
    with torch.autocast("cpu", torch.bfloat16):
        styled = style.transfer(x.clone().requires_grad_(), style.embed(x))
    assert torch.equal(styled, expected) and not styled.requires_grad
    assert not any(parameter.requires_grad for parameter in style.parameters())


def test_statistics_belong_to_the_predictor_s_weights(style: GhiasiStyle, folder: Path) -> None:
    mean, covariance = torch.zeros(100).double(), torch.eye(100).double()
    measured = StyleStatistics("ghiasi", mean, covariance, style.fingerprint(), 1000, "a test")
    earth = EarthStyle(style, measured, ratio=0.1, patch=16)
    assert earth.styled(images(1)).isfinite().all()
    again = GhiasiStyle()
    again.load_checkpoints(folder)
    measured.check(again)
    with torch.no_grad():
        again.transformer.layers[0].conv.bias.add_(1)
        measured.check(again)
        again.predictor.fc.bias[0] += 1
    with pytest.raises(ValueError, match="made with other weights of style 'ghiasi'"):
        measured.check(again)


def test_the_report_says_what_was_dropped(folder: Path, capsys: pytest.CaptureFixture) -> None:
    report = GhiasiStyle().load_checkpoints(folder)
    assert list(report.dropped) == ["transformer.layers.0.instancenorm.running_mean"]
    assert not report.initialised
    assert "not part of this network" in capsys.readouterr().err


def test_files_that_do_not_fit(folder: Path, states: tuple[State, State], tmp_path: Path) -> None:
    style = GhiasiStyle()
    with pytest.raises(FileNotFoundError, match=r"nowhere: no such folder.*checkpoint_stylepredictor\.pth"):
        style.load_checkpoints(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"checkpoint_stylepredictor\.pth: no such file"):
        style.load_checkpoints(tmp_path)
    predictor = tmp_path / "checkpoint_stylepredictor.pth"
    predictor.write_bytes((folder / predictor.name).read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"checkpoint_stylepredictor\.pth: not readable as weights"):
        style.load_checkpoints(tmp_path)
    torch.save({"state_dict_stylepredictor": {**states[0], "fc.bias": torch.zeros(50)}}, predictor)
    with pytest.raises(ValueError, match=r"predictor key fc\.bias has shape \(50,\)"):
        style.load_checkpoints(tmp_path)
    predictor.write_bytes((folder / predictor.name).read_bytes())
    torch.save(
        {"state_dict_ghiasi": {"layers.0.conv.bias": torch.zeros(32)}},
        tmp_path / "checkpoint_transformer.pth",
    )
    with pytest.raises(ValueError, match=r"checkpoint_transformer\.pth: \d+ transformer keys are missing"):
        style.load_checkpoints(tmp_path)


def test_images_too_small_for_the_predictor(style: GhiasiStyle) -> None:
    assert style.embed(images(1, (43, 43))).isfinite().all()
    with pytest.raises(ValueError, match="images of 42 x 64 pixels; its style predictor needs 43 x 43"):
        style.embed(images(1, (42, 64)))
    with pytest.raises(ValueError, match=r"expected \(2, 100\)"):
        style.transfer(images(2), torch.zeros(2, 9))
