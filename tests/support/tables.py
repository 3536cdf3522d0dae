"""Print the lines of the tables in benchmarks/ that are not what results.json and the themes give."""

import json
from pathlib import Path

from benchmarks import report
from benchmarks.__main__ import load
from benchmarks.workload import Row

FOLDER = Path(report.__file__).parent
REMARKS = ("Medians of", "Other programs")  # remarks on the conditions of a run, which results.json does not have


def lines(text):
    return [line for line in text.splitlines() if not line.startswith(REMARKS)]


if __name__ == "__main__":
    results = json.loads((FOLDER / report.RESULTS).read_text(encoding="utf-8"))
    for name, saved in results.items():
        rows = [Row(**row) for row in saved["rows"]]
        expected = lines(report.markdown(load(name), rows, saved["environment"], saved["command"]))
        committed = lines((FOLDER / f"{name}.md").read_text(encoding="utf-8"))
        for k in range(max(len(expected), len(committed))):
            if expected[k : k + 1] != committed[k : k + 1]:
                print(f"{name}.md: expected {expected[k : k + 1]}, got {committed[k : k + 1]}")
