"""Registry-wide: what every model promises, on the tiny one of each family."""

import inspect
import re
from typing import get_type_hints

import pytest
import torch
from torch import nn

import rsmodels
from rsmodels.registry import METHODS, MODELS, Preprocessing, model_for_method

TINY = rsmodels.list_models("*_tiny")
SIZE = 64


def build(name: str, *, num_classes: int = 3, **options) -> nn.Module:
    torch.manual_seed(0)
    return rsmodels.create_model(name, num_classes=num_classes, image_size=SIZE, **options)


def batch(model: nn.Module, *, size: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(size, 3, *model.image_size, generator=generator)
    mask = torch.randint(0, max(model.num_classes, 2), (size, *model.image_size), generator=generator)
    mask[:, :5] = 255
    data = {"image": image, "mask": mask}
    if transfers(model):
        shape = (size, model.teacher_dim, *model.grid_size)
        data["teacher"] = [torch.randn(shape, generator=generator) for _ in range(4)]
    return data


def transfers(model: nn.Module) -> bool:
    """Whether the model learns from a teacher's maps, besides the mask."""
    return getattr(model, "transfers", False)


def activations(name: str) -> tuple[str | None, ...]:
    """The values of the model's option of that name; None where it has none."""
    options = inspect.signature(get_type_hints(MODELS[name])["return"]).parameters
    return ("sigmoid", "softmax") if "activation" in options else (None,)


def losses_of(model: nn.Module, data: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """With the same random masks, styles and points in every call."""
    torch.manual_seed(2)
    return model.losses(data)


def gradients(model: nn.Module, data: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    sum(losses_of(model, data).values()).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def test_every_method_has_a_tiny_model() -> None:
    assert sorted(model_for_method(method, "tiny") for method in METHODS) == TINY


@pytest.mark.parametrize("name", TINY)
def test_size(name: str) -> None:
    model = rsmodels.create_model(name, num_classes=5)
    assert 5e5 < sum(p.numel() for p in model.parameters()) < 2e6
    assert model.image_size == (128, 128)


@pytest.mark.parametrize("name, activation", [(name, a) for name in TINY for a in activations(name)])
@pytest.mark.parametrize("num_classes", [1, 3])
def test_forward(name: str, num_classes: int, activation: str | None) -> None:
    options = {} if activation is None else {"activation": activation}
    model = build(name, num_classes=num_classes, **options).eval()
    with torch.no_grad():
        logits = model(batch(model)["image"])
    assert logits.shape == (2, num_classes, SIZE, SIZE) and logits.isfinite().all()
    probabilities = model.probabilities(logits)
    assert probabilities.shape == logits.shape and 0 <= probabilities.min() <= probabilities.max() <= 1
    if activation != "sigmoid" and num_classes > 1:
        torch.testing.assert_close(probabilities.sum(1), torch.ones(2, SIZE, SIZE))


@pytest.mark.parametrize("name", TINY)
def test_interface(name: str) -> None:
    model = build(name)
    assert model.model_name == name and model.num_classes == 3 and model.base_weights is None
    assert isinstance(model.preprocessing, Preprocessing)
    replayed = rsmodels.create_model(name, **{**model.arguments, "image_size": tuple(model.image_size)})
    assert replayed.state_dict().keys() == model.state_dict().keys()
    inside = set(model.modules())
    blocks = model.blocks_to_shard()
    assert blocks and all(block in inside for block in blocks)
    features = model.forward_features(batch(model)["image"])
    assert features and all(f.ndim == 4 and len(f) == 2 for f in features)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("num_classes", [1, 3])
def test_every_trainable_parameter_gets_a_gradient(name: str, num_classes: int) -> None:
    model = build(name, num_classes=num_classes).train()
    found = gradients(model, batch(model))
    assert found
    for parameter, gradient in found.items():
        assert gradient is not None and gradient.isfinite().all(), parameter
    # A is behind a zero B, GSE and injectors behind a zero scale, positions in the pixel decoder behind
    # offsets of zero; a softmax over one token has no use for queries and keys. Elsewhere zero would mean a
    # part that does not take part.
    idle = [r"\.lora_a_", r"^gse\.", r"^injectors\.\d\.\w+_proj\.", r"\.pixel_decoder\.level_embed"]
    idle += [r"(self_attn|image_to_token)\.[qk]_proj\."] if num_classes == 1 else []
    dead = [n for n, g in found.items() if not g.any() and not any(re.search(i, n) for i in idle)]
    assert dead == []


@pytest.mark.parametrize("name", TINY)
def test_all_pixels_ignored(name: str) -> None:
    model = build(name).train()
    data = batch(model)
    data["mask"].fill_(255)
    losses = {name: term.item() for name, term in losses_of(model, data).items()}
    # A teacher's maps need no labels, and masked images none; L_Δ is there where styles were drawn.
    unlabelled = losses.keys() & {"kl", "mse", "mim"}
    assert {name for name, value in losses.items() if value} - {"delta"} == unlabelled
    assert all(g.isfinite().all() for g in gradients(model, data).values())


@pytest.mark.parametrize("name", TINY)
def test_a_few_steps_learn(name: str) -> None:
    model = build(name).train()
    data = batch(model)
    data["mask"] = (nn.functional.avg_pool2d(data["image"][:, 0], 17, stride=1, padding=8) > 0).long()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=3e-3)
    totals = []
    for _ in range(20):
        optimizer.zero_grad()
        total = sum(model.losses(data).values())
        total.backward()
        optimizer.step()
        totals.append(total.item())
    assert totals[-1] < 0.95 * totals[0]


@pytest.mark.parametrize("name", TINY)
def test_state_dict_round_trip(name: str) -> None:
    first = build(name).eval()
    second = rsmodels.create_model(name, num_classes=3, image_size=SIZE).eval()
    image = batch(first)["image"]
    with torch.no_grad():
        assert not torch.equal(first(image), second(image))
        second.load_state_dict(first.state_dict())
        assert torch.equal(first(image), second(image))


@pytest.mark.parametrize("name", TINY)
def test_determinism(name: str) -> None:
    runs = []
    for _ in range(2):
        model = build(name).train()
        data = batch(model)
        runs.append((losses_of(model, data), gradients(model, data)))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(g, runs[1][1][n]) for n, g in runs[0][1].items())


@pytest.mark.parametrize("name", TINY)
def test_nothing_is_left_uninitialised(name: str) -> None:
    """Deterministic mode fills torch.empty with NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        model = build(name).train()
        assert all(p.isfinite().all() for p in model.parameters())
        assert all(g.isfinite().all() for g in gradients(model, batch(model)).values())
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", TINY)
def test_bf16_autocast(name: str) -> None:
    model = build(name).train()
    data = batch(model)
    expected = {n: t.item() for n, t in losses_of(model, data).items()}
    with torch.autocast("cpu", torch.bfloat16):
        losses = losses_of(model, data)
    sum(losses.values()).backward()
    for term, value in losses.items():
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(expected[term], rel=0.02)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    model.eval()  # in training a batch norm over two pixels makes much of a little
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        in_bf16 = model(data["image"]).float()
    exact = model(data["image"])
    assert (in_bf16 - exact).norm() / exact.norm() < 0.05


@pytest.mark.parametrize("name", TINY)
def test_activation_checkpointing(name: str) -> None:
    model = build(name).train()
    data = batch(model)
    expected = gradients(model, data)
    model.set_activation_checkpointing(True)
    found = gradients(model, data)
    assert all(torch.equal(found[n], g) for n, g in expected.items())


@pytest.mark.parametrize("name", TINY)
def test_compiles_in_one_graph(name: str) -> None:
    model = build(name).train()
    data = batch(model)
    expected = gradients(model, data)
    with torch.no_grad():
        exact = model(data["image"])
    torch._dynamo.reset()
    model.compile(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(model(data["image"]), exact, rtol=1e-4, atol=1e-5)
    model.zero_grad()
    sum(losses_of(model, data).values()).backward()
    for parameter, gradient in expected.items():
        found = model.get_parameter(parameter).grad
        torch.testing.assert_close(found, gradient, rtol=1e-3, atol=1e-5, msg=parameter)


@pytest.mark.parametrize("name", TINY)
def test_inference_compiles_in_one_graph(name: str) -> None:
    """In eval mode, without gradients and under autocast, as predict and evaluate call a model."""
    model = build(name).eval()
    image = batch(model)["image"]
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(compiled(image), model(image))


@pytest.mark.parametrize("name", TINY)
def test_exports(name: str) -> None:
    model = build(name).eval()
    image = batch(model, size=3)["image"]
    program = torch.export.export(model, (image,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    with torch.no_grad():
        for size in (1, 3):
            torch.testing.assert_close(
                program.module()(image[:size]), model(image[:size]), rtol=1e-4, atol=1e-5
            )


@pytest.mark.parametrize("name", TINY)
def test_wrong_input_size(name: str) -> None:
    model = build(name)
    with pytest.raises(ValueError, match=r"\(1, 3, 32, 64\)") as error:
        model(torch.zeros(1, 3, 32, 64))
    assert "\n" not in str(error.value)
