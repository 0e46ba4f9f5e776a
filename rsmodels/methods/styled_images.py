"""Where CrossEarth's styles come from: files named when a model is created, and later its own state dict."""

import os
import sys
from typing import Any

from rsmodels.registry import FROM_STATE
from rsmodels.style import EarthStyle, StyleStatistics, create_style, synthetic_field
from rsmodels.style.ghiasi import SMALLEST


def make_earth_style(
    name: str,
    weights: str | None,
    statistics: str | None,
    *,
    image_size: tuple[int, int],
    mix: float,
    **options: Any,
) -> EarthStyle:
    """The module that makes X_S of X.

    Args:
        name: of the style model, "color" or "ghiasi".
        weights: folder of the published checkpoints, for "ghiasi".
        statistics: file of `rsmodels style-stats`; None takes those of the generated field archive, which are
            of "color", and says so in one line. FROM_STATE, here or for the weights, reads nothing.
        image_size: H and W of X; a new model's style must cope with it.
        mix, options: of EarthStyle.
    """
    if FROM_STATE in (weights, statistics):
        return EarthStyle(create_style(name), None, mix=mix, **options)
    if name == "ghiasi" and mix < 1 and min(image_size) < SMALLEST:
        height, width = image_size
        raise ValueError(
            f"image_size={height}x{width} with style_model='ghiasi': its predictor needs {SMALLEST}x"
            f"{SMALLEST} pixels or more; take larger images, or style_model='color'"
        )
    if name == "ghiasi" and (weights is None or statistics is None):
        raise ValueError(
            f"style_model='ghiasi' with style_weights={weights}, style_statistics={statistics}: it needs the "
            "folder of its published checkpoints, and a file of statistics made with them by `rsmodels "
            "style-stats --style ghiasi`; or take style_model='color'"
        )
    style = create_style(name, weights)
    if statistics is not None:
        return EarthStyle(style, StyleStatistics.load(statistics), mix=mix, **options)
    if os.environ.get("RANK", "0") == "0":
        print(
            "styles are those of the generated field archive; style_statistics=FILE takes those of real "
            "images, measured by `rsmodels style-stats`",
            file=sys.stderr,
        )
    return EarthStyle(style, synthetic_field(), mix=mix, **options)
