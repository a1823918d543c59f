"""docs/xen.md names, for each known mistake, the code or the test that answers it: they have to be there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "xen.md").read_text(encoding="utf-8")
TESTS = [*(ROOT / "tests").rglob("test_*.py")]
MISTAKES = 72


def rows() -> dict[int, str]:
    return {
        int(number): row for number, row in re.findall(r"^\| (\d+) \| (.*)$", TEXT, re.MULTILINE)
    }


def named(pattern: str) -> list[tuple[str, str]]:
    return sorted(set(re.findall(pattern, TEXT)))


def test_every_mistake_has_its_answer() -> None:
    assert list(rows()) == list(range(1, MISTAKES + 1))
    unanswered = [
        number
        for number, row in rows().items()
        if not re.search(r"`[\w/.]+:{1,2}\w+`|(PV|COLO|HVM) only|xl's|as \d+|`--|not called", row)
    ]
    assert unanswered == []


@pytest.mark.parametrize(("module", "test"), named(r"`(test_\w+)::(test_\w+)`"))
def test_a_named_test_is_there(module: str, test: str) -> None:
    texts = [path.read_text(encoding="utf-8") for path in TESTS if path.stem == module]
    assert texts, f"there is no {module}.py below tests"
    assert any(re.search(rf"^def {test}\(", text, re.MULTILINE) for text in texts)


@pytest.mark.parametrize(("path", "symbol"), named(r"`([\w/]+\.(?:py|c|h)):(\w+)`"))
def test_named_code_is_there(path: str, symbol: str) -> None:
    base = ROOT if path.startswith(("primary/", "secondary/")) else ROOT / "checkpointd"
    assert re.search(rf"\b{symbol}\b", (base / path).read_text(encoding="utf-8"))
