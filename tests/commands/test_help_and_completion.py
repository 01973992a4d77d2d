"""`nullworker` alone, a misspelled command, and what a shell completes."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import ROOT
from pages import DOCS, blocks
from programs import nullworker, run

from nullworker.cli.commands import COMMANDS, GROUPS

SHELLS = ("bash", "zsh", "fish")


async def test_without_a_command_all_are_shown_in_their_groups() -> None:
    told = await nullworker(code=2)
    assert [line[:-1] for line in told.splitlines() if line.endswith(":")] == ["Options", *GROUPS]
    assert max(map(len, told.splitlines())) <= 80


def test_each_command_is_in_one_group() -> None:
    grouped = [name for names in GROUPS.values() for name in names]
    assert set(COMMANDS) <= set(grouped)
    assert len(grouped) == len(set(grouped))


@pytest.mark.parametrize(
    ("typed", "meant"), [("relase", "release"), ("histroy", "history"), ("stauts", "status"), ("fly", None)]
)
async def test_a_misspelled_command_is_answered_with_the_one_that_is_meant(typed: str, meant: str | None) -> None:
    question = f": is {meant!r} meant?" if meant else ""
    assert (
        await nullworker(typed, code=2)
        == f"nullworker: there is no command {typed!r}{question} (see nullworker --help)\n"
    )


@pytest.mark.parametrize("shell", SHELLS)
async def test_a_shell_is_told_how_to_complete(shell: str) -> None:
    (documented,) = [text for language, text in blocks(DOCS / "commands.md") if language == f"sh {shell}"]
    variable = f"_NULLWORKER_COMPLETE={shell}_source nullworker"
    assert variable in documented
    script = await run("sh", "-c", f"PATH={ROOT}/.venv/bin:$PATH {variable}")
    assert f"{shell}_complete" in script


async def test_bash_completes_commands_options_and_values(tmp_path: Path) -> None:
    (documented,) = [text for language, text in blocks(DOCS / "commands.md") if language == "sh bash"]
    (tmp_path / "nullworker").symlink_to(ROOT / ".venv" / "bin" / "nullworker")
    script = f"""
        {documented}
        for words in 'nullworker rel' 'nullworker history --jo' 'nullworker history --state rel'; do
            COMPREPLY=()
            COMP_WORDS=($words)
            COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
            _nullworker_completion nullworker
            echo "${{COMPREPLY[@]}}"
        done
    """
    told = await run("bash", "-c", f"PATH={tmp_path}:$PATH\n{script}")
    assert told.splitlines() == ["release", "--job", "released"]
