"""Earth-style injection (CrossEarth, eqs. 1–6): style models, a field archive's styles, masks, X_S.

Knows no model of the registry, and needs nothing but PyTorch and NumPy.
"""

from rsmodels.style.base import VALUE_RANGE, StyleModel, from_unit, to_unit
from rsmodels.style.color import ColorStyle
from rsmodels.style.ghiasi import GhiasiStyle
from rsmodels.style.injection import EarthStyle
from rsmodels.style.masks import MODES, draw_mask
from rsmodels.style.statistics import COVARIANCES, RunningMoments, StyleStatistics, synthetic_field

STYLES = ("color", "ghiasi")


def create_style(name: str, weights: str | None = None) -> StyleModel:
    """The style model `name`, one of STYLES.

    Args:
        weights: of "ghiasi": the folder of its published checkpoints. Without it the networks are as yet
            random: for a model that fills them from its own state dict.
    """
    if name not in STYLES:
        raise ValueError(f"style {name!r}: no such style; expected one of {', '.join(STYLES)}")
    if name == "color":
        if weights is not None:
            raise ValueError(
                f"style weights {weights}: the style 'color' has none; leave them out, or take 'ghiasi'"
            )
        return ColorStyle()
    style = GhiasiStyle()
    if weights is not None:
        style.load_checkpoints(weights)
    return style


__all__ = [
    "COVARIANCES",
    "MODES",
    "STYLES",
    "VALUE_RANGE",
    "ColorStyle",
    "EarthStyle",
    "GhiasiStyle",
    "RunningMoments",
    "StyleModel",
    "StyleStatistics",
    "create_style",
    "draw_mask",
    "from_unit",
    "synthetic_field",
    "to_unit",
]
