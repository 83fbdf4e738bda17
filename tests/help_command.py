"""Asks commands for their help: reads ``[["module" or "file", target, word, ...], ...]`` as JSON, writes the answers.

One process imports what all of them need, and each command runs in a fork of it: a second each in place of ten.
"""

import json
import os
import runpy
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1])]

import matplotlib.pyplot as plt  # noqa: E402, F401
import torchvision  # noqa: E402, F401

import zoo  # noqa: E402, F401


def ask(kind, target, *words):
    """What the command prints, and its exit code on the last line."""
    with tempfile.TemporaryFile("w+") as answer:
        child = os.fork()
        if child == 0:
            os.dup2(answer.fileno(), 1)
            os.dup2(answer.fileno(), 2)
            sys.argv = [target, *words, "--help"]
            code = 0
            try:
                if kind == "module":
                    runpy.run_module(target, run_name="__main__", alter_sys=True)
                else:
                    sys.path[0] = str(Path(target).parent)
                    runpy.run_path(target, run_name="__main__")
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else int(end.code is not None)
            except BaseException as error:  # noqa: BLE001
                print(f"{type(error).__name__}: {error}")
                code = 1
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        answer.seek(0)
        return f"{answer.read()}\n{status}"


if __name__ == "__main__":
    os.environ["COLUMNS"] = "200"
    json.dump([ask(*command) for command in json.load(sys.stdin)], sys.stdout)
