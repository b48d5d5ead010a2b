"""The live view of a run: one page of HTML, and the same in a terminal."""

from __future__ import annotations

import json
import os
import subprocess
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest

from pipeline.core.errors import Failure, Kind
from pipeline.core.events import FileReport
from pipeline.core.lease import Lease
from pipeline.tracking import live, page, snapshot
from tests.fixtures import home_fixtures, live_fixtures
from tests.fixtures.live_fixtures import append, make_run, train
from tests.fixtures.run_fixtures import atom
from tests.fixtures.web_page_fixtures import chromium

BUDGET = {"gpu_hours": 20.0, "core_hours": None}
PRICES = {"gpu_hour": 2.5, "core_hour": 0.01, "currency": "EUR"}


class Elements(HTMLParser):
    """The elements of a page, and whether all are closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.names: set[str] = set()
        self.attributes: list[tuple[str, str, str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_a_page_has_everything_in_itself(tmp_path: Path) -> None:
    run, store = make_run(tmp_path, 800, budget=BUDGET, prices=PRICES)
    folder = run.node_folder("pretrain")
    append(folder / "metrics.jsonl", {"time": 1.0, "step": 777, "spike": 1.0})
    append(folder / "metrics.jsonl", {"time": 1.0, "step": 800, "dead_experts": 3.0, "<script>": 1.0})
    append(folder / "events.jsonl", {"time": 1.0, "event": "note", "text": "<img src=x onerror=alert(1)>\x1b[31m"})
    append(folder / "events.jsonl", {"time": 1.0, "event": "rank_times", "node": "n7", "seconds": 1.31})
    lease = Lease.take(store.work("pretrain-0123456789ab"))
    assert lease is not None
    try:
        current = snapshot.take(run, store)
        text = page.page(current)
    finally:
        lease.release()
    elements = Elements(text)
    assert elements.open == [] and not elements.names & {"script", "img", "link", "iframe", "a", "object", "form"}
    assert not [each for each in elements.attributes if each[1] in ("src", "href", "style") or each[1].startswith("on")]
    assert "://" not in text.replace("http-equiv", "") and "\x1b" not in text and "&lt;img src=x" in text
    assert ("meta", "content", "30") in elements.attributes, "it reloads itself"
    for part in ("running, 2 ranks", "800/1000 steps", "<b>loss</b>", "<b>grad_norm</b>", "1 loss spike",
                 "3 dead experts", "rank_times: node n7, seconds 1.31", "budget.gpu_hours = 20:", " EUR"):  # fmt: skip
        assert part in text, part
    assert 16 * 1600 / 3600 < current.spending.now("gpu_hours") < 16 * 1700 / 3600
    assert current.spending.coming["gpu_hours"] == pytest.approx(16 * 400 / 3600, rel=0.01)
    shown = "\n".join(snapshot.lines(current))
    assert "loss" in shown and "▁" in shown and "1 loss spike" in shown and "budget.gpu_hours = 20" in shown


def test_the_page_of_a_long_run_is_no_larger(tmp_path: Path) -> None:
    sizes = []
    for steps in (400, 8000):
        run, store = make_run(tmp_path / str(steps), steps)
        sizes.append(len(page.page(snapshot.take(run, store))))
    assert sizes[1] < 1.2 * sizes[0] < 60_000, sizes


def test_a_page_that_is_over_does_not_reload_and_names_the_cause(tmp_path: Path) -> None:
    run, store = make_run(tmp_path, 5, ago=100)
    current = snapshot.take(run, store)
    assert current.over and "its process is gone" in page.page(current)
    assert 'http-equiv="refresh"' not in page.page(current)


def test_a_running_stage_keeps_its_files_up_to_date(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "SUMMARY_EVERY", 0.05)
    monkeypatch.setattr(page, "RELOAD", 0)
    run, store = make_run(tmp_path, 10)
    folder, path = run.node_folder("pretrain"), run.folder / "status.html"
    files = live.LiveFiles(store, run.id, "pretrain")
    try:
        wait_for(lambda: path.exists() and "10/1000 steps" in path.read_text())
        for step in range(11, 21):
            train(folder, time.time(), step, 3.0)
        wait_for(lambda: "20/1000 steps" in path.read_text())
    finally:
        files.close()
    summary = json.loads((folder / "events.summary.json").read_text())
    assert summary["offset"] == (folder / "events.jsonl").stat().st_size
    assert [name for name in os.listdir(run.folder) if name.startswith(".")] == []


def test_between_two_reloads_the_page_is_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "SUMMARY_EVERY", 0.02)
    written: list[Path] = []
    monkeypatch.setattr(page, "write", lambda path, text: (written.append(path), path.write_text(text)))
    run, store = make_run(tmp_path, 10)
    stages = [live.LiveFiles(store, run.id, "pretrain"), live.LiveFiles(store, run.id, "acquire")]
    wait_for(lambda: bool(written))
    time.sleep(0.5)
    assert 1 <= len(written) <= 2, "both may begin at once"
    for stage in stages:
        stage.close()
    assert len(written) <= 4


def test_what_the_live_view_cannot_write_never_reaches_the_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(live, "SUMMARY_EVERY", 0.05)
    run, store = make_run(tmp_path, 10)
    (run.folder / "run.json").write_text("{")
    (run.node_folder("pretrain") / "metrics.summary.json").mkdir()
    report, files = FileReport(run.node_folder("pretrain")), live.LiveFiles(store, run.id, "pretrain")
    time.sleep(0.4)
    report.end(Failure("it failed", Kind.MACHINE))
    files.close()
    report.close()
    assert (run.node_folder("pretrain") / "events.jsonl").read_text().splitlines()[-1].count("it failed") == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if "live view" in line]
    assert len(lines) == 1 and "the stage goes on" in lines[0], lines


def test_a_run_leaves_a_page_and_status_writes_one(tmp_path: Path) -> None:
    composed = home_fixtures.graphs(tmp_path)[0]
    home = tmp_path / "home"
    atom(home, "run", str(composed.recipe.path), "--until", "acquire-sums")
    (kept,) = home.glob("logs/*/status.html")
    assert '<span class="sealed">sealed</span>' in kept.read_text() and "1 of 1 stages sealed" in kept.read_text()
    (summary,) = home.glob("logs/*/acquire-sums/events.summary.json")
    assert json.loads(summary.read_text())["state"]["starts"] == 1
    before = {path: path.stat().st_mtime_ns for path in home.rglob("*")}
    atom(home, "status", "--html", str(tmp_path / "page.html"))
    assert (tmp_path / "page.html").read_text().count("<tr>") == 2
    assert {path: path.stat().st_mtime_ns for path in home.rglob("*")} == before, "to look writes nothing"
    process = atom(home, "status", "--html", str(tmp_path / "nowhere" / "page.html"), code=2)
    assert process.stderr.count("\n") == 1 and "cannot be written (No such file or directory)" in process.stderr


def browse(path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [chromium(), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += ["--enable-logging=stderr", f"--user-data-dir={path.parent / 'profile'}", *options, path.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


def test_a_browser_shows_the_page_in_light_and_dark(tmp_path: Path) -> None:
    """Nothing in it breaks its own policy, and the style sheet is in force: the background follows the system."""
    from matplotlib.image import imread

    run, store = make_run(tmp_path, 300)
    lease = Lease.take(store.work("pretrain-0123456789ab"))
    assert lease is not None
    document = tmp_path / "status.html"
    document.write_text(page.page(snapshot.take(run, store)))
    lease.release()
    corners = []
    for options in ((), ("--blink-settings=preferredColorScheme=0",)):
        picture = tmp_path / "picture.png"
        log = browse(document, "--window-size=390,1000", f"--screenshot={picture}", *options).stderr
        assert "Refused to" not in log and "Content Security Policy" not in log, log
        image = imread(str(picture))
        corners.append(float(image[-1, -1, :3].mean()))
        blue = (image[..., 2] > image[..., 0] + 0.3).mean()
        assert blue > 0.002, "the curves are drawn in the color of the style sheet"
        assert image.shape[1] == 390
    assert corners[0] > 0.9 and corners[1] < 0.3, corners
    assert "<polyline" in browse(document, "--dump-dom").stdout


def wait_for(condition: object, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_status_knows_the_run_and_watching_ends_with_it(tmp_path: Path) -> None:
    make_run(tmp_path, 3)
    body = json.loads(atom(tmp_path, "status", live_fixtures.RUN, "--json").stdout)
    assert [stage["state"] for stage in body["stages"]] == ["waiting", "failed", "waiting"]
    shown = atom(tmp_path, "status", live_fixtures.RUN, "--watch").stdout
    assert "its process is gone" in shown and "grad_norm" in shown and "used so far: " in shown
