"""What the README shows works as it stands."""

import re
from pathlib import Path


def blocks(root: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", (root / "README.md").read_text(), re.M | re.S)


def test_the_python_example_runs(root: Path) -> None:
    examples = blocks(root, "python")
    assert examples
    for example in examples:
        assert len([line for line in example.splitlines() if line.strip()]) <= 10
        exec(compile(example, "README.md", "exec"), {})


def test_each_of_the_two_commands_is_one_line_that_begins_with_its_own_environment(root: Path) -> None:
    commands = blocks(root, "sh")
    assert len(commands) == 2
    for command in commands:
        assert command.count("\n") == 1
        assert command.startswith("python3 -m venv .venv && ")


def test_the_gate_runs_the_test_command_of_the_readme(root: Path) -> None:
    found = [line for line in (root / "README.md").read_text().splitlines() if "[test]" in line]
    assert found == [blocks(root, "sh")[1].strip()]
    assert "grep -m1 -F '[test]' README.md" in (root / ".ci/run").read_text()
