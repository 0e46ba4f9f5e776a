"""Whether what a user asks for fits what is built: names, types and numbers, said in one line."""

import inspect
import math
import types
import typing
from collections.abc import Callable, Collection, Mapping
from typing import Any


def check_options(
    builder: Callable[..., Any], name: str, options: Mapping[str, Any], *, settled: Collection[str] = ()
) -> None:
    """ValueError where `builder`, known as `name`, has no option named as in `options`, or of another type.

    Options are the keyword-only parameters of the builder and of the class that it is annotated to return,
    less those that are `settled` without the user.
    """
    parameters = dict(inspect.signature(builder).parameters)
    hints = typing.get_type_hints(builder)
    built = hints["return"]
    parameters |= inspect.signature(built).parameters
    hints |= typing.get_type_hints(built.__init__)
    allowed = {k for k, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
    allowed -= {"num_classes", *settled}
    unknown = [key for key in options if key not in allowed]
    if unknown:
        raise ValueError(f"{name} has no option {unknown[0]!r}; it has {', '.join(sorted(allowed))}")
    for key, value in options.items():
        if not _fits(value, hints[key]):
            expected = inspect.formatannotation(hints[key])
            raise ValueError(f"{name}: {key}={value!r} is not of the expected type {expected}")


def _fits(value: Any, hint: Any) -> bool:
    """Whether `value` is of the type `hint`; lists pass for tuples, as YAML and JSON have no others."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, one) for one in arguments)
    if origin is not None and isinstance(value, tuple | list):
        of = arguments[0]
        length = None if origin is not tuple or Ellipsis in arguments else len(arguments)
        return length in (None, len(value)) and all(_fits(item, of) for item in value)
    if origin is dict:
        return isinstance(value, dict)
    if origin is not None:
        return False
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, (int, float) if hint is float else hint)


def check_choice(name: str, value: str, allowed: Collection[str]) -> None:
    """ValueError where the argument `name` is none of those allowed."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r}: expected one of {', '.join(allowed)}")


def check_numbers(
    low: float, high: float = math.inf, /, *, above: bool = False, below: bool = False, **values: float | None
) -> None:
    """ValueError where one of the arguments `values` is not a finite number from `low` to `high`.

    above, below: `low` itself, `high` itself is out of range. None, an argument left open, passes.
    """
    for name, value in values.items():
        if value is None:
            continue
        fits = (value > low if above else value >= low) and (value < high if below else value <= high)
        if not (fits and math.isfinite(value)):
            least = f"above {low}" if above else f"of at least {low}"
            most = "" if high == math.inf else f" and {'below' if below else 'at most'} {high}"
            raise ValueError(f"{name}={value}: expected a finite number {least}{most}")


class ImageSizeError(ValueError):
    """A size of images, one number or (H, W), that a model cannot be built for."""

    def __init__(self, size: Any, multiple_of: int) -> None:
        super().__init__(
            f"image_size={size}: expected one size or (H, W), in pixels, each a positive multiple of "
            f"{multiple_of}; resize or tile the images to such a size"
        )
        self.size, self.multiple_of = size, multiple_of

    def under(self, option: str) -> ValueError:
        """The same of the option that a user gave the size by."""
        expected = f"a positive multiple of {self.multiple_of}, in pixels"
        return ValueError(f"{option} {self.size}: expected {expected}")
