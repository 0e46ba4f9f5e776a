"""What the numbers in a mask mean: class names, palette, and the map from raw labels to train ids.

A schema reads one of three codings, and never guesses between them:

- class ids: `raw_to_train` maps every value that may occur to a train id (or to `IGNORE`);
- colours: `colors` maps every RGB colour that may occur;
- a threshold: raw >= `threshold` is class 1, anything below is class 0 (DeepGlobe's roads).

A value that the schema does not list is an error that names the file, the value and what is allowed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

IGNORE = 255
IGNORE_COLOR = (0, 0, 0)
MAX_NAMED = 5  # values that one error message spells out

Color = tuple[int, int, int]


@dataclass(frozen=True)
class LabelSchema:
    """Classes of a data set and the coding of its masks.

    classes:       names, index = train id; at most 255 of them (255 is `IGNORE`)
    palette:       one RGB colour per class, for pictures and colour tables
    raw_to_train:  raw value in the file -> train id or `IGNORE`
    binary:        two classes, background and foreground, predicted by a single logit
    colors:        for colour-coded masks: RGB colour in the file -> train id or `IGNORE`
    threshold:     for grey-level masks: raw >= threshold -> 1, else 0
    """

    classes: tuple[str, ...]
    palette: tuple[Color, ...]
    raw_to_train: Mapping[int, int] = field(default_factory=dict)
    binary: bool = False
    colors: Mapping[Color, int] | None = None
    threshold: int | None = None

    def __post_init__(self) -> None:
        set_field = object.__setattr__  # the class is frozen; fields are normalised once, here
        set_field(self, "classes", tuple(str(name) for name in self.classes))
        set_field(self, "palette", tuple(_checked_color(color) for color in self.palette))
        set_field(self, "raw_to_train", {int(raw): int(train) for raw, train in self.raw_to_train.items()})
        if self.colors is not None:
            set_field(self, "colors", {_checked_color(c): int(train) for c, train in self.colors.items()})
        self._validate()

    def _validate(self) -> None:
        count = len(self.classes)
        if not 1 <= count <= IGNORE:
            raise ValueError(f"a label schema has 1 to {IGNORE} classes, not {count}")
        if len(set(self.classes)) != count:
            raise ValueError(f"class names are used twice in {', '.join(self.classes)}")
        if len(self.palette) != count:
            raise ValueError(f"{count} classes need {count} palette colours, not {len(self.palette)}")
        if self.binary and count != 2:
            raise ValueError(f"a binary schema has 2 classes, background and foreground, not {count}")
        if self.threshold is not None and not self.binary:
            raise ValueError("a threshold separates two classes: it needs binary=True")
        codings = [bool(self.raw_to_train), self.colors is not None, self.threshold is not None]
        if sum(codings) != 1:
            raise ValueError("a label schema needs exactly one of raw_to_train, colors and threshold")
        for raw, train in (*self.raw_to_train.items(), *(self.colors or {}).items()):
            if not (0 <= train < count or train == IGNORE):
                raise ValueError(
                    f"raw label {raw} maps to train id {train}; allowed: 0-{count - 1} or {IGNORE}"
                )

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def num_logits(self) -> int:
        """Channels that a model predicts: 1 for a binary schema, else one per class."""
        return 1 if self.binary else len(self.classes)

    # ------------------------------------------------------------------------------------------- encoding

    def encode(self, raw: np.ndarray, *, source: str) -> np.ndarray:
        """Raw labels -> uint8 train ids (H, W).

        raw: (H, W) values or (H, W, 3) uint8 colours, of any integer dtype (whole-numbered floats pass).
        source: the file's name, for messages.
        Raises ValueError for a value that the schema does not list, and for colours where values belong.
        """
        if raw.ndim not in (2, 3) or (raw.ndim == 3 and raw.shape[2] != 3):
            raise ValueError(f"{source}: a mask is (H, W) or (H, W, 3), not {raw.shape}")
        if raw.dtype.kind == "f":
            raw = _whole_numbers(raw, source)
        if self.colors is not None:
            return self._encode_colors(raw, source)
        if raw.ndim == 3:
            # DeepGlobe stores its grey masks as RGB; three equal channels are one.
            if not ((raw[..., 0] == raw[..., 1]) & (raw[..., 0] == raw[..., 2])).all():
                raise ValueError(
                    f"{source}: the mask holds colours, the schema expects "
                    f"{self._allowed()}; declare the classes by colour (classes.yaml: encoding: colors)"
                )
            raw = raw[..., 0]
        if self.threshold is not None:
            return (raw >= self.threshold).astype(np.uint8)
        return self._encode_values(raw, source)

    def _encode_values(self, raw: np.ndarray, source: str) -> np.ndarray:
        table, lowest = self._value_table
        if raw.dtype == np.uint8 and lowest == 0 and len(table) == 256:
            index = raw  # every uint8 has an entry
        else:
            index = raw.astype(np.int64) - lowest
            if ((index < 0) | (index >= len(table))).any():
                raise ValueError(self._unknown_values(raw, source))
        ids = table[index]
        if (ids < 0).any():
            raise ValueError(self._unknown_values(raw, source))
        return ids.astype(np.uint8)

    @cached_property
    def _value_table(self) -> tuple[np.ndarray, int]:
        """Train id by (raw - lowest raw); -1 marks values that may not occur."""
        lowest, highest = min(self.raw_to_train), max(self.raw_to_train)
        if highest - lowest >= 1 << 20:
            raise ValueError(f"raw labels {lowest} to {highest} span more than a million values")
        if lowest >= 0 and highest <= IGNORE:
            lowest, highest = 0, 255  # an entry for every uint8: the usual mask needs no range check
        table = np.full(highest - lowest + 1, -1, np.int16)
        for raw, train in self.raw_to_train.items():
            table[raw - lowest] = train
        return table, lowest

    def _encode_colors(self, raw: np.ndarray, source: str) -> np.ndarray:
        assert self.colors is not None
        if raw.ndim == 2:  # a mask of greys only, stored with one channel
            raw = np.repeat(raw[..., None], 3, axis=2)
        channels = raw.astype(np.int64) if raw.dtype.itemsize > 1 else raw.astype(np.int32)
        packed = (channels[..., 0] << 16) | (channels[..., 1] << 8) | channels[..., 2]
        ids = np.full(packed.shape, IGNORE, np.uint8)
        known = np.zeros(packed.shape, bool)
        # One comparison per colour beats a sort of the pixels up to about a hundred colours.
        for (red, green, blue), train in self.colors.items():
            hit = packed == (red << 16 | green << 8 | blue)
            ids[hit] = train
            known |= hit
        if not known.all():
            raise ValueError(self._unknown_colors(packed[~known], source))
        return ids

    # ------------------------------------------------------------------------------------------- messages

    def _allowed(self) -> str:
        if self.threshold is not None:
            return f"grey levels (>= {self.threshold} is {self.classes[1]})"
        pairs = self.colors if self.colors is not None else self.raw_to_train
        spelled = [
            f"{color_hex(raw) if isinstance(raw, tuple) else raw} "
            f"{'(ignored)' if train == IGNORE else self.classes[train]}"
            for raw, train in pairs.items()
        ]
        return ", ".join(spelled)

    def _unknown_values(self, raw: np.ndarray, source: str) -> str:
        values, counts = np.unique(raw, return_counts=True)
        unknown = [
            (int(v), int(n)) for v, n in zip(values, counts, strict=True) if v not in self.raw_to_train
        ]
        if 255 in values and set(values.tolist()) <= {0, 255}:
            return (
                f"{source}: the mask holds 0/255, a two-class mask, but is read as class ids "
                f"(allowed: {self._allowed()}); declare 255 as the value of the foreground class "
                "(classes.yaml: values: [255]), or convert the masks to 0/1"
            )
        named = ", ".join(f"{value} ({count} pixels)" for value, count in unknown[:MAX_NAMED])
        more = f" and {len(unknown) - MAX_NAMED} more" if len(unknown) > MAX_NAMED else ""
        return (
            f"{source}: unknown label {named}{more}; allowed: {self._allowed()}; "
            "correct the mask, or declare the value (as a class or as ignored)"
        )

    def _unknown_colors(self, packed: np.ndarray, source: str) -> str:
        assert self.colors is not None
        values, counts = np.unique(packed, return_counts=True)
        order = np.argsort(-counts, kind="stable")
        allowed = np.array(list(self.colors), np.int64)
        named = []
        for index in order[:MAX_NAMED]:
            value = int(values[index])
            color = (value >> 16, value >> 8 & 255, value & 255)
            nearest = tuple(allowed[np.abs(allowed - np.array(color)).sum(1).argmin()].tolist())
            named.append(f"{color_hex(color)} ({counts[index]} pixels, nearest {color_hex(nearest)})")
        more = f" and {len(values) - MAX_NAMED} more" if len(values) > MAX_NAMED else ""
        hint = "so many colours mean a lossy or resampled mask" if len(values) > 64 else "declare them"
        return (
            f"{source}: unknown label colour {', '.join(named)}{more}; allowed: {self._allowed()}; "
            f"{hint} (as a class or as ignored)"
        )

    # -------------------------------------------------------------------------------------- pictures, files

    def colorize(self, ids: np.ndarray) -> np.ndarray:
        """Train ids (H, W) -> (H, W, 3) uint8 picture; ignored pixels are black."""
        table = np.zeros((256, 3), np.uint8)
        table[: len(self.classes)] = self.palette
        table[IGNORE] = IGNORE_COLOR
        ids = np.asarray(ids)
        bad = (ids < 0) | ((ids >= len(self.classes)) & (ids != IGNORE))
        if bad.any():
            raise ValueError(
                f"train id {int(ids[bad][0])} has no colour: 0-{len(self.classes) - 1} or {IGNORE}"
            )
        return table[ids]

    def to_dict(self) -> dict[str, Any]:
        """A dictionary that JSON and YAML can hold; `from_dict` gives the schema back."""
        return {
            "classes": list(self.classes),
            "palette": [list(color) for color in self.palette],
            "raw_to_train": {str(raw): train for raw, train in self.raw_to_train.items()},
            "binary": self.binary,
            "colors": None if self.colors is None else {color_hex(c): t for c, t in self.colors.items()},
            "threshold": self.threshold,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LabelSchema:
        """The inverse of `to_dict`."""
        colors = values.get("colors")
        return cls(
            classes=tuple(values["classes"]),
            palette=tuple(_checked_color(color) for color in values["palette"]),
            raw_to_train={int(raw): int(train) for raw, train in values.get("raw_to_train", {}).items()},
            binary=bool(values.get("binary", False)),
            colors=None if colors is None else {parse_color(c): int(t) for c, t in colors.items()},
            threshold=values.get("threshold"),
        )


def color_hex(color: tuple[int, ...]) -> str:
    """(60, 16, 152) -> '3c1098'."""
    return "".join(f"{channel:02x}" for channel in color)


def parse_color(value: Any) -> Color:
    """'3c1098', '#3c1098' or [60, 16, 152] -> (60, 16, 152)."""
    if isinstance(value, str):
        digits = value.removeprefix("#")
        if len(digits) == 6 and all(digit in "0123456789abcdefABCDEF" for digit in digits):
            return int(digits[:2], 16), int(digits[2:4], 16), int(digits[4:], 16)
    elif isinstance(value, (list, tuple)) and len(value) == 3:
        return _checked_color(tuple(value))
    raise ValueError(f'colour {value!r} is not understood: write "3c1098" (in quotes) or [60, 16, 152]')


def _checked_color(color: Any) -> Color:
    channels = tuple(int(channel) for channel in color)
    if len(channels) != 3 or not all(0 <= channel <= 255 for channel in channels):
        raise ValueError(f"colour {tuple(color)} is not three numbers from 0 to 255")
    return channels[0], channels[1], channels[2]


def _whole_numbers(raw: np.ndarray, source: str) -> np.ndarray:
    if not np.isfinite(raw).all():
        raise ValueError(f"{source}: the mask holds NaN or infinity; labels are whole numbers")
    whole = raw.astype(np.int64)
    if (whole != raw).any():
        value = raw[whole != raw][0]
        raise ValueError(f"{source}: the mask holds {value}; labels are whole numbers")
    return whole
