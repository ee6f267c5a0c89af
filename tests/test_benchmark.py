import concurrent.futures
import json
import os
import re
import resource
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib import pyplot as plt
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from rich.table import Table

from jaxrelu.benchmark import children, cli, networks, polynomial, report, targets, timing
from jaxrelu.benchmark.peers import PEERS

TINY = ["--quick", "--sizes=48,96", "--batch=128", "--width=256", "--layers=2", "--activations=relu,prelu"]
FIELDS = {"activation", "peer", "what", "network", "dtype", "size", "spread", "device", "versions", "date"}
NAMES = {
    "jaxrelu",
    "jax.nn",
    "flax",
    "lean",
    "torch",
    "copy",
    "identity",
    "jax.nn+checkpoint",
    "flax+checkpoint",
    "jax",
    "step",
}


RECORD = {
    "activation": "relu",
    "peer": "jaxrelu",
    "what": "memory",
    "network": "mlp",
    "dtype": "float32",
    "size": 48,
    "spread": None,
    "device": "a device",
    "temp_bytes": 3 * 2**20,
    "versions": {"jax": "0"},
    "date": "2026-01-01",
}


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Returns the file of one tiny run."""
    path = tmp_path_factory.mktemp("benchmark") / "lines.jsonl"
    interleave = timing.interleave

    def briefly(calls, seconds, **bounds):
        return interleave(calls, 0.0, **bounds)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "interleave", briefly)
        patch.setattr(children, "run", lambda code, **environment: "3")
        assert cli.main([*TINY, f"--json={path}"]) == 0
    return path


def test_every_line_is_one_whole_measurement(measured):
    for record in lines(measured):
        assert record.keys() - {"fusions", "kernels", "peak_bytes"} in (FIELDS | {"median_s"}, FIELDS | {"temp_bytes"})
        assert record["peer"] in NAMES
        assert record.get("median_s", 1) > 0
        assert record.get("temp_bytes", 1) > 0
        assert (record["spread"] is None) == ("temp_bytes" in record)
        assert record["versions"]["jax"] == jax.__version__


def test_each_kind_is_measured(measured):
    records = lines(measured)
    kinds = {"memory", "forward", "gradient", "inplace", "eager", "step", "observed 1/1", "resident", "import"}
    assert {record["what"] for record in records} - {"saved"} == kinds
    forward = {(r["activation"], r["peer"], r["size"]) for r in records if r["what"] == "forward"} - {
        (activation, "torch", size) for activation in ("relu", "prelu") for size in (48, 96)
    }
    small = {("relu", "jaxrelu", 48), ("relu", "jax.nn", 48), ("relu", "copy", 48)}
    large = {("relu", "jax.nn", 96), ("prelu", "flax", 96)} | {
        (activation, peer, 96) for activation in ("relu", "prelu") for peer in ("jaxrelu", "copy")
    }
    assert forward == small | large


@pytest.mark.parametrize("width", [None, 30, 60, 200])
def test_tables_fit_and_are_whole(width, root, monkeypatch, capsys):
    made = []

    def recorded(**options):
        made.append(Table(**options))
        return made[-1]

    monkeypatch.setattr(report, "Table", recorded)
    monkeypatch.setenv("COLUMNS", str(width or 200))  # to which a pipe pays no heed
    if width:
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        monkeypatch.setenv("TERM", "xterm")
    files = [root / "measurements" / name for name in ("cpu.jsonl", "cpu_times.jsonl", "h200.jsonl")]
    assert cli.main(["--from", *map(str, files)]) == 0
    out = re.sub("\x1b.*?m", "", capsys.readouterr().out)
    assert max(map(len, out.splitlines())) <= (width or 80)
    assert "…" not in out
    for table in made:
        headings = [column.header for column in table.columns]
        assert len(set(headings)) == len(headings)
        assert all(any(column.cells) for column in table.columns)
    if width != 30:  # where a cell that is wider than the terminal goes on in the next line
        for record in (record for file in files for record in lines(file)):
            if "temp_bytes" in record:
                assert f"{record['temp_bytes'] / 2**20:.1f}" in out
            else:
                scale, unit = next(
                    (s, u) for s, u in ((1, "s"), (1e-3, "ms"), (1e-6, "us"), (1e-9, "ns")) if record["median_s"] >= s
                )
                assert f"{record['median_s'] / scale:.3g} {unit}" in out
    said = " ".join(out.split())
    assert "floor: the same without an activation" in said
    for term in ("jax.nn", "lean", "copy", "fusions", "spread", "elu_output", "+ckpt", "scan"):
        assert re.search(rf"^{re.escape(term)}: ", out, re.MULTILINE), term


def test_only_terms_that_a_table_uses_are_explained(measured, tmp_path, capsys):
    path = tmp_path / "import.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in lines(measured) if r["what"] == "import"))
    assert cli.main([f"--from={path}"]) == 0
    assert re.findall(r"^(\S+): ", capsys.readouterr().out, re.MULTILINE) == ["spread", lines(measured)[0]["date"][:10]]


def of_devices(count, networks):
    """Returns measurements in which jaxrelu takes 3 MiB, lean 1 and their peer 4."""
    peers = ((3, {}), (4, {"peer": "jax.nn"}), (1, {"peer": "lean"}), (2, {"peer": "identity", "activation": None}))
    return [
        RECORD
        | {"device": f"a device of a name so long that it needs lines, {device}", "network": network}
        | fields
        | {"temp_bytes": size * 2**20}
        for device in range(count)
        for network in networks
        for size, fields in peers
    ]


@pytest.mark.parametrize(
    ("records", "panels", "ratio"),
    [
        (None, 3, "0.35"),
        (of_devices(1, ["mlp"]), 1, "0.75"),
        (of_devices(4, ["mlp"]), 1, "0.75"),
        (of_devices(3, ["mlp", "scan"]), 3, "0.75"),
    ],
    ids=["the files", "one group", "four devices", "three panels"],
)
def test_the_picture_says_the_ratios_and_nothing_overlaps(records, panels, ratio, root, tmp_path, monkeypatch):
    if records is None:
        records = [r for name in ("cpu", "h200") for r in lines(root / "measurements" / f"{name}.jsonl")]
    drawn = []
    monkeypatch.setattr(plt, "close", drawn.append)
    report.plot_memory(records, tmp_path / "memory.png")
    [figure] = drawn
    monkeypatch.undo()
    assert (tmp_path / "memory.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(figure.axes) == panels
    figure.canvas.draw()  # at the figure's own resolution, in which extents are given
    numbers = {label for axis in figure.axes for label in axis.get_xticklabels()}  # some lie outside and are not drawn
    texts = [text for text in figure.findobj(Text) if text.get_text() and text.get_visible() and text not in numbers]
    assert ratio in {text.get_text().strip() for text in texts}
    # a ratio for jaxrelu and for lean of each group, and nothing beside the bar of jax.nn
    ratios = [len([text for text in axis.texts if text.get_text().strip()]) for axis in figure.axes]
    assert ratios == [2 * len(axis.get_yticks()) for axis in figure.axes]
    boxes = [text.get_window_extent() for text in texts]
    bars = [bar.get_window_extent() for axis in figure.axes for bar in axis.patches]
    for number, box in enumerate(boxes):
        assert figure.bbox.count_contains(box.corners()) == 4, texts[number]
        for other in (*boxes[number + 1 :], *bars):
            inside = Bbox.intersection(box, other)
            # a box has room above and below its letters
            assert inside is None or min(inside.width, inside.height) < 0.3 * box.height, texts[number]
    plt.close(figure)


@pytest.fixture
def planned(monkeypatch):
    """Replaces what is measured by a list, to be filled: of measurements, or of errors to be raised."""
    plan = []

    def measures():
        for item in plan:
            if isinstance(item, BaseException):
                raise item
            yield item

    monkeypatch.setattr(cli, "Plan", lambda **options: SimpleNamespace(groups=lambda: [("group", measures())]))
    return plan


@pytest.mark.parametrize(
    ("stop", "code", "words"), [(KeyboardInterrupt(), 130, "interrupted"), (cli.Terminated(), 143, "terminated")]
)
def test_a_stopped_run_keeps_what_was_measured(stop, code, words, planned, tmp_path, capsys):
    planned += [RECORD, RECORD | {"peer": "jax.nn", "temp_bytes": 4 * 2**20}, stop]
    path, picture = tmp_path / "lines.jsonl", tmp_path / "memory.png"
    path.write_text('{"kept": true}\n')
    assert cli.main([f"--json={path}", f"--plot={picture}"]) == code
    assert [record.get("peer") for record in lines(path)] == [None, "jaxrelu", "jax.nn"]
    captured = capsys.readouterr()
    assert "0.75" in captured.out
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert captured.err.splitlines()[-1] == f"jaxrelu.benchmark: {words}; 2 measurements are in {path}"


def test_sigterm_ends_the_command_as_ctrl_c_does(monkeypatch):
    def terminated():
        assert callable(signal.getsignal(signal.SIGTERM))  # else the signal would end the tests
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(cli, "main", terminated)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(cli.Terminated):
            runpy.run_module("jaxrelu.benchmark", run_name="__main__")
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RuntimeError("RESOURCE_EXHAUSTED: out of memory\nat length"), "RESOURCE_EXHAUSTED: out of memory"),
        (RuntimeError("a child process failed: exit code -9"), "exit code -9"),
        (MemoryError(), "MemoryError"),
    ],
)
def test_a_measurement_that_fails_is_one_line(error, words, planned, capsys):
    planned += [RECORD, error]
    assert cli.main([]) == 1
    captured = capsys.readouterr()
    assert "3.000" in captured.out
    line = captured.err.splitlines()[-1]
    assert line.startswith("jaxrelu.benchmark: error: ")
    assert line.endswith(f"{words}; the tables show what was measured")


def test_a_child_that_is_killed_has_a_message():
    with pytest.raises(RuntimeError, match="exit code -9"):
        children.run("import os; os.kill(os.getpid(), 9)")


@pytest.mark.parametrize("option", ["--json", "--plot"])
def test_a_full_disk_is_one_line(option, planned, tmp_path, capsys):
    planned += [RECORD]
    (full := tmp_path / "full.png").symlink_to("/dev/full")
    assert cli.main([f"{option}={full}"]) == 1
    captured = capsys.readouterr()
    assert "3.000" in captured.out
    assert captured.err.splitlines()[-1].startswith("jaxrelu.benchmark: error: [Errno 28] No space left on device: ")
    assert str(full) in captured.err.splitlines()[-1]


def test_a_disk_that_fills_up_keeps_whole_lines_and_no_half_picture(planned, tmp_path, capsys):
    planned += [RECORD] * 9
    path, picture = tmp_path / "lines.jsonl", tmp_path / "memory.png"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        assert cli.main([f"--json={path}"]) == 1
        assert cli.main([f"--from={path}", f"--plot={picture}"]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert lines(path) != []
    assert not picture.exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--dtype", "float33"], "float33"),
        (["--activations", "relu,gelu"], "gelu"),
        (["--networks", "rnn"], "rnn"),
        (["--sizes", "0"], "2^31"),
        (["--sizes", "1e6"], "1e6"),
        (["--batch", "100"], "multiple of 128"),
        (["--width", "100"], "multiple of 64"),
        (["--json", "missing/lines.jsonl"], "No such file"),
        (["--json", "."], "directory"),
        (["--plot", "memory.pdf"], ".png"),
        (["--plot", "missing/memory.png"], "No such file"),
        (["--from", "missing.jsonl"], "No such file"),
        (["--platform", "tpu-v4"], "tpu-v4"),
        (["--platform", "tpu-v5e"], "--compile-only"),
        (["--platform", "gpu"], "no GPU"),
        (["--quik"], "--quik"),
        # without effect
        (["--target=h200.txtpb"], "--platform h200"),
        (["--target=h200.txtpb", "--platform=cpu"], "--platform h200"),
        (["--compile-only", "--what=step"], "--compile-only measures memory"),
        (["--compile-only", "--sizes=48"], "--sizes has no effect on memory"),
        (["--what=step,observed", "--sizes=48"], "--sizes has no effect on step,observed"),
        (["--what=elementwise", "--networks=mlp"], "--networks"),
        (["--what=observed", "--networks=mlp"], "--networks"),
        (["--what=resident", "--batch=128"], "--batch"),
        (["--what=eager", "--width=64"], "--width"),
        (["--what=import", "--layers=8"], "--layers"),
        (["--what=import,observed", "--activations=relu"], "--activations"),
        (["--what=import", "--dtype=float32"], "--dtype"),
        (["--what=step", "--ratios"], "--ratios has no effect on step, but on memory"),
        (["--what=step", "--plot=memory.png"], "--plot has no effect on step, but on memory"),
        (["--what=step", "--networks=mlp,linen"], "a step is not timed in linen"),
        (["--what=step,memory", "--networks=linen,nnx"], "a step is not timed in linen,nnx"),
        (["--what=step", "--quick", "--activations=relu,elu"], "--quick"),
        *(
            (["--from=x.jsonl", option], option.split("=")[0])
            for option in (
                "--activations=relu",
                "--what=step",
                "--networks=mlp",
                "--dtype=float32",
                "--sizes=48",
                "--batch=128",
                "--width=512",
                "--layers=8",
                "--json=y.jsonl",
                "--quick",
                "--platform=cpu",
                "--compile-only",
                "--target=h200.txtpb",
            )
        ),
    ],
)
def test_wrong_options_are_one_line(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as error:
        cli.main(arguments)
    assert error.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("jaxrelu.benchmark: error: ")
    assert words in captured.err
    assert list(tmp_path.iterdir()) == []


def test_the_description_of_the_h200_comes_with_the_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a wheel's user has no checkout
    description = cli.build_parser().parse_args([]).target
    assert 'name: "NVIDIA H200"' in description.read_text()
    assert description.parent == Path(cli.__file__).parent


def refused(path, capsys):
    with pytest.raises(SystemExit) as error:
        cli.main([f"--from={path}"])
    assert error.value.code == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err.count("\n")) == ("", 1)
    return captured.err


@pytest.mark.parametrize(
    "line",
    [
        *(json.dumps({name: RECORD[name] for name in RECORD if name != missing}) for missing in RECORD),
        *(
            json.dumps(RECORD | wrong)
            for wrong in ({"what": "x"}, {"size": "x"}, {"versions": 1}, {"date": 1}, {"device": None})
        ),
        *(json.dumps(RECORD | {"temp_bytes": figure}) for figure in (None, "1", float("nan"), float("inf"))),
        "1",
        "[]",
    ],
)
def test_a_line_that_is_no_measurement_is_refused(line, tmp_path, capsys):
    path = tmp_path / "lines.jsonl"
    path.write_text(json.dumps(RECORD) + "\n" + line + "\n")
    assert "line 2 is no measurement" in refused(path, capsys)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds no measurement"),
        ("\n", "not lines of JSON"),
        ("[" * 100_000, "not lines of JSON"),
        (json.dumps(RECORD | {"activation": None, "peer": "identity"}), "no measurement that a table would show"),
        (json.dumps(RECORD | {"peer": "x"}), "no measurement that a table would show"),
    ],
    ids=["empty", "a blank line", "nested", "floor alone", "unknown peer"],
)
def test_a_file_that_would_show_nothing_is_refused(text, words, tmp_path, capsys):
    path = tmp_path / "lines.jsonl"
    path.write_text(text)
    assert words in refused(path, capsys)


@pytest.mark.parametrize("path", ["/dev/null", "/dev/zero"])
def test_a_device_is_refused(path, capsys):
    assert "a device" in refused(path, capsys)


def test_a_pipe_is_read_once(capsys):
    read, write = os.pipe()
    os.write(write, json.dumps(RECORD).encode())
    os.close(write)
    assert cli.main([f"--from=/dev/fd/{read}"]) == 0
    assert "3.000" in capsys.readouterr().out


def test_markup_in_a_name_is_text(tmp_path, capsys):
    path = tmp_path / "lines.jsonl"
    path.write_text(json.dumps(RECORD | {"device": "[red]card[/red] :smile:"}))
    assert cli.main([f"--from={path}"]) == 0
    assert "[red]card[/red] :smile:" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("kind", ["saved", "resident", "peak"])
def test_a_kind_that_cannot_be_measured_is_refused(kind, monkeypatch, capsys):
    monkeypatch.setattr(timing, "torch_here", lambda: False)
    monkeypatch.setattr(children, "resettable", lambda: False)
    with pytest.raises(SystemExit) as error:
        cli.main(["--platform=cpu", f"--what={kind}"])
    assert error.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"--what {kind} needs " in captured.err


def test_help_says_the_default_of_each_option_and_its_examples_run(planned, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parser = cli.build_parser()
    for action in parser._actions[1:]:
        assert "default: " in action.help, action.option_strings
    planned += [RECORD]
    examples = [line.split()[3:] for line in parser.epilog.splitlines()[1:]]
    assert len(examples) == 3
    for example in examples:
        assert cli.main(example) == 0


def test_the_readme_has_the_ratios_of_the_files(root, capsys):
    assert cli.main(["--from", *(str(root / f"measurements/{name}.jsonl") for name in ("cpu", "h200")), "--ratios"]) == 0
    table = capsys.readouterr().out
    assert table in (root / "README.md").read_text()
    assert max(map(len, table.splitlines())) <= 100


@pytest.mark.parametrize("page", ["README.md", "measurements/README.md"])
def test_every_documented_command_is_accepted(page, root, planned, tmp_path, monkeypatch):
    shutil.copytree(root / "measurements", tmp_path / "measurements")
    monkeypatch.chdir(tmp_path / Path(page).parent)
    text = (root / page).read_text().replace("\\\n", " ")
    commands = (
        re.findall(r"-m jaxrelu\.benchmark (.*)$", text, re.MULTILINE)
        if page == "README.md"
        else re.findall("`(--.*?)`", text)
    )
    assert len(commands) > 5
    planned += [RECORD]
    for name, found in cli.ENVIRONMENT.items():
        monkeypatch.setenv(name, found)
    monkeypatch.setattr(cli, "targets_ahead", lambda *arguments: [])
    monkeypatch.setattr(report, "plot_memory", lambda records, path: None)
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: name)
    for command in commands:
        if "FILE" not in command:
            assert cli.main(shlex.split(command)) == 0, command


def test_a_plot_without_memory_is_refused(measured, tmp_path, capsys):
    path = tmp_path / "times.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in lines(measured) if record["what"] != "memory"))
    with pytest.raises(SystemExit):
        cli.main([f"--from={path}", f"--plot={tmp_path / 'memory.png'}"])
    assert "hold no measurement of memory" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main([f"--from={path}", "--ratios"])
    assert "--ratios: the files of --from hold no measurement of memory" in capsys.readouterr().err


def test_the_ratios_are_a_table_of_markdown(tmp_path, capsys):
    path = tmp_path / "lines.jsonl"
    records = of_devices(1, ["mlp", "scan"])
    bare = RECORD | {"peer": "jax.nn", "device": "gpu 7", "dtype": "bfloat16", "temp_bytes": 6 * 2**20}
    records += [bare, bare | {"peer": "jaxrelu", "temp_bytes": 9 * 2**20}, RECORD | {"what": "peak"}]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert cli.main([f"--from={path}", "--ratios"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "| jaxrelu / lean | lines f32 | 7 bf16 |",
        "| --- | --- | --- |",
        "| mlp | .75 / .25 | 1.50 |",
        "| scan | .75 / .25 |  |",
    ]


def test_a_missing_part_is_one_line():
    code = (
        "import importlib.util, runpy; find = importlib.util.find_spec; "
        "importlib.util.find_spec = lambda name, *rest: None if name == 'rich' else find(name, *rest); "
        "runpy.run_module('jaxrelu.benchmark', run_name='__main__')"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert run.stderr == "jaxrelu.benchmark: error: rich not found; install jaxrelu[benchmark]\n"


@pytest.mark.parametrize("name", networks.NETWORKS)
def test_every_network_has_a_gradient(name):
    built = networks.build(name, PEERS["prelu"].ours, 128, 256, jnp.bfloat16, layers=3)
    gradients = jax.eval_shape(built.function, *built.arguments)
    if built.loss is not None:
        assert jax.tree.map(lambda p: (p.shape, p.dtype), gradients) == jax.tree.map(
            lambda p: (p.shape, p.dtype), built.arguments[0]
        )


@pytest.mark.parametrize(
    ("name", "layers", "parameters", "activations"),
    [
        # 11,173,962 for the ResNet-18 of CIFAR-10
        ("resnet18", 8, 11_173_962, 17),
        # torchvision's 3,504,872 without its last convolution, BatchNorm and head, with a head of 10 classes
        ("mobilenet", 17, 3_504_872 - (320 * 1280 + 2 * 1280 + 1281 * 1000) + 321 * 10, 34),
    ],
)
def test_whole_networks_have_the_published_parameters(name, layers, parameters, activations):
    built = networks.build(name, PEERS["prelu"].ours, 128, 256, jnp.float32, layers=layers)
    leaves = jax.tree.leaves(built.arguments[0])
    assert sum(leaf.size for leaf in leaves if leaf.ndim) == parameters
    assert sum(leaf.ndim == 0 for leaf in leaves) == activations


def test_the_whole_unet_has_nine_pairs_of_convolutions_and_a_head():
    built = networks.build("unet", PEERS["relu"].ours, 128, 256, jnp.float32, layers=16)
    kernels = [leaf.shape for leaf in jax.tree.leaves(built.arguments[0]) if leaf.ndim == 4]
    assert [shape[-1] for shape in kernels] == [n for c in (64, 128, 256, 512, 1024, 512, 256, 128, 64) for n in (c, c)] + [
        3
    ]


def test_peak_of_a_run(tmp_path, monkeypatch, capfd):
    run = children.run

    def in_this_process(code, **environment):
        if "'lean'" in code:  # the last would be given what this process has freed
            return run(code, **environment)
        exec(code)
        return capfd.readouterr().out

    monkeypatch.setattr(children, "run", in_this_process)
    # one at a time, as here they share a process, and so its peak
    one_thread = concurrent.futures.ThreadPoolExecutor(1)
    monkeypatch.setattr(concurrent.futures, "ThreadPoolExecutor", lambda _: one_thread)
    path = tmp_path / "lines.jsonl"
    options = ["--what=peak", "--networks=mlp", "--activations=relu", "--batch=4096", "--width=512", "--layers=2"]
    assert cli.main(["--platform=cpu", *options, f"--json={path}"]) == 0
    records = lines(path)
    assert [(r["activation"], r["peer"]) for r in records] == [
        ("relu", "jaxrelu"),
        ("relu", "jax.nn"),
        (None, "identity"),
        ("relu", "lean"),
    ]
    # two activations of 8 MiB are there at once
    assert all(2**24 <= r["temp_bytes"] < r["peak_bytes"] for r in records)
    assert cli.main([f"--from={path}"]) == 0
    assert "the device's peak" in capfd.readouterr().out


def test_kernels_are_counted_by_name():
    # instructions as XLA prints them for a GPU, shortened
    program = """
    %a = (f32[8]) custom-call(%x, %w), custom_call_target="__cublas$lt$matmul", backend_config={"epilogue":"BIAS_RELU"}
    %b = (f32[8]) custom-call(%x, %w), custom_call_target="__cublas$lt$matmul", backend_config={"epilogue":"DEFAULT"}
    %c = (f32[8]) custom-call(%x, %w), custom_call_target="__cublas$lt$matmul", backend_config={"epilogue":"DEFAULT"}
    %d = f32[8] fusion(%x), kind=kCustom, backend_config={"fusion_backend_config":{"kind":"__triton_gemm"}}
    %e = (f32[8]) custom-call(%x, %w), custom_call_target="__cudnn$convForward"
    %f = f32[8] fusion(%x), kind=kLoop, calls=%fused
    """
    assert targets.kernels(program) == {
        "__cublas$lt$matmul": 2,
        "__cublas$lt$matmul BIAS_RELU": 1,
        "__cudnn$convForward": 1,
        "__triton_gemm": 1,
    }


def test_both_forms_of_elu_are_elu():
    x = jnp.concatenate([-jnp.geomspace(1e-6, 100, 1000), jnp.linspace(-4, 4, 1001)])
    value, slope = jax.nn.elu(x), jnp.exp(jnp.minimum(x, 0))
    for of_value, of_gradient in polynomial.FORMS.values():
        # either side is some units in the last place off
        np.testing.assert_allclose(jax.jit(of_value)(x), value, rtol=1e-6)
        np.testing.assert_allclose(jax.jit(of_gradient)(x, jnp.full_like(x, 2.0)), 2 * slope, rtol=1e-6)


def test_the_commands_for_a_gpu_are_accepted(root, planned, tmp_path):
    recorder = tmp_path / "python"
    recorder.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path / "commands"}\n')
    recorder.chmod(0o700)
    file = tmp_path / "lines.jsonl"
    script = ["bash", "measurements/on_gpu.sh", str(file)]
    run = subprocess.run(script, env=os.environ | {"PYTHON": str(recorder)}, cwd=root, capture_output=True, check=False)
    assert run.returncode == 0, run.stderr
    commands = [line.split() for line in (tmp_path / "commands").read_text().splitlines()]
    assert all(command[:2] == ["-m", "jaxrelu.benchmark"] for command in commands)
    parsed = [cli.build_parser().parse_args(command[2:]) for command in commands]
    assert [(options.platform, options.json) for options in parsed] == [("gpu", file)] * 3
    assert {kind for options in parsed for kind in options.what} == {"elementwise", "expm1", "memory", "step", "peak"}
    planned += [RECORD]
    assert [cli.main(["cpu" if word == "gpu" else word for word in command[2:]]) for command in commands] == [0, 0, 0]


def test_peers_take_turns():
    calls = []
    times = timing.interleave({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 0.0, fewest=4)
    order = [name for name, before in zip(calls, ["", *calls], strict=False) if name != before]
    # after the warm-up; a turn is many calls, and each round reverses the order
    assert order[2:] == ["a", "b", "a", "b", "a"]
    assert times["a"].median > 0
    assert times["a"].spread >= 0
