"""The paper's tables rendered from the result files: all rows in docs/RESULTS.md, the full ones in README.md."""

from collections.abc import Iterator
from pathlib import Path

from base.console import log
from base.errors import DamagedFile
from base.files import ROOT, write_bytes
from paper import stages, tilt
from paper.results import Result, is_full, last_scores, read_result, read_results
from paper.rows import DATA_SETS, TABLES, Row, all_rows

README, PAGE = ROOT / "README.md", ROOT / "docs" / "RESULTS.md"
START, END = "<!-- tables: made by `python config/main.py -a tables --write` -->\n", "<!-- end of tables -->"
Found = dict[tuple[str, str], list[Result]]  # by preset and data set


def table(columns: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [columns, *rows]
    lines = [f"| {' | '.join(map(str, line))} |" for line in lines]
    return "\n".join([lines[0], "|---" * len(columns) + "|", *lines[1:]])


def compact() -> str:
    """One table of the rows that have a run of the paper's recipe, as README.md shows them."""
    found = _find_results()
    rows = []
    for row in all_rows():
        for result in filter(is_full, found.get((row.preset, row.data), [])):
            label = row.label + (f", seed {result['seed']}" if result["seed"] else "")
            scores = last_scores(result)
            here = f"{scores['psnr']:.2f} / {scores['ssim']:.4f}"
            rows.append([label, DATA_SETS[row.data], here, row.paper_scores])
    return table(["row", "data", "here: PSNR / SSIM", "in the paper"], rows)


def full() -> str:
    """All tables of the paper, with the rows that have no run, then the studies, as docs/RESULTS.md shows them."""
    found = _find_results()
    columns = ["row", "data", "PSNR", "SSIM", "in the paper", "steps x crops", "tested on", "trained on", "run"]
    parts = []
    for title, presets in TABLES.items():
        rows = [line for preset in presets for data in DATA_SETS for line in _lines(Row(preset, data), found)]
        parts.append(f"**{title}**\n\n{table(columns, rows)}")
    return "\n\n".join([*parts, *_studies()])


def _find_results() -> Found:
    found: Found = {}
    for result in read_results().values():
        if "preset" in result:  # else it is a study's
            found.setdefault((result["preset"], result["data"]), []).append(result)
    return found


def _lines(row: Row, found: Found) -> Iterator[list[str]]:
    """A row's line for each of its results; where there are none, one that says so."""
    start = [row.label, DATA_SETS[row.data]]
    results = found.get((row.preset, row.data), [])
    if not results:
        yield [*start, "no run yet", "", row.paper_scores, "", "", "", f"`{row.name}`"]
    for result in results:
        scores, run = last_scores(result), row._replace(recipe=result["recipe"], seed=result["seed"])
        steps = f"{result['steps']} x {result['settings']['batch_size']}"
        steps = steps if is_full(result) else f"*{steps}: no reproduction*"
        images = f"{result['test_images']} images"
        values = [f"{scores['psnr']:.2f}", f"{scores['ssim']:.4f}", row.paper_scores, steps, images]
        yield [*start, *values, result["train_rain"], f"`{run.name}`"]


def _studies() -> Iterator[str]:
    """The results of tilt.py and stages.py, with the commands that made them."""
    if result := read_result("tilt"):
        runs = (f"{run} ({facts['steps']} steps x {facts['batch_size']})" for run, facts in result["runs"].items())
        yield (
            f"**Tilted rain**: {result['rain']} rain, turned, on {result['images']} backgrounds; {', '.join(runs)}\n\n"
            f"{table(*tilt.columns_and_rows(result))}\n\n"
            f"`python config/main.py -a tilt -m {' '.join(result['runs'])} --rain {result['rain']}`"
        )
    for result in read_results("stages_*").values():
        yield (
            f"**By stage**: `{result['model']}` after {result['step']} steps, {result['images']} images of "
            f"{result['data']}, on {result['device']}\n\n"
            f"{table(*stages.columns_and_rows(result))}\n\n"
            f"`python config/main.py -a stages -m {result['model']}`"
        )


def write_tables() -> None:
    """Put the tables between the marks in README and PAGE. Raises DamagedFile, and changes nothing, without these."""
    texts = {path: _with_tables(path, text) for path, text in ((README, compact()), (PAGE, full()))}
    for path, text in texts.items():
        write_bytes(path, text.encode())
        log.info(f"wrote the tables in {path}")


def _with_tables(path: Path, tables: str) -> str:
    """The text of a file with `tables` between its marks."""
    text = path.read_text() if path.is_file() else ""
    if text.count(START) != 1 or text.count(END) != 1:
        raise DamagedFile(f"{path} must have one line {START.strip()!r} and behind it one {END!r}")
    before, rest = text.split(START)
    return f"{before}{START}\n{tables}\n\n{END}{rest.split(END)[1]}"
