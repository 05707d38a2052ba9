"""What several test modules use, and the scripts that tests start as processes of their own."""

from pathlib import Path

HELPERS = Path(__file__).resolve().parent
ROOT = HELPERS.parents[1]
