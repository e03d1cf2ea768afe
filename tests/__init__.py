"""The test suite. What asserts beside the test modules says too what it compared."""

import pytest

pytest.register_assert_rewrite("tests.crash", "tests.store", "tests.support", "tests.acceptance", "tests.worker")
