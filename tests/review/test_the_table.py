"""The table of docs/review.md is the model's own answer."""

from pathlib import Path

from click.testing import CliRunner

from kvmmmu.analysis import review
from kvmmmu.cli import main


def test_the_document_holds_what_the_command_prints(root: Path) -> None:
    result = CliRunner().invoke(main, ["review", "--markdown"])
    assert result.exit_code == 0
    assert result.output.strip() in (root / "docs" / "review.md").read_text()


def test_the_command_prints_every_point_for_people_and_programs() -> None:
    for option in ([], ["--json"]):
        result = CliRunner().invoke(main, ["review", *option])
        assert result.exit_code == 0
        assert "seed_b_recreate_long" in result.output
    assert {point.remark for point in review.POINTS} == {1, 2, 3, 4, 6, 7}
