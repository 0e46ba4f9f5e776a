"""Statistics of styles: measured in a stream, sampled, kept in a file."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from rsmodels.style import ColorStyle, RunningMoments, StyleStatistics, synthetic_field


def example(size: int = 9, **changes) -> StyleStatistics:
    generator = torch.Generator().manual_seed(2)
    factor = torch.randn(size, size, generator=generator, dtype=torch.float64)
    mean = torch.randn(size, generator=generator, dtype=torch.float64)
    values = {"style": "color", "mean": mean, "covariance": factor @ factor.T, "count": 7, "source": "here"}
    return StyleStatistics(**{**values, **changes})


# ------------------------------------------------------------------------------------------------ sampling


def test_full_is_mean_plus_u_root_s_z() -> None:
    statistics = example()
    drawn = statistics.sample(5, torch.Generator().manual_seed(4))
    z = torch.randn(5, 9, generator=torch.Generator().manual_seed(4), dtype=torch.float64).numpy()
    u, s, _ = np.linalg.svd(statistics.covariance.numpy())
    # Two decompositions of one matrix agree on each column of U up to its sign, and so on z.
    assert drawn.dtype == torch.float32 and drawn.shape == (5, 9)
    coordinates = (drawn.numpy() - statistics.mean.numpy()) @ u / np.sqrt(s)
    np.testing.assert_allclose(np.abs(coordinates), np.abs(z), rtol=1e-3, atol=1e-4)


def test_full_has_the_covariance_and_diagonal_the_singular_values() -> None:
    statistics = example(3)
    generator = torch.Generator().manual_seed(0)
    full = statistics.sample(200_000, generator).double()
    torch.testing.assert_close(full.mean(0), statistics.mean, atol=0.05, rtol=0)
    torch.testing.assert_close(torch.cov(full.T), statistics.covariance, atol=0.05, rtol=0.03)

    diagonal = statistics.sample(4, torch.Generator().manual_seed(1), covariance="diagonal")
    z = torch.randn(4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    singular = torch.linalg.svdvals(statistics.covariance)
    torch.testing.assert_close(diagonal.double(), statistics.mean + z * singular.sqrt(), atol=1e-5, rtol=0)


def test_a_covariance_without_full_rank_is_sampled_within_its_rank() -> None:
    direction = torch.tensor([1.0, 2.0, 2.0], dtype=torch.float64)
    statistics = example(3, covariance=torch.outer(direction, direction), mean=torch.zeros(3).double())
    drawn = statistics.sample(10, torch.Generator().manual_seed(0)).double()
    across = drawn - torch.outer(drawn @ direction, direction) / 9
    assert drawn.norm() > 1 and across.abs().max() < 1e-5


def test_the_global_generator_serves_by_default() -> None:
    torch.manual_seed(1)
    first = example().sample(2)
    torch.manual_seed(1)
    assert torch.equal(example().sample(2), first)
    with pytest.raises(ValueError, match="covariance='half': expected one of full, diagonal"):
        example().sample(1, covariance="half")


# ----------------------------------------------------------------------------------------------- measuring


def test_running_moments_are_those_of_all_in_any_order() -> None:
    embeddings = 100 + torch.randn(101, 5, generator=torch.Generator().manual_seed(0)).double()
    forward, backward = RunningMoments(5), RunningMoments(5)
    for part in embeddings.split(7):
        forward.add(part)
    for one in embeddings.flip(0):
        backward.add(one[None])
    backward.add(embeddings[:0])
    for moments in (forward, backward):
        assert moments.count == 101
        torch.testing.assert_close(moments.mean, embeddings.mean(0), atol=1e-11, rtol=0)
        torch.testing.assert_close(moments.covariance(), torch.cov(embeddings.T), atol=1e-11, rtol=0)


# ------------------------------------------------------------------------------------------- on the disk


def test_a_file_keeps_every_digit(tmp_path: Path) -> None:
    statistics = example(weights="ab" * 32)
    statistics.save(tmp_path / "style.json")
    loaded = StyleStatistics.load(tmp_path / "style.json")
    assert torch.equal(loaded.mean, statistics.mean) and torch.equal(loaded.covariance, statistics.covariance)
    kept = ("style", "weights", "count", "source")
    assert [getattr(loaded, name) for name in kept] == [getattr(statistics, name) for name in kept]
    with torch.device("meta"):
        assert StyleStatistics.load(tmp_path / "style.json").mean.device.type == "cpu"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mean": None}, "not all numbers|mean of shape"),
        ({"mean": [1.0, "x"]}, "not all numbers"),
        ({"mean": [1.0]}, r"mean of shape \(1,\) and covariance of shape \(9, 9\)"),
        ({"mean": [float("nan")] * 9}, "NaN or infinity"),
        (
            {"covariance": [[-1.0 if i == j else 0.0 for i in range(9)] for j in range(9)]},
            "eigenvalues of 0 or",
        ),
        ({"covariance": [[float(i > j) for i in range(9)] for j in range(9)]}, "not symmetric"),
        ({"style": 3}, "style is 3"),
    ],
)
def test_a_file_that_was_changed_is_refused(tmp_path: Path, change: dict, message: str) -> None:
    path = tmp_path / "style.json"
    example().save(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=message) as caught:
        StyleStatistics.load(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_no_file_and_other_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"style\.json: no such file.*rsmodels style-stats"):
        StyleStatistics.load(tmp_path / "style.json")
    (tmp_path / "other.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match=r"other\.json: not style statistics"):
        StyleStatistics.load(tmp_path / "other.json")
    (tmp_path / "weights.json").write_bytes(b"\x80\x81")
    with pytest.raises(ValueError, match=r"weights\.json: not a readable JSON file"):
        StyleStatistics.load(tmp_path / "weights.json")


def test_statistics_of_another_style_are_refused() -> None:
    style = ColorStyle()
    example().check(style)
    with pytest.raises(
        ValueError,
        match=r"'ghiasi' \(S = 9\), the style here is 'color' \(S = 9\).*style-stats --style color`",
    ):
        example(style="ghiasi").check(style)
    with pytest.raises(ValueError, match=r"\(S = 4\), the style here"):
        example(4).check(style)
    with pytest.raises(
        ValueError, match=r"other weights of style 'color' .abababababab…. than those here .none"
    ):
        example(weights="ab" * 32).check(style)


def test_what_comes_with_the_library_is_of_color_style() -> None:
    statistics = synthetic_field()
    statistics.check(ColorStyle())
    assert statistics.count >= 1000 and "targets" in statistics.source
    assert (torch.linalg.eigvalsh(statistics.covariance) > 0).all()
    assert statistics.mean[:3].min() > 0.1 and statistics.mean[:3].max() < 0.9
