"""The command line of kd_cls: its options, and how its commands end."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from kd_core.utils.errors import exit_on_user_error

Result = TypeVar("Result")
INTERRUPTED = "interrupted; --resume continues from OUTPUT_DIR/last.pth"


def option_parser(description: str) -> argparse.ArgumentParser:
    """`--config-file FILE [KEY VALUE …]`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, help="a yaml file of kd_cls")
    parser.add_argument("options", nargs="*", metavar="KEY VALUE", help="config keys to override")
    return parser


def run_command(main: Callable[[], Result]) -> Result:
    """`main()`, ended by `exit_on_user_error` under the name of the program."""
    return exit_on_user_error(Path(sys.argv[0]).name, main, INTERRUPTED)
