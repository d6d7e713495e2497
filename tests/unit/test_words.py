"""What the program says is the field's language; phrases that readers stumbled over do not come back."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OLD = (
    "DOES NOT AGREE",
    "machine was busy",
    "known better",
    r"GMACs a sample",
    r"\bthe floor\b",
    r"reading of\s+ours",
    r"our reading\b",
    r"\bon request\b",
    "weights that are not loaded",
)


def test_phrases_that_nobody_understood_are_gone():
    files = [path for home in ("vtok", "patches", "eval") for path in (ROOT / home).rglob("*") if ".pyc" not in path.suffix]
    texts = {path: path.read_text(encoding="utf-8") for path in files if path.suffix in (".py", ".pyi", ".html", ".css", ".js")}
    assert len(texts) > 300
    found = [f"{path.relative_to(ROOT)}: {old}" for path, text in texts.items() for old in OLD if re.search(old, text)]
    assert found == []
