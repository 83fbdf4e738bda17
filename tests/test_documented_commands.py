"""What a page tells its reader to type can be typed: the module, file or target is there, and takes the options."""

import ast
import importlib.util
import json
import re
import subprocess
import sys
import tomllib

import pytest

from tests.documented import (
    PAGES,
    PLACEHOLDER,
    ROOT,
    Command,
    commands_of,
    docstring_commands,
    page_commands,
    shell_blocks,
    spans,
    tutorial_commands,
)

MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))
EXTRAS = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
OTHERS = {  # a shell's own words, and the programs of clusters
    "cd", "cp", "export", "mkdir", "sbatch", "scancel", "scontrol", "source", "srun", "tar", "trap", "wait", "git",
    "python", "torchrun", "make", "pip", "pytest", "}",
}  # fmt: skip
FOREIGN = {"--signal", "--requeue", "--cpus-per-task"}  # of sbatch


def missing(command: Command) -> str | None:
    """What a command names that isn't there, or None."""
    if PLACEHOLDER.search(command.target):
        return None
    if command.kind == "module":
        return None if runs(command.target) else f"no module {command.target} to run"
    if command.kind in {"file", "sbatch"}:
        return None if (ROOT / command.target).is_file() else f"no file {command.target}"
    if command.kind == "make":
        variables = {word.partition("=")[0] for word in command.words if "=" in word}
        unknown = {word for word in command.words if "=" not in word and not word.startswith("-")} - TARGETS
        unknown |= {name for name in variables if f"$({name})" not in MAKEFILE}
        return f"make has no {', '.join(sorted(unknown))}" if unknown else None
    named = {extra for word in command.words for each in re.findall(r"^\.\[(.*)\]$", word) for extra in each.split(",")}
    return f"no extra {', '.join(sorted(named - EXTRAS))}" if named - EXTRAS else None


def runs(module: str) -> bool:
    """Whether ``python -m`` finds something to run."""
    try:
        found = importlib.util.find_spec(module)
        if found is not None and found.submodule_search_locations is not None:
            found = importlib.util.find_spec(f"{module}.__main__")
    except ModuleNotFoundError:
        return False
    return found is not None


@pytest.mark.parametrize(("source", "least"), [(page_commands, 30), (docstring_commands, 30), (tutorial_commands, 5)])
def test_what_commands_name_is_there(source, least):
    commands = source()
    assert len(commands) >= least  # or the pattern sees nothing
    assert [f"{each.where}: {wrong}" for each in commands if (wrong := missing(each))] == []


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("`python -m zoo.nothing`", "no module zoo.nothing to run"),
        ("`python -m invertible`", "no module invertible to run"),  # there is one, but nothing in it to run
        ("so by `python -m\nbenchmarks.nothing --rounds 3`:", "no module benchmarks.nothing to run"),
        ("```sh\npython examples/nothing.py --data DIR  # a comment\n```", "no file examples/nothing.py"),
        ("```sh\nsrun torchrun --nproc-per-node 8 \\\n    examples/nothing.py\n```", "no file examples/nothing.py"),
        ("    LOCAL=/local sbatch --nodes=4 examples/nothing.sbatch DIR", "no file examples/nothing.sbatch"),
        ("`make nothing`", "make has no nothing"),
        ("    make demo LENGTH=1", "make has no LENGTH"),
        ("`pip install '.[nothing]'`", "no extra nothing"),
        ("`(ulimit -v 8000000; python -m zoo.nothing released ...)`", "no module zoo.nothing to run"),
        ("`make demo SHORT=1`, `python -m zoo NAME`, `python examples/tutorials/NAME.py`", None),
        ("`pip install '.[zoo]'`\n\n    so that we can't make nothing of it\n    make what you can't\n", None),
        ("```python\nmake = 1\n```\n`torchrun` and `python` are only named", None),
    ],
)
def test_a_command_that_is_not_there_is_found(text, wrong):
    found = [each for each in map(missing, commands_of(text, "page")) if each]
    assert found == ([wrong] if wrong else [])


