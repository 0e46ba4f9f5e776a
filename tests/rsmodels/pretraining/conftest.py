"""Pretraining small enough for a test: one thread, and few scenes."""

import pytest

from rsmodels.pretraining import scenes


@pytest.fixture(autouse=True)
def a_short_window(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    """Few scenes, so that the window slides within a test."""
    monkeypatch.setattr(scenes, "WINDOW_SCENES", 6)
    monkeypatch.setattr(scenes, "FIRST_SCENES", 3)
