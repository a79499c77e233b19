"""Lets the tests of pages import what lies beside them: browser.py, made_up.py."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
