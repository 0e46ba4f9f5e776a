"""Image sizes as users give them."""


def image_size_pair(image_size: int | tuple[int, int] | list[int], *, multiple_of: int) -> tuple[int, int]:
    """(H, W) from one int or a pair; a size that `multiple_of` does not divide is a ValueError."""
    pair = tuple(image_size) if isinstance(image_size, tuple | list) else (image_size, image_size)
    if len(pair) != 2 or any(not isinstance(side, int) or side <= 0 or side % multiple_of for side in pair):
        raise ValueError(
            f"image_size={image_size}: expected one size or (H, W), in pixels, each a positive multiple of "
            f"{multiple_of}; resize or tile the images to such a size"
        )
    return pair
