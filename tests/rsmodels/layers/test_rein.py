"""layers/rein.py against an independent reading of its formula in float64, gradients included."""

import pytest
import torch
from torch import Tensor

from rsmodels.layers.rein import Rein

DEPTH, DIM, TOKENS, RANK, QUERY, PREFIX = 3, 32, 7, 4, 12, 2


@pytest.fixture
def rein() -> Rein:
    """With values that make every part matter, and a scale at which its own error would show."""
    torch.manual_seed(0)
    rein = Rein(DEPTH, DIM, tokens=TOKENS, rank=RANK, query_dim=QUERY)
    with torch.no_grad():
        for name, parameter in rein.named_parameters():
            parameter.copy_(torch.randn(parameter.shape) * (0.7 if name.startswith("token") else 0.3))
    return rein


def doubled(rein: Rein) -> dict[str, Tensor]:
    return {n: p.detach().double().requires_grad_() for n, p in rein.named_parameters()}


def refined_in_float64(p: dict[str, Tensor], x: Tensor, index: int) -> Tensor:
    """Image by image and token by token, as the paper describes it."""
    tokens = p["token_a"][index] @ p["token_b"][index]
    values = tokens @ p["mlp_token.weight"].T + p["mlp_token.bias"]
    images = []
    for image in x:
        rows = list(image[:PREFIX])
        for f in image[PREFIX:]:
            similarity = torch.stack([(f * token).sum() for token in tokens]) / DIM**0.5
            weights = similarity.exp() / similarity.exp().sum()
            added = sum(weights[i] * values[i] for i in range(1, TOKENS))
            rows.append(f + p["scale"] * ((added + f) @ p["mlp_delta.weight"].T + p["mlp_delta.bias"]))
        images.append(torch.stack(rows))
    return torch.stack(images)


def queries_in_float64(p: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    layers = [
        p["token_a"][i] @ p["token_b"][i] @ p["to_query.weight"].T + p["to_query.bias"] for i in range(DEPTH)
    ]
    merged = []
    for token in range(TOKENS):
        row = []
        for channel in range(QUERY):
            values = torch.stack([layer[token, channel] for layer in layers])
            row += [values.max(), values.sum() / DEPTH, values[-1]]
        merged.append(torch.stack(row))
    position = torch.stack(merged) @ p["merge.weight"].T + p["merge.bias"]
    return position, position @ p["to_feature.weight"].T + p["to_feature.bias"]


def assert_close(found: Tensor, expected: Tensor, what: str) -> None:
    assert found.shape == expected.shape, what
    assert ((found.double() - expected).norm() / expected.norm()).item() < 1e-5, what


def test_forward_and_gradients_are_the_formulas(rein: Rein) -> None:
    p = doubled(rein)
    x = torch.randn(2, PREFIX + 5, DIM, requires_grad=True)
    exact = x.detach().double().requires_grad_()
    direction = torch.randn(2, PREFIX + 5, DIM)
    out, expected = rein(x, 1, PREFIX), refined_in_float64(p, exact, 1)
    assert torch.equal(out[:, :PREFIX], x[:, :PREFIX]), "class token and registers are left as they are"
    assert_close(out, expected, "output")
    (out * direction).sum().backward()
    (expected * direction).sum().backward()
    assert_close(x.grad, exact.grad, "features")
    found = {n: q.grad for n, q in rein.named_parameters() if q.grad is not None}
    wanted = {n: q.grad for n, q in p.items() if q.grad is not None}
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert_close(found[name], gradient, name)
    assert not found["token_a"][[0, 2]].any(), "the tokens of other layers"


def test_the_first_token_gives_nothing_and_takes_its_share(rein: Rein) -> None:
    x = torch.randn(1, PREFIX + 4, DIM)
    before = rein(x, 0, PREFIX)
    with torch.no_grad():
        rein.token_a[0, 0] += 1.0  # another share, the same values
    after = rein(x, 0, PREFIX)
    assert (after - before).abs().max() > 1e-4
    with torch.no_grad():  # all the share: nothing is added but MLP_f(f)
        rein.token_b[0].zero_()
        rein.token_b[0, 0, :] = 1e4 * x[0, PREFIX]
        rein.token_a[0].zero_()
        rein.token_a[0, 0, 0] = 1.0
    alone = x[0, PREFIX] + rein.scale * rein.mlp_delta(x[0, PREFIX])
    torch.testing.assert_close(rein(x, 0, PREFIX)[0, PREFIX], alone)


def test_queries_and_their_gradients_are_the_formulas(rein: Rein) -> None:
    p = doubled(rein)
    found, expected = rein.queries(), queries_in_float64(p)
    for name, ours, theirs in zip(("position", "feature"), found, expected, strict=True):
        assert_close(ours, theirs, name)
    direction = torch.randn(TOKENS, QUERY)
    sum((q * direction).sum() for q in found).backward()
    sum((q * direction).sum() for q in expected).backward()
    for name, parameter in rein.named_parameters():
        assert (parameter.grad is None) == (p[name].grad is None), name
        if parameter.grad is not None:
            assert_close(parameter.grad, p[name].grad, name)


def test_a_new_one_hardly_changes_the_features() -> None:
    rein = Rein(DEPTH, DIM, tokens=TOKENS, rank=RANK, query_dim=QUERY)
    assert rein.scale.tolist() == [pytest.approx(1e-3)]
    x = torch.randn(1, 9, DIM)
    change = (rein(x, 2, 1) - x).abs().max().item()
    assert 0 < change < 0.02


@pytest.mark.parametrize("options", ({"tokens": 1}, {"rank": 0}))
def test_what_cannot_be_is_refused(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        Rein(DEPTH, DIM, **options)
