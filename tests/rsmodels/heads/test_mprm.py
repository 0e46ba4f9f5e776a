"""heads/mprm.py against equations (4) to (6), written out once more."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rsmodels.heads.mprm import AdaptiveFeatureFusion, HybridFeatureFusion, MaskFeatureFusion


def layer_norm_2d(x: Tensor, norm: nn.Module) -> Tensor:
    mean, var = x.mean(1, keepdim=True), x.var(1, keepdim=True, unbiased=False)
    return (x - mean) / (var + norm.eps).sqrt() * norm.weight[:, None, None] + norm.bias[:, None, None]


def attention(x: Tensor, layers: nn.Sequential) -> Tensor:
    x = layer_norm_2d(F.conv2d(x, layers[0].weight, layers[0].bias), layers[1]).relu()
    return layer_norm_2d(F.conv2d(x, layers[3].weight, layers[3].bias), layers[4])


def test_adaptive_feature_fusion_is_equation_4() -> None:
    torch.manual_seed(0)
    affm = AdaptiveFeatureFusion(16)
    a, b = torch.randn(2, 16, 6, 5), torch.randn(2, 16, 6, 5)
    local = attention(a + b, affm.local_attention)
    pooled = attention(F.adaptive_avg_pool2d(a + b, 1), affm.global_attention).expand_as(local)
    w = torch.sigmoid(affm.spatial((local + pooled).mean(1, keepdim=True)))
    assert w.shape == (2, 1, 6, 5)
    torch.testing.assert_close(affm(a, b), a * w + b * (1 - w) + local + pooled, rtol=1e-4, atol=1e-5)
    assert affm.local_attention[0].weight.shape == (4, 16, 1, 1)


def test_batch_of_one_trains() -> None:
    affm = AdaptiveFeatureFusion(16).train()
    affm(torch.randn(1, 16, 2, 2), torch.randn(1, 16, 2, 2)).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in affm.parameters())


def test_mask_feature_fusion_is_equation_6() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 16)
    plain, literal = MaskFeatureFusion(16, 8), MaskFeatureFusion(16, 8, last_relu=True)
    literal.load_state_dict(plain.state_dict())
    first, second = plain.layers[0], plain.layers[2]
    expected = second.lin2(F.relu(second.lin1(F.relu(first.lin2(F.relu(first.lin1(x)))))))
    torch.testing.assert_close(plain(x), expected)
    torch.testing.assert_close(literal(x), expected.relu())
    assert (plain(x) < 0).any()


def test_hybrid_feature_fusion_uses_every_input() -> None:
    torch.manual_seed(0)
    mhff = HybridFeatureFusion(24, 16, 8)
    maps = [torch.randn(1, 16, 2**i, 2**i, requires_grad=True) for i in range(1, 5)]
    early = torch.randn(1, 24, 4, 4, requires_grad=True)
    out = mhff(maps, early)
    assert out.shape == (1, 8, 16, 16)
    out.square().sum().backward()
    assert all(x.grad.abs().sum() > 0 for x in [*maps, early])
    assert all(p.grad is not None for p in mhff.parameters())
