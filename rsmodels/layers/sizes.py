"""Image sizes as users give them, and images held against them."""

from torch import Tensor

from rsmodels.arguments import ImageSizeError


def image_size_pair(image_size: int | tuple[int, int] | list[int], *, multiple_of: int) -> tuple[int, int]:
    """(H, W) from one int or a pair; a size that `multiple_of` does not divide is an ImageSizeError."""
    pair = tuple(image_size) if isinstance(image_size, tuple | list) else (image_size, image_size)
    if len(pair) != 2 or any(not isinstance(side, int) or side <= 0 or side % multiple_of for side in pair):
        raise ImageSizeError(image_size, multiple_of)
    return pair


def check_images(images: Tensor, channels: int, image_size: tuple[int, int]) -> None:
    """ValueError where `images` are not (B, channels, H, W), H and W those of `image_size`."""
    if images.shape[1:] != (channels, *image_size):
        raise ValueError(
            f"images of shape {tuple(images.shape)}: this model takes (B, {channels}, {image_size[0]}, "
            f"{image_size[1]}); resize or tile the images, or create the model with their image_size="
        )
