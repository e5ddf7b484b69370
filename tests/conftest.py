"""What pytest reads first: where the project lies, and which tests are left out by default.

    python -m pytest            all but the slow ones, which take minutes
    python -m pytest -m slow    these
"""

import os
import sys

FOLDER = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(FOLDER))
sys.path.insert(0, FOLDER)


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: left out, unless asked for with -m slow")
    config.option.markexpr = config.option.markexpr or "not slow"
