"""What pytest reads before the tests: where the project lies, and the fixtures that files share."""

import os
import sys

FOLDER = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(FOLDER))
sys.path.insert(0, FOLDER)

from common import call_main, small_folder, uninterrupted  # noqa: F401
