"""Registry-wide: every model and encoder computes the same, and trains the same, on every backend."""

import sys
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import rskernels
import rsmodels
from rskernels import dispatch
from rsmodels.methods import crossearth
from rsmodels.registry import ENCODERS

MODELS = rsmodels.list_models("*_tiny")
TINY_ENCODERS = sorted(name for name in ENCODERS if name.endswith("_tiny"))
SIZE = 64
Served = list[tuple[str, str]]


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Served:
    """(operator, backend) of every call that asks the table; calls that their arguments rule out are left
    out, for these say why in their own tests."""
    calls: Served = []

    def spy(op: str, *tensors: Tensor | None, without=None) -> str:
        name = dispatch.choose(op, *tensors, without=without)
        if not without:
            calls.append((op, name))
        return name

    for name, module in list(sys.modules.items()):
        if name.startswith("rskernels.ops.") and hasattr(module, "choose"):
            monkeypatch.setattr(module, "choose", spy)
    return calls


@pytest.fixture(autouse=True)
def no_choice_of_points(monkeypatch: pytest.MonkeyPatch) -> None:
    """The most uncertain points of a mask are chosen by rank: rounding lets one take another's place."""
    monkeypatch.setattr(
        crossearth, "mask2former_losses", partial(crossearth.mask2former_losses, importance=0.0)
    )


def spread(model: nn.Module) -> nn.Module:
    """Away from first values at which little can be compared: LoRA's B and the injectors' scale are zero,
    and hide the gradient of what is behind them; a new pixel decoder samples exactly at pixels, where the
    gradient of a place jumps."""
    for name, parameter in model.named_parameters():
        if ".lora_b_" in name or (name.startswith("injectors.") and name.endswith(".scale")):
            nn.init.normal_(parameter, std=0.1)
        elif name.endswith(".sampling_offsets.bias"):
            parameter.data += 0.1 + 0.3 * torch.rand(parameter.shape)
    return model


def build_model(name: str) -> tuple[nn.Module, Callable[[], tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    model = spread(rsmodels.create_model(name, num_classes=3, image_size=SIZE)).train()
    data = {"image": torch.randn(2, 3, SIZE, SIZE), "mask": torch.randint(0, 3, (2, SIZE, SIZE))}
    if getattr(model, "transfers", False):
        data["teacher"] = [torch.randn(2, model.teacher_dim, *model.grid_size) for _ in range(4)]

    first = {name: value.clone() for name, value in model.state_dict().items()}

    def run() -> tuple[Tensor, Tensor]:
        model.load_state_dict(first)  # batch norms remember what they have seen
        logits = model(data["image"])
        with torch.no_grad():
            model.eval()
            inference = model(data["image"])  # takes paths of its own
            model.train()
        torch.manual_seed(1)  # masks, styles and points are drawn
        loss = sum(model.losses(data).values())
        return torch.cat([logits.detach(), inference]), loss

    return model, run


# Encoders and their options. SAM's: a window that does not divide the grid, so that there is padding.
ENCODER_OPTIONS = {
    "sam_vit_tiny": [{"window_size": 3, "lora_rank": rank} for rank in (0, 4)],
    "dinov2_vit_tiny": [{"registers": count} for count in (0, 4)],
    "rvsa_vit_tiny": [{"window_size": 3}],
}


def test_every_encoder_is_here() -> None:
    assert sorted(ENCODER_OPTIONS) == TINY_ENCODERS


def build_encoder(name: str, options: dict) -> tuple[nn.Module, Callable[[], tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    size = (56, 84) if name.startswith("dinov2") else (64, 96)
    encoder = spread(ENCODERS[name](image_size=size, **options)).train()
    for parameter_name, parameter in encoder.named_parameters():
        if ".rel_pos_" in parameter_name:
            nn.init.normal_(parameter, std=0.2)
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        direction = torch.randn_like(encoder(images))

    def run() -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            inference = encoder(images)
        features = encoder(images)
        return torch.cat([features.detach(), inference]), (features.float() * direction).sum()

    return encoder, run


BUILDERS = [pytest.param(build_model, (name,), id=name) for name in MODELS]
BUILDERS += [
    pytest.param(build_encoder, (name, options), id=f"{name}-{number}")
    for name, several in ENCODER_OPTIONS.items()
    for number, options in enumerate(several)
]


def compute(
    model: nn.Module, run: Callable, backend: str, dtype: torch.dtype
) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    with rskernels.backend(backend):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            out, loss = run()
        loss.backward()
    gradients = {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}
    return out.double(), gradients


def error(found: Tensor, right: Tensor) -> float:
    return float((found - right).norm() / right.norm().clamp_min(1e-30))


def joined(gradients: dict[str, Tensor]) -> Tensor:
    return torch.cat([g.flatten() for g in gradients.values()])


@pytest.mark.parametrize("build, arguments", BUILDERS)
def test_float32(build: Callable, arguments: tuple) -> None:
    model, run = build(*arguments)
    expected, right = compute(model, run, "reference", torch.float32)
    out, gradients = compute(model, run, "auto", torch.float32)
    assert error(out, expected) < 1e-5
    assert gradients.keys() == right.keys()
    whole = joined(right).norm()
    for name, gradient in gradients.items():
        # A gradient that cancels is compared with what it cancels from.
        assert (gradient - right[name]).norm() < 1e-4 * right[name].norm() + 1e-6 * whole, name


@pytest.mark.parametrize("build, arguments", BUILDERS)
def test_bfloat16_autocast(build: Callable, arguments: tuple) -> None:
    """Each rounds in its own places: "auto" is hardly farther from float32 than the reference."""
    model, run = build(*arguments)
    expected, right = compute(model, run, "reference", torch.float32)
    eager, eager_gradients = compute(model, run, "reference", torch.bfloat16)
    out, gradients = compute(model, run, "auto", torch.bfloat16)
    assert gradients.keys() == right.keys()
    assert error(out, expected) < max(5e-3, 1.5 * error(eager, expected))
    allowed = max(5e-3, 1.5 * error(joined(eager_gradients), joined(right)))
    assert error(joined(gradients), joined(right)) < allowed


@pytest.mark.parametrize("build, arguments", BUILDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_silent_fallback(build: Callable, arguments: tuple, dtype: torch.dtype, served: Served) -> None:
    if "cpp" in dispatch.UNAVAILABLE:
        pytest.skip(dispatch.UNAVAILABLE["cpp"])
    model, run = build(*arguments)
    compute(model, run, "auto", dtype)
    accelerated = {op for op, row in dispatch.TABLE.items() if "cpp" in row.get("cpu", {}).get(dtype, ())}
    assert {"rel_pos_attention", "layer_norm"} <= {op for op, _ in served}
    assert {name for op, name in served if op in accelerated} == {"cpp"}


def test_the_reference_is_the_reference(served: Served) -> None:
    model, run = build_model(MODELS[0])
    compute(model, run, "reference", torch.float32)
    assert served and {name for _, name in served} == {"reference"}
