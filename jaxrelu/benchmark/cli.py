"""The command line of the benchmark: options, and the file of JSON lines."""

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import os
import re
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import NoReturn

import jax
from tqdm import tqdm

import jaxrelu
from jaxrelu.benchmark import report
from jaxrelu.benchmark.networks import NETWORKS
from jaxrelu.benchmark.peers import PEERS
from jaxrelu.benchmark.plan import DEFAULT_KINDS, KINDS, Measures, Plan, here
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
_FIELDS = frozenset(("device", "what", "network", "activation", "peer", "dtype", "size", "spread", "versions", "date"))
_PROGRAM = "jaxrelu.benchmark"


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
    parser = _Parser(f"python -m {_PROGRAM}", description="Measures what jaxrelu gains.", allow_abbrev=False)
    add = parser.add_argument
    add("--activations", type=_chosen(PEERS), default=tuple(PEERS), help=f"comma-separated, of {', '.join(PEERS)}")
    add("--what", type=_chosen(KINDS), default=DEFAULT_KINDS, help=f"comma-separated, of {', '.join(KINDS)}")
    add(
        "--networks",
        type=_chosen(NETWORKS),
        help=f"comma-separated, of {', '.join(NETWORKS)}; by default the mlp for steps and peaks, all for memory",
    )
    add("--dtype", type=_chosen(DTYPES), default=DTYPES[:1], help=f"comma-separated, of {', '.join(DTYPES)}")
    add("--sizes", type=_sizes, help="elements of the elementwise calls, e.g. 2^10,2^20")
    add(
        "--batch",
        type=_whole,
        help="batch of the networks; default: 4096, for steps 2048, and for an absent TPU 65536, as less stays on the chip",
    )
    add("--width", type=_whole, default=512, help="width of the networks, a multiple of 64")
    add("--layers", type=_whole, default=8, help="layers of the networks")
    add("--json", type=_path, help="file to which each measurement is appended as a line")
    add("--plot", type=_path, help="PNG file for the picture of memory by network")
    add("--from", type=_path, nargs="+", dest="sources", help="show the measurements in these files, and measure nothing")
    add("--quick", action="store_true", help="each kind of measurement once, in less than a minute")
    add("--platform", choices=("cpu", "gpu", *AHEAD), help="default: what JAX finds; an absent one needs --compile-only")
    add("--compile-only", action="store_true", help="run nothing: the same as --what memory")
    add("--target", type=_path, default=H200, help="file that describes an H200 to the compiler; default: the package's")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark and returns the exit code: 0, 2 if the options cannot be followed, or 130 after Ctrl-C."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    if problem := _problem(options):
        parser.error(problem)
    if options.sources:
        kept = [json.loads(line) for path in options.sources for line in path.read_text().splitlines()]
        if options.plot is not None and not any(record["what"] == "memory" for record in kept):
            parser.error("--plot: the files of --from hold no measurement of memory")
        return _show(kept, options.plot)
    if options.platform in AHEAD and any(os.environ.get(key) != text for key, text in ENVIRONMENT.items()):
        # jax is imported already, with this package
        given = sys.argv[1:] if arguments is None else arguments
        os.execve(sys.executable, [sys.executable, "-m", _PROGRAM, *given], os.environ | ENVIRONMENT)
    if options.platform == "cpu":
        jax.config.update("jax_platforms", "cpu")
    elif options.platform == "gpu" and jax.default_backend() != "gpu":
        parser.error(f"--platform gpu: JAX finds no GPU, only {jax.default_backend()}")
    records: list[Measures] = []
    try:
        _measure(options, records)
    except KeyboardInterrupt:
        kept = f"{len(records)} measurements are in {options.json}" if options.json else "nothing was kept: no --json"
        print(f"\n{_PROGRAM}: interrupted; {kept}", file=sys.stderr)
        return 130
    return _show(records, options.plot)


def _problem(options: argparse.Namespace) -> str | None:
    """Returns why the options cannot be followed."""
    if options.plot is not None and importlib.util.find_spec("matplotlib") is None:
        return "--plot: matplotlib is missing; install jaxrelu[benchmark]"
    if options.plot is not None and options.plot.suffix.lower() != ".png":
        return f"--plot must name a .png file, got {str(options.plot)!r}"
    if options.sources:
        for path in options.sources:
            if reason := _unreadable(path):
                return f"--from {path}: {reason}"
    elif options.platform in AHEAD:
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


def _unreadable(path: Path) -> str | None:
    try:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            fields = json.loads(line).keys()
            if not (fields >= _FIELDS and {"median_s", "temp_bytes"} & fields):
                return f"line {number} is no measurement"
    except (OSError, ValueError, AttributeError) as error:
        return (error.strerror if isinstance(error, OSError) else None) or "not lines of JSON"
    return None


def _show(records: list[Measures], plot: Path | None) -> int:
    report.print_tables(records)
    if plot is not None:
        report.plot_memory(records, plot)
    return 0


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
                    with options.json.open("a") as file:
                        file.write(json.dumps(records[-1]) + "\n")


def _plan(options: argparse.Namespace) -> Plan:
    tpu = options.platform in TPUS
    ahead = options.platform in AHEAD
    return Plan(
        targets=targets_ahead(options.platform, options.target) if ahead else [Target(jax.devices()[0], here())],
        activations=options.activations,
        networks=options.networks or (("mlp",) if options.quick or tpu else tuple(NETWORKS)),
        running=options.networks or ("mlp",),
        kinds=("memory",) if options.compile_only else options.what,
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
