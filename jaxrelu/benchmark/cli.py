"""The command line of the benchmark: options, and the file of JSON lines."""

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import math
import os
import re
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
from tqdm import tqdm

import jaxrelu
from jaxrelu.benchmark import report
from jaxrelu.benchmark.networks import NETWORKS, STEPS
from jaxrelu.benchmark.peers import PEERS
from jaxrelu.benchmark.plan import DEFAULT_KINDS, KINDS, Measures, Plan, here, lacks
from jaxrelu.benchmark.targets import AHEAD, TPUS, Target, targets_ahead

__all__ = ["build_parser", "main"]

DTYPES = ("float32", "bfloat16", "float16")
# package data, because a user who installs the wheel has no copy of the repository
H200 = Path(__file__).with_name("h200.txtpb")
SIZES = tuple(2**n for n in (10, 13, 16, 18, 20, 22, 25, 27))
# variables that must be set before jax is imported to compile for hardware that is not there
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_LOG_DIR": "disabled",
}
# the fields of every measurement
_FIELDS: dict[str, Any] = {
    **dict.fromkeys(("device", "what", "peer", "date"), str),
    **dict.fromkeys(("network", "activation", "dtype"), str | None),
    "size": int | None,
    "spread": float | None,
    "versions": dict,
}
_PROGRAM = "jaxrelu.benchmark"
_SHAPED = ("memory", "step", "peak", "saved", "observed")
# the kinds of measurement that an option changes; given without any of them, it is refused
_CHANGES = {
    "activations": tuple(kind for kind in KINDS if kind not in ("observed", "import", "expm1")),
    "networks": _SHAPED[:3],
    "dtype": tuple(kind for kind in KINDS if kind != "import"),
    "sizes": ("elementwise", "expm1"),
    "batch": _SHAPED,
    "width": _SHAPED,
    "layers": _SHAPED,
    "plot": ("memory",),
    "ratios": ("memory",),
}
_EXAMPLES = f"""examples:
  python -m {_PROGRAM} --quick
  python -m {_PROGRAM} --compile-only --json memory.jsonl --plot memory.png
  python -m {_PROGRAM} --from memory.jsonl --ratios
"""


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived, which ends a run as Ctrl-C does."""


class _Parser(argparse.ArgumentParser):
    """Reports an error in one line on stderr, without the usage, and exits with code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{_PROGRAM}: error: {' '.join(message.split())}\n")


def _chosen(choices: Collection[str]) -> Callable[[str], tuple[str, ...]]:
    def parse(text: str) -> tuple[str, ...]:
        names = tuple(dict.fromkeys(text.split(",")))
        if unknown := [name for name in names if name not in choices]:
            raise argparse.ArgumentTypeError(f"must be of {', '.join(choices)}, got {unknown[0]!r}")
        return names

    return parse


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(_whole(part) for part in text.split(","))


def _whole(text: str) -> int:
    number = re.fullmatch(r"(?:2\^(?P<power>[0-9]{1,2})|(?P<plain>[0-9]{1,10}))", text.strip())
    size = 0 if number is None else 2 ** int(number["power"]) if number["power"] else int(number["plain"])
    if not 0 < size <= 2**31:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 to 2^31, or a power like 2^20, got {text!r}")
    return size


