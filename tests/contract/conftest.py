"""What every method must do, whatever it computes: a new method file is found by the registry and tested here as it is.

The fixture `case` runs through all methods, with their default settings, on a Llama, a Qwen2 and a GPT-2.
"""

from __future__ import annotations

import pytest

from tests.contract.models import Case, cases

CASES = dict(cases())


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    """A method on an architecture."""
    return CASES[request.param]
