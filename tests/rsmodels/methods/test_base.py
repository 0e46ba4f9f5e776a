"""What models of several methods share: the check of their input, their normalisation."""

import pytest
import torch

import rsmodels
from rsmodels.methods.base import Segmenter
from rsmodels.registry import IMAGENET_MEAN


@pytest.mark.parametrize("name", ["ktda_tiny", "dinov2_upernet_tiny", "rs_sam_tiny"])
@pytest.mark.parametrize("shape", [(2, 3, 64, 96), (2, 4, 64, 64), (3, 64, 64)])
def test_images_of_another_shape_are_refused(name: str, shape: tuple[int, ...]) -> None:
    model = rsmodels.create_model(name, num_classes=2, image_size=64)
    with pytest.raises(ValueError, match=r"this model takes \(B, 3, 64, 64\)") as error:
        model(torch.zeros(shape))
    assert str(shape) in str(error.value) and "\n" not in str(error.value)


def test_a_student_of_four_bands() -> None:
    options = {"student_options": {"in_chans": 4}, "transfer": False}
    model = rsmodels.create_model("ktda_tiny", num_classes=2, image_size=64, bands=(1, 2, 3, 4), **options)
    assert model.preprocessing.mean == (*IMAGENET_MEAN, IMAGENET_MEAN[0])
    with torch.no_grad():
        assert model(torch.zeros(2, 4, 64, 64)).shape == (2, 2, 64, 64)


def test_a_segmenter_without_all_its_parts_is_refused() -> None:
    class Half(Segmenter):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images

    with pytest.raises(TypeError, match="losses_and_logits"):
        Half(num_classes=2, image_size=64)