def _path(text: str) -> Path:
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError(f"must be a path, got {text!r}")
    return Path(text)


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    about = "Measures what jaxrelu gains; help('jaxrelu.benchmark') in Python explains it."
    form = argparse.RawDescriptionHelpFormatter
    parser = _Parser(f"python -m {_PROGRAM}", description=about, epilog=_EXAMPLES, formatter_class=form, allow_abbrev=False)
    add, others = parser.add_argument, ", ".join(kind for kind in KINDS if kind not in DEFAULT_KINDS)

    def several(flag: str, choices: Collection[str], default: tuple[str, ...] | None, text: str) -> None:
        add(flag, type=_chosen(choices), default=default, metavar="A,B,...", help=text)

    several("--activations", PEERS, tuple(PEERS), f"default: all, {', '.join(PEERS)}")
    several("--what", KINDS, DEFAULT_KINDS, f"kinds of measurement; default: {', '.join(DEFAULT_KINDS)}; others: {others}")
    several("--networks", NETWORKS, None, f"default: mlp to step, peak or on an absent TPU, else all, {', '.join(NETWORKS)}")
    several("--dtype", DTYPES, DTYPES[:1], f"of {', '.join(DTYPES)}; default: {DTYPES[0]}")
    add("--sizes", type=_sizes, help="elements of the elementwise calls, e.g. 2^10,2^20; default: eight from 2^10 to 2^27")
    add("--batch", type=_whole, help="batch of the networks; default: 4096, for steps 2048, for an absent TPU 65536")
    add("--width", type=_whole, default=512, help="width of the networks, a multiple of 64; default: %(default)s")
    add("--layers", type=_whole, default=8, help="at most 8 in resnet18, 17 in mobilenet, 16 in unet; default: %(default)s")
    add("--json", type=_path, metavar="FILE", help="each measurement is appended to it as a line; default: none")
    add("--plot", type=_path, metavar="FILE.png", help="the picture of memory by network; default: none")
    add("--from", type=_path, nargs="+", dest="sources", metavar="FILE", help="show what these files hold; default: measure")
    add(
        "--ratios",
        action="store_true",
        help="print the ratios of memory to jax.nn's, in Markdown; default: off",
    )
    add("--quick", action="store_true", help="less than a minute, most kinds for the first activation only; default: off")
    add(
        "--platform", choices=("cpu", "gpu", *AHEAD), help=f"default: what JAX finds; {', '.join(AHEAD)} need --compile-only"
    )
    add("--compile-only", action="store_true", help="run nothing: the same as --what memory; default: off")
    add("--target", type=_path, default=H200, metavar="FILE", help="what an H200 is, for --platform h200; default: our own")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark, and shows what was measured even if it is stopped.

    Returns:
        The exit code: 0, 1 if a measurement fails or cannot be written, 2 if the options cannot be followed, 130 after
        Ctrl-C, or 143 after SIGTERM.
    """
    parser = build_parser()
    options = parser.parse_args(arguments)
    # argparse sets no default where an attribute is there already
    given = parser.parse_args(arguments, argparse.Namespace(**dict.fromkeys(vars(options))))
    if options.compile_only:
        options.what = ("memory",)
    if problem := _ignored(options, given) or _problem(options):
        parser.error(problem)
    if not options.sources and options.platform in AHEAD and any(os.environ.get(k) != v for k, v in ENVIRONMENT.items()):
        # jax is imported already, with this package
        words = sys.argv[1:] if arguments is None else arguments
        os.execve(sys.executable, [sys.executable, "-m", _PROGRAM, *words], os.environ | ENVIRONMENT)
    records: list[Measures] = []
    try:
        try:
            if options.sources:
                found = [record for path in options.sources for record in _read(path, parser)]
                if (options.plot is not None or options.ratios) and not _drawable(found):
                    parser.error(
                        f"--{'ratios' if options.ratios else 'plot'}: the files of --from hold no measurement of memory"
                    )
                records += found
            else:
                _choose_platform(options, given, parser)
                _measure(options, records)
        finally:
            shown = _show(records, options.plot, options.ratios)
        if not shown:
            parser.error("there is no measurement that a table would show")
        return 0
    except KeyboardInterrupt as stop:
        code, reason = (143, "terminated") if isinstance(stop, Terminated) else (130, "interrupted")
    except (OSError, RuntimeError, MemoryError) as error:  # XLA raises a RuntimeError if memory does not suffice
        code, reason = 1, "error: " + (str(error).splitlines() or [type(error).__name__])[0]
    kept = "the tables show what was measured" if records else "nothing was measured"
    if options.json is not None and code != 1:
        kept = f"{len(records)} measurements are in {options.json}"
    print(f"{_PROGRAM}: {reason}; {kept}", file=sys.stderr)
    return code


def _ignored(options: argparse.Namespace, given: argparse.Namespace) -> str | None:
    """Returns which of the given options would have no effect, and why."""
    names = [name for name, value in vars(given).items() if value is not None]
    if options.sources:
        idle = [name.replace("_", "-") for name in names if name not in ("sources", "plot", "ratios")]
        return f"--{idle[0]} has no effect with --from, which measures nothing" if idle else None
    if given.target is not None and options.platform != "h200":
        return "--target is for --platform h200"
    kinds = options.what
    if given.what not in (None, kinds):
        return f"--compile-only measures memory, not {','.join(given.what)}"
    for name, changed in _CHANGES.items():
        if name in names and not {*changed} & {*kinds}:
            return f"--{name} has no effect on {','.join(kinds)}, but on {','.join(changed)}"
    untimed = {*(given.networks or ())} & {*STEPS}
    if untimed and "step" in (given.what or ()) and (untimed == {*given.networks} or not {"memory", "peak"} & {*kinds}):
        return f"--networks: a step is not timed in {','.join(sorted(untimed))}"
    if options.quick and len(given.activations or ()) > 1 and not {"memory", "elementwise"} & {*kinds}:
        return f"--quick measures {','.join(kinds)} with one activation, got {','.join(given.activations)}"
    return None


def _problem(options: argparse.Namespace) -> str | None:
    """Returns why the options cannot be followed."""
    if options.plot is not None and importlib.util.find_spec("matplotlib") is None:
        return "--plot: matplotlib is missing; install jaxrelu[benchmark]"
    if options.plot is not None and options.plot.suffix.lower() != ".png":
        return f"--plot must name a .png file, got {str(options.plot)!r}"
    if not options.sources and options.platform in AHEAD:
        if not options.compile_only:
            return f"--platform {options.platform} is compiled for where it is not: add --compile-only"
        plugin = "jax_cuda13_plugin" if options.platform == "h200" else "libtpu"
        if importlib.util.find_spec(plugin) is None:
            return f"--platform {options.platform}: {plugin} is missing; install jaxrelu[aot]"
        if options.platform == "h200" and not options.target.is_file():
            return f"--target: no file {str(options.target)!r}; without the option the package's own is taken"
    if options.width % 64:
        return f"--width must be a multiple of 64, got {options.width}"
    if options.batch is not None and (options.batch % 128 or options.batch * options.width % 2**15):
        return f"--batch must be a multiple of 128 and batch x width one of 2^15, got {options.batch} x {options.width}"
    for name, path in (("--json", options.json), ("--plot", options.plot)):
        if path is not None and (reason := _unwritable(path)):
            return f"{name} {str(path)!r}: {reason}"
    return None


def _choose_platform(options: argparse.Namespace, given: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    if options.platform == "cpu":
        jax.config.update("jax_platforms", "cpu")
    elif options.platform == "gpu" and jax.default_backend() != "gpu":
        parser.error(f"--platform gpu: JAX finds no GPU, only {jax.default_backend()}")
    for kind in given.what or ():
        if lack := lacks(kind):
            parser.error(f"--what {kind} needs {lack}")


def _unwritable(path: Path) -> str | None:
    new = not path.exists()
    try:
        with path.open("ab"):
            pass
    except OSError as error:
        return error.strerror or str(error)
    if new:
        path.unlink()
    return None


def _read(path: Path, parser: argparse.ArgumentParser) -> list[Measures]:
    """Returns the measurements in a file, which is read only once, as a pipe can be."""
    records: list[Measures] = []
    try:
        if path.is_char_device():  # it may never end
            parser.error(f"--from {path}: a device, not a file")
        for number, line in enumerate(path.read_text().splitlines(), 1):
            records.append(json.loads(line))
            if not _is_measurement(records[-1]):
                parser.error(f"--from {path}: line {number} is no measurement")
    except (OSError, ValueError, RecursionError) as error:
        parser.error(f"--from {path}: {(error.strerror if isinstance(error, OSError) else None) or 'not lines of JSON'}")
    if not records:
        parser.error(f"--from {path}: holds no measurement")
    return records


def _is_measurement(fields: Any) -> bool:
    return (
        isinstance(fields, dict)
        and all(name in fields and isinstance(fields[name], kind) for name, kind in _FIELDS.items())
        and fields["what"] in report.TITLES
        and isinstance(figure := fields.get("median_s", fields.get("temp_bytes")), int | float)
        and math.isfinite(figure)
    )


def _show(records: list[Measures], plot: Path | None, ratios: bool) -> bool:
    """Prints the tables, or that of ratios alone, and draws the picture of memory; returns whether there is any table."""
    if ratios:
        report.print_ratios(records)
    shown = ratios or report.print_tables(records)
    if plot is not None and _drawable(records):
        report.plot_memory(records, plot)
    return shown


def _drawable(records: list[Measures]) -> bool:
    return any(record["what"] == "memory" and record["activation"] for record in records)


def _measure(options: argparse.Namespace, records: list[Measures]) -> None:
    """Runs all measurements; appends each to records and to the JSON file as soon as it is done."""
    common = {"versions": _versions(options), "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}
    plan = _plan(options)
    with tqdm([*plan.groups()], file=sys.stderr, unit="group", dynamic_ncols=True) as progress:
        for label, group in progress:
            progress.set_description(label)
            for measures in group:
                fields = dict.fromkeys(("activation", "peer", "what", "network", "dtype", "size"))
                records.append(fields | {"spread": None} | measures | common)
                if options.json is not None:
                    _append(json.dumps(records[-1]) + "\n", options.json)


def _append(line: str, path: Path) -> None:
    """Appends a whole line or nothing, as half a line would make the file unreadable."""
    end = path.stat().st_size if path.exists() else 0
    try:
        with path.open("a") as file:
            file.write(line)
    except BaseException as error:
        if path.is_file():
            os.truncate(path, end)
        if isinstance(error, OSError):
            error.filename = str(path)  # writing does not name it
        raise


def _plan(options: argparse.Namespace) -> Plan:
    tpu = options.platform in TPUS
    ahead = options.platform in AHEAD
    return Plan(
        targets=targets_ahead(options.platform, options.target) if ahead else [Target(jax.devices()[0], here())],
        activations=options.activations,
        networks=options.networks or (("mlp",) if options.quick or tpu else tuple(NETWORKS)),
        running=options.networks or ("mlp",),
        kinds=options.what,
        dtypes=options.dtype,
        sizes=options.sizes or ((2**12, 2**20) if options.quick else SIZES),
        batch=options.batch or (65536 if tpu else 4096),
        step_batch=options.batch or (512 if options.quick else 2048),
        width=options.width,
        layers=options.layers,
        quick=options.quick,
    )


def _versions(options: argparse.Namespace) -> dict[str, str]:
    names = ["jax", "jaxlib", "flax", "optax", "numpy", "torch"]
    if options.platform == "h200":
        names += ["jax-cuda13-plugin", "nvidia-cuda-nvcc"]
    elif options.platform in TPUS:
        names.append("libtpu")
    installed = {distribution.name for distribution in importlib.metadata.distributions()}
    python = ".".join(map(str, sys.version_info[:3]))
    found = {name: importlib.metadata.version(name) for name in names if name in installed}
    return {"python": python, "jaxrelu": jaxrelu.__version__} | found
