"""What all scripts of the gallery have in common: their options, and Ctrl-C."""

import os
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
import options
import relu6_convnet
import relu_prime
import simple_nets
import stable_training

# with a function that each calls in the midst of its work
SCRIPTS = {
    activations: "draw",
    binary_classifier: "train",
    born_dead: "measure",
    compare_activations: "time_passes",
    dying_relu: "train",
    gradient_flow: "draw",
    relu6_convnet: "examine",
    relu_prime: "share_of_minibatches",
    simple_nets: "draw",
    stable_training: "train",
}
each_script = pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)


@each_script
def test_mistakes_take_one_line(script, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for arguments, message in (
        (["--out", str(tmp_path / "file")], "argument --out: must be a directory to write to"),
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
def test_ctrl_c_leaves_nothing(script, tmp_path, monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(script, SCRIPTS[script], interrupted)
    with pytest.raises(SystemExit) as exit_info:
        script.main(["--quick", "--out", str(tmp_path / "out")])
    assert exit_info.value.code == 130
    assert capsys.readouterr().err.splitlines()[-1] == f"interrupted: nothing was written to {tmp_path}/out"
    assert list((tmp_path / "out").iterdir()) == []


def test_a_real_ctrl_c_leaves_nothing(tmp_path):
    command = [sys.executable, "-u", binary_classifier.__file__, "--out", str(tmp_path)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout.readline().startswith("random labels")
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=120)
    assert process.returncode == 130
    assert error == f"interrupted: nothing was written to {tmp_path}\n"
    assert list(tmp_path.iterdir()) == []


def test_seeds_wrap_around():
    assert list(options.seeds(2**32 - 1, 3)) == [2**32 - 1, 0, 1]
