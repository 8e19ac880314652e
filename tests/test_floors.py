"""Each floor of the house imports only from those below it, and PEFT is known on one of them."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lora_kernels"
GROUND = ("_version", "_checks", "_files", "reports")
FACE = ("doctor", "tuning", "cli", "commands", "__init__")
FLOORS = (
    GROUND,
    ("runtime",),
    ("ops",),
    ("linalg",),
    ("adapters",),
    ("statistics",),
    ("init",),
    ("training",),
    ("landscape",),
    ("api",),
    FACE,
)
LEVEL = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
FILES = sorted(PACKAGE.rglob("*.py"))


def room(path):
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported(path):
    """All modules and names that a file imports, also inside of functions and under TYPE_CHECKING."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_every_file_has_a_floor():
    assert {room(path) for path in FILES} == set(LEVEL)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_lead_down(path):
    for name in imported(path):
        package, _, rest = name.partition(".")
        if package == "lora_kernels":  # and by itself it is the face, with names from all floors
            other = LEVEL.get(rest.split(".")[0], LEVEL["__init__"])
            assert other <= LEVEL[room(path)], f"{room(path)} imports {name}, which is above it"


def test_peft_is_known_to_the_adapters_alone():
    knowing = {room(path) for path in FILES for name in imported(path) if name.split(".")[0] == "peft"}
    assert knowing == {"adapters"}
