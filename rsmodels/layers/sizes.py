"""Image sizes as users give them."""

from rsmodels.arguments import ImageSizeError


def image_size_pair(image_size: int | tuple[int, int] | list[int], *, multiple_of: int) -> tuple[int, int]:
    """(H, W) from one int or a pair; a size that `multiple_of` does not divide is an ImageSizeError."""
    pair = tuple(image_size) if isinstance(image_size, tuple | list) else (image_size, image_size)
    if len(pair) != 2 or any(not isinstance(side, int) or side <= 0 or side % multiple_of for side in pair):
        raise ImageSizeError(image_size, multiple_of)
    return pair
