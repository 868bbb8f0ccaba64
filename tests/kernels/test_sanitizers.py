"""The native code under the address and undefined-behaviour sanitizers, on the odd shapes of the other tests."""

from __future__ import annotations

import shutil
import sys

import pytest

from tests.kernels import sanitize


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None or sys.platform != "linux", reason="needs g++ on Linux")
def test_nothing_is_found():
    assert sanitize.main() == 0
