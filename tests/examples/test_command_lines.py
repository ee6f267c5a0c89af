"""What the scripts have in common: their options, and signals. train_digits.py has more of both, in a file of its own."""

import os
import re
import signal
import subprocess
import sys

import pytest

import activations
import binary_classifier
import born_dead
import compare_activations
import dying_relu
import gradient_flow
import relu6_convnet
import relu_prime
import simple_nets
import stable_training
import train_digits
from common import options, outputs
from scripts import check_width, error_of

# with a function that each calls in the midst of its work
SCRIPTS = {
    activations: "compare",
    binary_classifier: "train",
    born_dead: "measure",
    compare_activations: "time_passes",
    dying_relu: "train",
    gradient_flow: "input_gradient",
    relu6_convnet: "examine",
    relu_prime: "share_of_minibatches",
    simple_nets: "run",
    stable_training: "train",
}
each_script = pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)


@each_script
def test_mistakes_take_one_line(script, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for arguments, message in (
        (
            ["--out", str(tmp_path / "file")],
            f"argument --out: must be a directory to write to, got '{tmp_path}/file': a file\n",
        ),
        (["--out="], "argument --out: "),
        (["--seed", "-1"], "argument --seed: must be an integer of at least 0"),
        (["--quicker"], "--quicker"),
        (["--quik"], "--quik"),
    ):
        with pytest.raises(SystemExit) as exit_info:
            script.main(arguments)
        assert exit_info.value.code == 2
        out, error = capsys.readouterr()
        assert out == ""
        assert error.count("\n") == 1
        assert error.startswith(f"{script.__name__}.py: error: ")
        assert message in error


@each_script
def test_a_signal_leaves_nothing(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, SCRIPTS[script], lambda *args, **kwargs: signal.raise_signal(signal.SIGTERM))
    error = error_of(script, 143, capsys, "--quick", "--out", str(tmp_path / "out"))
    assert error == f"interrupted: nothing was written to {tmp_path}/out"
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_real_signal_leaves_nothing(number, code, tmp_path):
    # from another folder, with a script that imports little
    command = [sys.executable, born_dead.__file__, "--out", "out"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, cwd=tmp_path, text=True, env=environment) as process:
        # the progress bar, which is there when the work begins
        assert any("/100000" in line for line in process.stderr)
        process.send_signal(number)
        _, error = process.communicate(timeout=120)
    assert process.returncode == code
    assert error.splitlines()[-1] == "interrupted: nothing was written to out"
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("script", [*SCRIPTS, train_digits], ids=lambda script: script.__name__)
def test_help_names_files_defaults_and_an_example(script, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as exit_info:
        script.main(["--help"])
    assert exit_info.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    text = " ".join(" ".join(lines).split())
    *most, last = script.OUTPUTS
    assert f"Writes {', '.join(most)}{' and ' if most else ''}{last} to the directory --out" in text
    folder = "digits" if script is train_digits else script.__name__
    assert f"(default: runs/{folder})" in text
    assert not re.search("default: (None|False)", text)
    # each option that takes a value has a default
    (synopsis,) = re.findall("usage: .*?options:", text)
    assert text.count("(default: ") == len(re.findall(r"\[--[\w-]+ ", synopsis))

    # the example is accepted
    prefix = f"example: python examples/{script.__name__}.py "
    assert lines[-1].startswith(prefix)
    monkeypatch.setattr(outputs, "directory", lambda parser, out: sys.exit("accepted"))
    with pytest.raises(SystemExit, match="accepted"):
        script.main(lines[-1].removeprefix(prefix).split())


@pytest.mark.parametrize("description", ["", "leaky_relu 0.01, 10 layers"])
def test_progress_has_room_in_80_columns(description, capsys):
    with options.progress(range(100_000), unit="network", desc=description) as progress:
        progress.set_postfix_str("loss 0.0043, accuracy 100.0%")
    assert description in check_width(capsys.readouterr().err)


def test_seeds_wrap_around():
    assert list(options.seeds(2**32 - 1, 3)) == [2**32 - 1, 0, 1]
