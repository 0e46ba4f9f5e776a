"""layers/: each equals its plain PyTorch formula; norms have right gradients in bf16; LoRA merges exactly."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rsmodels.layers import MLP, LayerNorm, LayerNorm2d, Linear, LoRAQKV, image_size_pair


@pytest.mark.parametrize("norm, shape", [(LayerNorm(16), (2, 5, 16)), (LayerNorm2d(16), (2, 16, 3, 5))])
def test_norm_equals_the_formula(norm: nn.Module, shape: tuple[int, ...]) -> None:
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = torch.randn(shape)
    axis = 1 if isinstance(norm, LayerNorm2d) else -1
    mean, var = x.mean(axis, keepdim=True), x.var(axis, keepdim=True, unbiased=False)
    per_channel = (1, -1, 1, 1) if isinstance(norm, LayerNorm2d) else (1, 1, -1)
    expected = (x - mean) / (var + norm.eps).sqrt() * norm.weight.view(per_channel) + norm.bias.view(
        per_channel
    )
    torch.testing.assert_close(norm(x), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norm_gradients_in_low_precision(dtype: torch.dtype) -> None:
    """PyTorch's own are off by 1e-2 and more here, growing with the number of rows."""
    torch.manual_seed(0)
    rows, dim = 4096, 64
    x = torch.randn(rows, dim).to(dtype)
    upstream = torch.randn(rows, dim).to(dtype)

    def gradients(norm: LayerNorm, x: torch.Tensor) -> list[torch.Tensor]:
        x = x.clone().requires_grad_()
        norm(x).backward(upstream.to(x.dtype))
        return [x.grad, norm.weight.grad, norm.bias.grad]

    expected = gradients(LayerNorm(dim).double(), x.double())
    for found, right, bound in zip(gradients(LayerNorm(dim), x), expected, (4e-3, 1e-3, 1e-3), strict=True):
        assert (found.double() - right).norm() / right.norm() < bound


def test_norm_gradients_under_autocast() -> None:
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(32, 32), LayerNorm(32), nn.Linear(32, 32))
    x = torch.randn(4096, 32)
    layer(x).square().mean().backward()
    expected = layer[1].weight.grad.clone()
    layer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        layer(x).float().square().mean().backward()
    assert (layer[1].weight.grad - expected).norm() / expected.norm() < 2e-2


def test_frozen_norm_stays_in_its_dtype() -> None:
    norm = LayerNorm(8).requires_grad_(False)
    x = torch.randn(3, 8).bfloat16()
    assert norm(x).dtype == torch.bfloat16
    torch.testing.assert_close(norm(x), F.layer_norm(x, (8,), norm.weight, norm.bias, norm.eps))


@pytest.mark.parametrize("activation, function", [(None, lambda x: x), ("gelu", F.gelu), ("relu", F.relu)])
def test_linear(activation: str | None, function) -> None:
    layer = Linear(12, 7, activation=activation)
    x = torch.randn(2, 3, 12)
    torch.testing.assert_close(
        layer(x), function(F.linear(x, layer.weight, layer.bias)), rtol=1e-5, atol=1e-6
    )
    assert layer.state_dict().keys() == nn.Linear(12, 7).state_dict().keys()


def test_mlp() -> None:
    mlp = MLP(6, 10, 4, activation="gelu")
    x = torch.randn(5, 6)
    expected = F.linear(F.gelu(F.linear(x, mlp.lin1.weight, mlp.lin1.bias)), mlp.lin2.weight, mlp.lin2.bias)
    torch.testing.assert_close(mlp(x), expected, rtol=1e-5, atol=1e-6)


def lora(*, trained: bool, alpha: float | None = None) -> LoRAQKV:
    layer = LoRAQKV(16, rank=3, alpha=alpha)
    if trained:
        nn.init.normal_(layer.lora_b_q)
        nn.init.normal_(layer.lora_b_v)
    return layer


def test_new_lora_is_the_plain_projection_to_the_last_bit() -> None:
    layer, plain = lora(trained=False), Linear(16, 48)
    plain.load_state_dict({"weight": layer.weight, "bias": layer.bias})
    x = torch.randn(2, 4, 5, 16)
    assert torch.equal(layer(x), plain(x))
    assert layer.lora_a_q.abs().min() > 0


@pytest.mark.parametrize("alpha", [None, 6.0])
def test_lora_formula(alpha: float | None) -> None:
    layer = lora(trained=True, alpha=alpha)
    x = torch.randn(7, 16)
    q, k, v = F.linear(x, layer.weight, layer.bias).chunk(3, dim=-1)
    scale = 1.0 if alpha is None else alpha / 3
    q = q + scale * x @ layer.lora_a_q.T @ layer.lora_b_q.T
    v = v + scale * x @ layer.lora_a_v.T @ layer.lora_b_v.T
    torch.testing.assert_close(layer(x), torch.cat([q, k, v], dim=-1), rtol=1e-4, atol=1e-5)


def test_merge_and_exact_unmerge() -> None:
    layer = lora(trained=True).eval()
    x = torch.randn(7, 16)
    before, keys, weight = layer(x), set(layer.state_dict()), layer.weight.clone()
    layer.merge_lora()
    torch.testing.assert_close(layer(x), before, rtol=1e-4, atol=1e-5)
    assert not torch.equal(layer(x), before)  # another product: the merged path was taken
    assert set(layer.state_dict()) == keys  # a saved merged layer does not hold the update twice
    layer.unmerge_lora()
    assert torch.equal(layer.weight, weight)
    assert torch.equal(layer(x), before)


def test_merged_lora_never_goes_stale() -> None:
    layer = lora(trained=True).eval()
    layer.merge_lora()
    assert layer.train().merged_weight is None
    layer.eval().merge_lora()
    layer.load_state_dict(lora(trained=True).state_dict())
    assert layer.merged_weight is None


def test_only_the_update_trains() -> None:
    layer = lora(trained=True)
    layer(torch.randn(4, 16)).sum().backward()
    assert {n for n, p in layer.named_parameters() if p.grad is not None} == {
        "lora_a_q",
        "lora_b_q",
        "lora_a_v",
        "lora_b_v",
    }


@pytest.mark.parametrize("size, pair", [(64, (64, 64)), ((32, 96), (32, 96)), ([96, 32], (96, 32))])
def test_image_size_pair(size, pair: tuple[int, int]) -> None:
    assert image_size_pair(size, multiple_of=32) == pair


@pytest.mark.parametrize("size", [0, -32, 50, (64, 65), (64,), (64, 64, 64), 64.0])
def test_image_size_errors_name_the_size(size) -> None:
    with pytest.raises(ValueError, match=f"image_size={re.escape(str(size))}: .*multiple of 32"):
        image_size_pair(size, multiple_of=32)
