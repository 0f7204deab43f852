"""The number of cases, counted as they end."""

from __future__ import annotations

import fuzzing
import pytest
from hypothesis import settings


def test_there_are_enough_cases() -> None:
    kinds = {kind.partition(" ")[0] for kind, _ in fuzzing.TALLY}
    if not {"image", "study", "table", "ledger", "csv", "raybd"} <= kinds:
        pytest.skip("not all fuzz tests were run")
    assert settings.default is not None
    assert fuzzing.TALLY.total() >= 20 * settings.default.max_examples
