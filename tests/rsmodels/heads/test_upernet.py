"""heads/upernet.py and heads/fcn.py: transformers' heads, number for number, with the same weights."""

import re

import pytest
import torch
from torch import Tensor, nn
from transformers import UperNetConfig
from transformers.models.upernet.modeling_upernet import UperNetFCNHead
from transformers.models.upernet.modeling_upernet import UperNetHead as TheirUPerNet

from rsmodels.heads.fcn import FCNHead
from rsmodels.heads.upernet import UPerNetHead

IN_DIMS = (8, 12, 16, 24)
CONFIG = UperNetConfig(
    hidden_size=16, num_labels=5, auxiliary_channels=12, auxiliary_num_convs=1, auxiliary_concat_input=False
)


def maps(*sizes: tuple[int, int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, dim, *size, generator=generator) for dim, size in zip(IN_DIMS, sizes, strict=True)]


def our_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    state = {k.replace("batch_norm", "bn").replace("classifier", "conv_seg"): v for k, v in state.items()}
    return {k: v for k, v in state.items() if not re.match(r"psp_modules\.\d\.0\.", k)}


def same_weights(ours: nn.Module, theirs: nn.Module) -> None:
    torch.manual_seed(0)
    for name, tensor in theirs.state_dict().items():
        if tensor.is_floating_point():
            nn.init.uniform_(
                tensor, 0.5 if "norm" in name or "var" in name else -0.2, 1.5 if "norm" in name else 0.2
            )
    ours.load_state_dict(our_names(theirs.state_dict()))


SIZES = [((32, 32), (16, 16), (8, 8), (4, 4)), ((19, 23), (10, 12), (5, 6), (3, 3)), ((7, 7),) * 4]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("train", (False, True))
def test_upernet_equals_transformers(sizes: tuple, train: bool) -> None:
    ours, theirs = UPerNetHead(IN_DIMS, 5, dim=16, dropout=0.0), TheirUPerNet(CONFIG, list(IN_DIMS))
    same_weights(ours, theirs)
    found, expected = ours.train(train)(maps(*sizes)), theirs.train(train)(maps(*sizes))
    assert found.shape == (2, 5, *sizes[0])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    if train:
        torch.testing.assert_close(ours.bottleneck.bn.running_mean, theirs.bottleneck.batch_norm.running_mean)


@pytest.mark.parametrize("train", (False, True))
def test_fcn_equals_transformers(train: bool) -> None:
    ours, theirs = FCNHead(16, 5, dim=12, dropout=0.0), UperNetFCNHead(CONFIG, list(IN_DIMS), in_index=2)
    same_weights(ours, theirs)
    features = maps(*SIZES[0])
    torch.testing.assert_close(
        ours.train(train)(features[2]), theirs.train(train)(features), rtol=1e-4, atol=1e-5
    )


def test_every_parameter_gets_a_gradient() -> None:
    torch.manual_seed(0)
    upernet, fcn = UPerNetHead(IN_DIMS, 3, dim=8), FCNHead(16, 3, dim=8)
    features = maps(*SIZES[0])
    (upernet(features).square().mean() + fcn(features[2]).square().mean()).backward()
    for head in (upernet, fcn):
        assert all(p.grad is not None and p.grad.any() for p in head.parameters())
