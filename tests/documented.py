"""What the pages and docstrings tell a reader to type, and the parts of the pages that show numbers and pictures."""

import ast
import inspect
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
TOP = (ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md"))
PAGES = [*TOP, *sorted((ROOT / "docs").glob("*.md"))]
TUTORIALS = ROOT / "examples" / "tutorials"
FENCE = re.compile(r"^([ \t]*)(`{3,}|:{3,})(.*?)\n(.*?)^\1\2[ \t]*$", re.DOTALL | re.MULTILINE)
SPAN = re.compile(r"(`+)(?!`)(.+?)(?<!`)\1(?!`)", re.DOTALL)
INDENTED = re.compile(r"^ {4}(?=\S)(.*(?:\\\n.*)*)$", re.MULTILINE)
START = re.compile(  # at the start of a line, after another command, a variable or the word that runs it somewhere
    r"(?:^|[;&|(])\s*(?:\$ +)?(?:(?:\w+=\S+|srun(?: +--?\S+)*) +)*"
    r"((?:python3?|torchrun|make|pip|sbatch|pytest) +[^;&|)]+)"
)
PLACEHOLDER = re.compile(r"\b[A-Z]{2,}\b")  # a name for the reader to fill in


@dataclass(frozen=True)
class Command:
    """A program with its arguments, as a page writes it."""

    where: str
    kind: str  # "module", "file", "make", "pip" or "sbatch"
    target: str
    words: tuple[str, ...] = ()

    @property
    def options(self) -> list[str]:
        """The long options, without their values."""
        return [word.partition("=")[0] for word in self.words if re.match(r"--\w", word)]


def line_of(text: str, place: int) -> int:
    return text.count("\n", 0, place) + 1


def without_fences(text: str) -> str:
    """A page without its blocks of code; the lines keep their numbers."""
    return FENCE.sub(lambda match: "\n" * match[0].count("\n"), text)


def shell_blocks(text: str) -> list[tuple[int, str]]:
    """Blocks that are marked as a shell's, with the lines on which they start."""
    kinds = {"sh", "bash", "shell", "console"}
    return [(line_of(text, match.start(4)), match[4]) for match in FENCE.finditer(text) if match[3].strip() in kinds]


def spans(text: str) -> list[tuple[int, str]]:
    """Code within the sentences of a page; a line break in it is a space."""
    text = without_fences(text)
    found = [(line_of(text, match.start()), match[2]) for match in SPAN.finditer(text) if "\n\n" not in match[2]]
    return [(line, " ".join(code.split())) for line, code in found]


def code_of(text: str) -> Iterator[tuple[int, str]]:
    """Lines of shell blocks and of indented ones, and spans."""
    for start, block in shell_blocks(text):
        for match in re.finditer(r"(?:.*\\\n)*.+", block):
            yield start + line_of(block, match.start()) - 1, match[0]
    prose = without_fences(text)
    yield from ((line_of(prose, match.start()), match[1]) for match in INDENTED.finditer(prose))
    yield from spans(text)


def commands_of(text: str, where: str) -> list[Command]:
    """All commands in the code of a page or a docstring."""
    found = []
    for line, code in code_of(text):
        code = re.sub(r"(^|\s)#.*", "", code.replace("\\\n", " "))
        for match in START.finditer(code):
            plain = match[1] if match[1].startswith("pip") else re.sub(r"[\[\]]|\.\.\.", " ", match[1])
            try:
                words = shlex.split(plain)
            except ValueError:  # a quotation mark without its other: a sentence
                continue
            command = read(words, f"{where}:{line}")
            found += [command] if command else []
    return found


def read(words: list[str], where: str) -> Command | None:
    """The command of these words, or None if they only begin like one."""
    program, *rest = words
    if program in {"make", "pip"} or (program == "pytest" and rest):
        kind, target = ("module", "pytest") if program == "pytest" else (program, "")
        return Command(where, kind, target, tuple(rest))
    if program.startswith("python") and rest[:1] == ["-m"] and len(rest) > 1:
        return Command(where, "module", rest[1], tuple(rest[2:]))
    script = next((k for k, word in enumerate(rest) if word.endswith((".py", ".sbatch"))), None)
    if script is None:
        return None
    return Command(where, "sbatch" if program == "sbatch" else "file", rest[script], tuple(rest[script + 1 :]))


def page_commands() -> list[Command]:
    """Those of the pages."""
    return [each for page in PAGES for each in commands_of(page.read_text(), str(page.relative_to(ROOT)))]


def tutorial_commands() -> list[Command]:
    """Those of the prose of the tutorials, which is in comments, and of the page above them."""
    found = []
    for file in [*sorted(TUTORIALS.glob("*.py")), TUTORIALS / "README.rst"]:
        lines = file.read_text().splitlines()
        if file.suffix == ".py":  # code is left out, and its lines keep their numbers
            lines = [line.removeprefix("#").removeprefix(" ") if line.startswith("#") else "" for line in lines]
        found += commands_of("\n".join(lines), str(file.relative_to(ROOT)))
    return found


def docstring_commands() -> list[Command]:
    """Those of the docstrings in the library, the zoo, the examples and the benchmarks."""
    found = []
    for folder in ("invertible", "zoo", "examples", "benchmarks"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
                    text = inspect.cleandoc(ast.get_docstring(node) or "")
                    found += commands_of(text, f"{file.relative_to(ROOT)}, docstring")
    return found


@dataclass(frozen=True)
class Section:
    """What is below a heading, up to the next, and what is below the headings that it is under."""

    heading: str
    body: str
    context: str


def sections(text: str) -> list[Section]:
    """The sections of a page."""
    plain = without_fences(text).splitlines()
    starts = [k for k, line in enumerate(plain) if re.match(r"#+ ", line)]
    lines, found, above = text.splitlines(), [], []
    for start, end in zip(starts, [*starts[1:], len(lines)], strict=False):
        level = len(plain[start]) - len(plain[start].lstrip("#"))
        body = "\n".join(lines[start + 1 : end])
        above = [(other, text) for other, text in above if other < level]
        found.append(Section(plain[start].lstrip("# "), body, "\n".join([body, *(text for _, text in above)])))
        above.append((level, body))
    return found


def tables_of_numbers(body: str) -> list[str]:
    """Tables of which at least a third of the cells after the first column begin with a number."""
    found = []
    for table in re.findall(r"(?:^\|.*\n?)+", without_fences(body), re.MULTILINE):
        rows = table.strip().splitlines()[2:]
        cells = [cell.strip() for row in rows for cell in row.strip().strip("|").split("|")[1:]]
        numbers = sum(bool(re.match(r"[*~≈≤<+-]*\d", cell)) for cell in cells)
        found += [table] if cells and numbers >= len(cells) / 3 else []
    return found


def pictures(body: str) -> list[str]:
    """Committed pictures that a page shows."""
    return re.findall(r"(?:\]\(|\{(?:figure|image)\} |src=\")/?((?:figures|_static)/[\w./-]+)", body)