def strangers(block: str) -> set[str]:
    """The programs of a block that are neither known, nor a function of the block."""
    own = set(re.findall(r"^(\w+)\(\) *\{", block, re.MULTILINE))
    lines = re.sub(r"\\\n", " ", block).splitlines()
    words = (re.match(r"(?:\$ )?(?:\w+=\S* +)*([^\s=(#]+)(?![\w()]*\()", line.strip()) for line in lines)
    return {word[1] for word in words if word} - own - OTHERS


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_shell_blocks_are_a_shells(page):
    """Bash reads every one, and knows its programs or we do."""
    for line, block in shell_blocks(page.read_text()):
        block = re.sub(r"^\$ ", "", block, flags=re.MULTILINE)
        result = subprocess.run(["bash", "-n"], input=block, capture_output=True, text=True, timeout=20)
        assert result.returncode == 0, f"{page.name}:{line}: {result.stderr}"
        assert strangers(block) == set(), f"{page.name}:{line}"


def test_a_program_that_nobody_knows_is_found():
    assert strangers("export A=1\nA=2 frobnicate --now\nhand_on() {\n    wait\n}\nhand_on\nmake demo \\\n  lint") == {
        "frobnicate"
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_are_python(page):
    """Those that doctest runs are run; the others, of other libraries or of long runs, can be compiled at least."""
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
        compile(block, page.name, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


def ask(commands):
    """The help of commands, each a kind, a target and words before ``--help``."""
    wanted = sorted(commands)
    command = [sys.executable, str(ROOT / "tests" / "help_command.py")]
    asked = subprocess.run(command, input=json.dumps(wanted), capture_output=True, text=True, cwd=ROOT, timeout=600)
    assert asked.returncode == 0, asked.stderr
    return dict(zip(wanted, json.loads(asked.stdout), strict=True))


def below(command, text):
    """The commands within a command that are meant, by its help: "spectrum", or each for a placeholder."""
    first = next((word for word in command.words if not word.startswith("-")), "")
    listed = re.findall(r"\{([\w,-]+)\}", text) + re.findall(r"^    ([a-z][\w-]*)(?=\s)", text, re.MULTILINE)
    choices = {word for group in listed for word in group.split(",")}
    return {word for word in choices if word == first or PLACEHOLDER.fullmatch(first)}


def has(text, option):
    return re.search(rf"(?<![\w-]){option}(?![\w-])", text)


def rejected(commands):
    """The help of each command, and a line for each option that it doesn't have."""
    asked = [each for each in commands if each.kind in {"module", "file"} and each.options]
    asked = [each for each in asked if not PLACEHOLDER.search(each.target)]
    known = ask({(each.kind, each.target) for each in asked})
    inner = {
        each: {(each.kind, each.target, word) for word in below(each, known[each.kind, each.target])} for each in asked
    }
    known |= ask({command for commands in inner.values() for command in commands})
    faults = [
        f"{' '.join(command)} --help failed: {text}" for command, text in known.items() if not text.endswith("\n0")
    ]
    for each in asked:
        texts = [known[command] for command in ((each.kind, each.target), *inner[each])]
        faults += [f"{each.where}: {each.target} has no {it}" for it in each.options if not has(" ".join(texts), it)]
    return known, faults


@pytest.mark.slow
def test_the_options_in_the_pages_exist():
    """Those that follow a command belong to it; those that stand alone belong to some command."""
    more = [("torch.distributed.run", ("--help",)), ("zoo.convert", ("NAME", "--help"))]  # whose options stand alone
    unwritten = [Command("", "module", module, words) for module, words in more]
    texts, faults = rejected([*page_commands(), *docstring_commands(), *tutorial_commands(), *unwritten])
    assert faults == []
    everything = "\n".join(texts.values())
    alone = {
        (f"{page.name}:{line}", code.split()[0].partition("=")[0])
        for page in PAGES
        for line, code in spans(page.read_text())
        if re.match(r"--\w", code)
    }
    assert len(alone) > 20
    assert [each for each in sorted(alone) if each[1] not in FOREIGN and not has(everything, each[1])] == []


@pytest.mark.slow
def test_an_option_that_does_not_exist_is_found():
    text = (
        "`python -m zoo.analysis spectrum --checkpoint RUN --nothing 3` and `python examples/posterior.py --problems x`"
    )
    assert rejected(commands_of(text, "page"))[1] == [
        "page:1: zoo.analysis has no --nothing",
        "page:1: examples/posterior.py has no --problems",
    ]
