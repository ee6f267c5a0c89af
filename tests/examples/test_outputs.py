"""How a run ends that a signal, a full disk or an earlier run's leftovers come in the way of."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest

from common import options, outputs, runs

PARSER = options.Parser("script.py", "A script.", ["table.csv"], "")
KINDS = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def ending(run, out, code, capsys):
    """Returns the one line on stderr of a run that exits with a code, having left no handler of signals behind."""
    handlers = [signal.getsignal(number) for number in outputs.SIGNALS]
    with pytest.raises(SystemExit) as exit_info, outputs.directory(PARSER, out) as directory:
        run(directory)
    assert exit_info.value.code == code
    assert [signal.getsignal(number) for number in outputs.SIGNALS] == handlers
    (line,) = capsys.readouterr().err.splitlines()
    return line


def results(directory, content, *signals):
    """Writes a file and a folder; the signals come while they are written."""
    with directory.publishing("table.csv", "model") as scratch:
        outputs.table(scratch / "table.csv", ["content"], [[content]])
        for number in signals:
            signal.raise_signal(number)
        (scratch / "model").mkdir()
        (scratch / "model" / content).touch()


def check_results(out, content):
    assert names(out) == ["model", "table.csv"]
    assert (out / "table.csv").read_text() == f"content\n{content}\n"
    assert names(out / "model") == [content]


@KINDS
def test_a_signal_ends_the_work(number, tmp_path, capsys):
    line = ending(lambda directory: signal.raise_signal(number), tmp_path, 128 + number, capsys)
    assert line == f"interrupted: nothing was written to {tmp_path}"
    assert names(tmp_path) == []


@KINDS
def test_a_signal_waits_until_the_files_are_complete(number, tmp_path, capsys):
    def run(directory):
        results(directory, "new", number, signal.SIGINT, signal.SIGTERM)
        pytest.fail("it goes on")

    line = ending(run, tmp_path, 128 + number, capsys)
    assert line == f"interrupted: {tmp_path} holds table.csv, model"
    check_results(tmp_path, "new")


def test_a_signal_after_the_files_says_what_is_there(tmp_path, capsys):
    def run(directory):
        results(directory, "new")
        raise KeyboardInterrupt

    assert ending(run, tmp_path, 130, capsys) == f"interrupted: {tmp_path} holds table.csv, model"


def test_a_thread_runs_without_signals(tmp_path):
    def run():
        with outputs.directory(PARSER, tmp_path) as directory:
            results(directory, "new")

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    check_results(tmp_path, "new")


def test_a_signal_that_is_ignored_stays_so(tmp_path):
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with outputs.directory(PARSER, tmp_path) as directory:
            signal.raise_signal(signal.SIGHUP)
            results(directory, "new")
    finally:
        signal.signal(signal.SIGHUP, old)
    check_results(tmp_path, "new")


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), PermissionError(errno.EACCES, "No way")]
)
def test_a_write_that_fails_leaves_the_earlier_results(error, tmp_path, capsys):
    def run(directory):
        with directory.publishing("table.csv", "model") as scratch:
            (scratch / "table.csv").write_text("half")
            raise error

    with outputs.directory(PARSER, tmp_path) as directory:
        results(directory, "old")
    assert ending(run, tmp_path, 1, capsys) == f"script.py: {error.strerror}; nothing was written to {tmp_path}"
    check_results(tmp_path, "old")


def test_all_files_are_replaced_or_none(tmp_path, capsys):
    def run(directory):
        with directory.publishing("table.csv", "model", "lost") as scratch:
            (scratch / "table.csv").touch()
            (scratch / "model").mkdir()

    with outputs.directory(PARSER, tmp_path) as directory:
        results(directory, "old")
    assert ending(run, tmp_path, 1, capsys).startswith("script.py: No such file or directory: lost; nothing was written")
    check_results(tmp_path, "old")
    with outputs.directory(PARSER, tmp_path) as directory:
        results(directory, "new")
    check_results(tmp_path, "new")


def test_a_directory_that_turns_read_only_takes_one_line(tmp_path, capsys, monkeypatch):
    def refused(path, *args):
        raise PermissionError(errno.EACCES, "Permission denied", path)

    def run(directory):
        monkeypatch.setattr(os, "mkdir", refused)  # file modes do not bind root
        try:
            results(directory, "new")
        finally:
            monkeypatch.undo()

    with outputs.directory(PARSER, tmp_path) as directory:
        results(directory, "old")
    assert ending(run, tmp_path, 1, capsys) == f"script.py: Permission denied; nothing was written to {tmp_path}"
    check_results(tmp_path, "old")


def test_a_directory_removed_meanwhile_is_made_anew(tmp_path):
    with outputs.directory(PARSER, tmp_path / "out") as directory:
        (tmp_path / "out").rmdir()
        results(directory, "new")
    check_results(tmp_path / "out", "new")


def test_a_full_disk_under_what_is_printed_takes_one_line(tmp_path, capsys, monkeypatch):
    def run(directory):
        results(directory, "new")
        print("a table")

    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        line = ending(run, tmp_path, 1, capsys)
        monkeypatch.undo()
        with pytest.raises(OSError, match="No space"):
            full.close()
    assert line == f"script.py: No space left on device; {tmp_path} holds table.csv, model"


def test_what_a_killed_run_left_is_named_and_kept(tmp_path, capsys):
    (tmp_path / ".unfinished-abc").mkdir()
    with outputs.directory(PARSER, tmp_path):
        pass
    (line,) = capsys.readouterr().err.splitlines()
    wanted = f"script.py: remove {tmp_path}/.unfinished-abc, which a killed run left, unless a run is writing there now"
    assert line == wanted
    assert names(tmp_path) == [".unfinished-abc"]


def test_real_ctrl_c_does_not_cut_a_checkpoint(tmp_path):
    epoch = runs.Epoch(1, 0.5, 0.5, 0.9, 0.1, 1.0, {"hidden/dead": 0.0, "hidden/firing_rate": 0.5})
    program = f"""
import time
import numpy as np
import orbax.checkpoint as ocp
from pathlib import Path
from common import options, outputs, runs

save = ocp.StandardCheckpointer.save
def slow_save(*args):
    save(*args)  # threads of its own go on writing
    print("saving", flush=True)
    time.sleep(0.3)
ocp.StandardCheckpointer.save = slow_save

with outputs.directory(options.Parser("script.py", "A script.", ["model"], ""), Path("out")) as directory:
    epoch = runs.{epoch}
    runs.write(directory, runs.Run([epoch], epoch, {{"kernel": np.ones((300, 500))}}, 0, None), "")
"""
    examples = Path(outputs.__file__).parents[1]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{examples}:{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-c", program]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, text=True, **pipes) as process:
        assert process.stdout.readline() == "saving\n"
        for _ in range(2):
            process.send_signal(signal.SIGINT)
            time.sleep(0.1)
        _, error = process.communicate(timeout=120)
    assert (process.returncode, error) == (130, "interrupted: out holds 1 epoch and the model of epoch 1\n")
    assert names(tmp_path / "out") == sorted(runs.OUTPUTS)
    with ocp.StandardCheckpointer() as checkpointer:
        np.testing.assert_array_equal(checkpointer.restore(tmp_path / "out" / "model")["kernel"], 1)
