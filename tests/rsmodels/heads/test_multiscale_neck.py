"""heads/multiscale_neck.py: eq. (1), scale by scale."""

import torch
import torch.nn.functional as F

from rsmodels.heads.multiscale_neck import MultiScaleNeck


def test_scales_and_widths() -> None:
    neck = MultiScaleNeck(64, 16)
    features = neck([torch.randn(2, 64, 4, 6)] * 4)
    assert [tuple(f.shape) for f in features] == [
        (2, 16, 16, 24),
        (2, 16, 8, 12),
        (2, 16, 4, 6),
        (2, 16, 2, 3),
    ]
    assert neck.up_4[0].weight.shape == (64, 32, 2, 2)  # U1: D → D/2
    assert neck.up_4[3].weight.shape == (32, 16, 2, 2)  # U2: D/2 → D/4
    assert neck.up_8.weight.shape == (64, 32, 2, 2)  # U3: D → D/2


def test_each_scale_sees_its_own_source() -> None:
    neck = MultiScaleNeck(32, 16)
    sources = [torch.randn(1, 32, 4, 4) for _ in range(4)]
    before = neck(sources)
    for i in range(4):
        changed = list(sources)
        changed[i] = torch.randn(1, 32, 4, 4)
        after = neck(changed)
        assert [not torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [
            j == i for j in range(4)
        ]


def test_coarsest_scale_is_pooled() -> None:
    neck = MultiScaleNeck(32, 16)
    x = torch.randn(1, 32, 4, 4)
    torch.testing.assert_close(neck([x] * 4)[3], neck.neck_32(F.max_pool2d(x, 2)))
