"""Runs the command line, after a check that the packages it imports are installed."""

import importlib.util
import signal
import sys
from typing import NoReturn

needed = ("flax", "optax", "rich", "tqdm")
if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
    print(f"jaxrelu.benchmark: error: {', '.join(missing)} not found; install jaxrelu[benchmark]", file=sys.stderr)
    sys.exit(2)

from jaxrelu.benchmark import cli  # noqa: E402, as this imports the packages above


def _terminate(number: int, frame: object) -> NoReturn:
    raise cli.Terminated


signal.signal(signal.SIGTERM, _terminate)
sys.exit(cli.main())
