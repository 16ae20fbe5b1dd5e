"""README's tables are those that the recorded results make."""

import json

from benchmarks import table


def test_readme_holds_the_tables_of_the_results():
    text = (table.ROOT / "README.md").read_text(encoding="utf-8")
    assert table.rewritten(text) == text, "run `python -m benchmarks.table`"


def test_the_last_line_of_a_case_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(table, "RESULTS", tmp_path)
    lines = [{"benchmark": "b", "case": "c", "ms": ms} for ms in (3, 2)]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert table.records() == {("b", "c"): lines[1]}
