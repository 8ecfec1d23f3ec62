"""A check as pages: HTML in a real browser, Markdown, JUnit, a GitHub job's summary, a webhook."""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import urllib3.util

from quantkit.errors import OutputError, QuantkitError, RecipeError
from quantkit.gates.results import Comparison, GateResult, Outcome
from quantkit.recipe import WebhookSpec
from quantkit.regression import notify
from quantkit.regression.document import (
    Change,
    Check,
    Drift,
    LayerShift,
    Metric,
    Reference,
    TextShift,
    TokenExample,
    Trend,
    TrendPoint,
    VariantState,
    WindowShift,
)
from quantkit.regression.pages import HTML, JUNIT, MARKDOWN, write_pages
from quantkit.regression.pages.render import (
    STEP_SUMMARY,
    append_step_summary,
    render_html,
    render_junit,
    render_markdown,
)
from quantkit.regression.pages.trend import BLOCKS, KINDS, blocks, build_trend
from quantkit.regression.pages.view import gate_row
from quantkit.report.numbers import ABSENT
from tests.browser import browser, needs_browser
from tests.loopback import Answer, Request, serving

RUNS = 30
HOSTILE = "<script>document.title = 'owned'</script>|`x`"


def gate(outcome: Outcome, **changes: Any) -> GateResult:
    worse = {"passed": 0.002, "regressed": 0.05, "unknown": None}[outcome]
    low, high = (None, None) if worse is None else (worse - 0.004, worse + 0.004)
    reason = f"{outcome} because of it"
    comparison = Comparison("prose", outcome, 8.1, 7.9, worse, low, high, 0.006, "windows", 24, reason)
    given: dict[str, Any] = {
        "gate": "perplexity +1 %",
        "variant": "int4",
        "kind": "accepted",
        "metric": "perplexity",
        "unit": "",
        "lower_is_better": True,
        "allowed": 0.01,
        "outcome": outcome,
        "comparisons": (comparison,),
        "reason": reason,
    }
    return GateResult(**(given | changes))


def trend(runs: int = RUNS, **changes: Any) -> Trend:
    points = tuple(
        TrendPoint(
            run=number,
            started=f"2026-10-{number:02d}T04:00:00+00:00",
            value=7.9 + 0.01 * (number % 5) + (0.4 if number == runs else 0.0),
            stderr=0.02,
            accepted=number == 12,
            comparable=number != 5,
            verdict="regressed" if number == runs else "passed",
        )
        for number in range(1, runs + 1)
    )
    given: dict[str, Any] = {
        "variant": "int4",
        "metric": "perplexity",
        "text": "prose",
        "unit": "",
        "lower_is_better": True,
        "points": points,
    }
    return Trend(**(given | changes))


def check(verdict: Outcome = "regressed", **changes: Any) -> Check:
    token = TokenExample(17, 3.2, 4.1, "The tide comes in twice a ", "day", " day", HOSTILE)
    given: dict[str, Any] = {
        "schema": 1,
        "name": "weekly",
        "run": RUNS,
        "started": "2026-10-30T04:00:00+00:00",
        "seconds": 372.5,
        "quantkit": "0.1.0",
        "device": "cpu",
        "verdict": verdict,
        "exit_code": {"passed": 0, "regressed": 1, "unknown": 2}[verdict],
        "summary": f"{verdict}: int4: perplexity +1 %",
        "variants": (VariantState("int4", "ok", None, "int4 g64", "reports/weekly/variants/int4"),),
        "references": (Reference("int4", 12, "2026-10-12T04:00:00+00:00", "2026-10-12T09:00:00+00:00", "0.1.0"),),
        "gates": (gate(verdict), gate("passed", gate="size_bytes <= 4GiB", kind="absolute", metric="size_bytes")),
        "metrics": (Metric("int4", "perplexity", "prose", "", 7.9, 8.3, 0.05, 0.046, 0.054, True),),
        "changes": (Change("package", "torch", "2.13.0", "2.14.1"), Change("recipe", HOSTILE, None, "0.01", ("int4",))),
        "layers": (LayerShift("int4", "model.layers.3.mlp.down_proj", 0.002, 0.02, 10.0, "int4 g64", "int3 g64"),),
        "texts": (
            TextShift(
                "int4", "prose", "kl_divergence", 0.02, 0.09, 3.5, 3.1, 3.9, (WindowShift(4, 0.02, 0.3, (token,)),)
            ),
        ),
        "trends": (trend(), trend(metric="size_bytes", unit="bytes", text=None)),
        "notes": ("too little data for one gate",),
        "removed": (),
    }
    return Check(**(given | changes))


def test_the_page_says_the_verdict_first_and_then_why() -> None:
    page = render_html(check())
    order = [
        "weekly: regressed",
        "regressed because of it",
        ">What changed</h2>",
        "2.14.1",
        "day</mark>",
        "down_proj",
        ">Trends</h2>",
    ]
    places = [page.index(text) for text in order]
    assert places == sorted(places)
    assert "<script" not in page
    assert "&lt;script&gt;" in page


def test_what_cannot_be_told_is_said_in_place_of_a_number() -> None:
    row = gate_row(gate("unknown", comparisons=(), reason="the texts differ"))
    assert (row.figure, row.beside, row.worse, row.interval) == (ABSENT,) * 4
    assert row.reason == "the texts differ"
    assert "the texts differ" in render_html(check("unknown", gates=(gate("unknown", reason="the texts differ"),)))


def test_a_first_check_has_nothing_beside_it() -> None:
    first = check("unknown", references=(), changes=(), metrics=(), layers=(), texts=(), trends=(trend(1),), gates=())
    assert "There is no accepted run to compare with." in render_html(first)
    assert "There is no accepted run to compare with." in render_markdown(first)
    assert 'id="trends"' not in render_html(first)


def test_a_failed_variant_is_on_every_page() -> None:
    failed = check("unknown", variants=(VariantState("int4", "failed", "no memory", "int4 g64", None),))
    assert "no memory" in render_html(failed)
    assert "no memory" in render_markdown(failed)
    suite = ET.fromstring(render_junit(failed))
    assert suite.get("errors") == "2"
    assert any(error.get("message") == "no memory" for error in suite.iter("error"))


def test_a_trend_marks_accepted_regressed_and_incomparable_runs() -> None:
    panel = build_trend(trend(), outcome="regressed")
    assert panel is not None
    kinds = [mark.kind for mark in panel.marks]
    assert (kinds[4], kinds[11], kinds[-1]) == ("other", "accepted", "bad")
    assert kinds.count("plain") == RUNS - 3
    assert len(panel.line) == RUNS - 1
    assert panel.level == panel.marks[11].y
    assert [mark.x for mark in panel.marks] == sorted(mark.x for mark in panel.marks)
    assert all(panel.frame.top <= mark.y <= panel.frame.bottom for mark in panel.marks)
    assert panel.x_ticks[0][1] == str(RUNS)
    assert len(panel.x_ticks) <= 8


def test_a_mark_says_what_the_figure_itself_did() -> None:
    points = tuple(
        replace(point, verdict="regressed" if point.run in (7, RUNS) else "passed") for point in trend().points
    )
    fine = build_trend(trend(points=points), outcome="passed")
    assert fine is not None
    kinds = [mark.kind for mark in fine.marks]
    assert (kinds[6], kinds[-1]) == ("regressed", "now")  # the runs did, on whichever figure; this one has not
    assert set(kinds) <= KINDS.keys()
    page = render_html(check(trends=(trend(), trend(metric="size_bytes", unit="bytes", text=None))))
    panels = re.findall(r"<figcaption>.*?</figcaption>.*?</svg>", page, re.DOTALL)
    assert ["chip regressed" in each for each in panels] == [True, False]
    assert [each.count('class="bad"') for each in panels] == [1, 0]
    assert all(words in page for words in KINDS.values())


def test_the_float_models_drift_is_a_line_from_the_accepted_run_on() -> None:
    model = tuple(40.0 + (0.4 if number > 12 else 0.0) for number in range(1, RUNS + 1))
    panel = build_trend(trend(model=model))
    assert panel is not None
    assert len(panel.model) == RUNS - 1  # not in the run that does not compare
    assert panel.model[0][1] == panel.level == panel.model[10][1]
    assert panel.level is not None
    assert panel.model[-1][1] < panel.level  # up by a hundredth, as the float model
    moved = build_trend(trend(model=(40.0,) * RUNS))
    assert moved is not None
    assert moved.model == []


def test_drift_stands_beside_what_quantization_adds() -> None:
    drift = Drift("int4", "perplexity", "prose", 0.03, 0.02, 0.04, 0.05, 1.05 / 1.03 - 1)
    for page in (render_html(check(drifts=(drift,))), render_markdown(check(drifts=(drift,)))):
        assert "The float model's own drift" in page.replace("&#39;", "'")
        assert "+3 % (+2 % to +4 %)" in page
        assert "+1.94 %" in page
    assert "own drift</h2>" not in render_html(check())


def test_a_line_of_blocks_rises_with_the_figures() -> None:
    drawn = blocks(trend())
    assert len(drawn) == RUNS - 1
    assert drawn[-1] == BLOCKS[-1]
    assert BLOCKS[0] in drawn
    same = tuple(replace(point, value=1.0) for point in trend().points)
    assert len(set(blocks(trend(points=same)))) == 1


def test_markdown_begins_with_the_verdict_and_its_tables_hold_together() -> None:
    text = render_markdown(check())
    assert text.startswith("# ❌ weekly: regressed\n")
    for line in text.splitlines():
        if line.startswith(("| ❌", "| ✅")):
            assert line.replace("\\|", "").count("|") == 9
    assert "<script" not in re.sub(r"(`+).*?\1", "", text)  # in a code span it is text
    assert "▁" in text


def test_junit_counts_regressions_as_failures_and_what_cannot_be_told_as_errors() -> None:
    found = check(
        gates=(gate("regressed"), gate("unknown", gate="size_bytes +1 %"), gate("passed", gate="tasks.a.b >= 1"))
    )
    suite = ET.fromstring(render_junit(found))[0]
    assert [suite.get(key) for key in ("tests", "failures", "errors")] == ["3", "1", "1"]
    cases = suite.findall("testcase")
    assert [case.get("name") for case in cases] == ["perplexity +1 %", "size_bytes +1 %", "tasks.a.b >= 1"]
    assert [[child.tag for child in case] for case in cases] == [["failure"], ["error"], []]


def test_junit_holds_texts_that_xml_cannot() -> None:
    found = check(gates=(gate("regressed", reason="a \x00 and \x1b[31m"),))
    failure = next(ET.fromstring(render_junit(found)).iter("failure"))
    assert failure.get("message") == "a \N{REPLACEMENT CHARACTER} and \N{REPLACEMENT CHARACTER}[31m"


def test_pages_are_written_beside_each_other(tmp_path: Path) -> None:
    assert [path.name for path in write_pages(check(), tmp_path)] == [HTML, MARKDOWN, JUNIT]
    assert all((tmp_path / name).stat().st_size for name in (HTML, MARKDOWN, JUNIT))


def test_the_summary_of_a_job_is_appended_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(STEP_SUMMARY, raising=False)
    assert append_step_summary(check()) is None
    file = tmp_path / "summary.md"
    file.write_text("before\n")
    monkeypatch.setenv(STEP_SUMMARY, str(file))
    assert append_step_summary(check()) == file
    assert file.read_text(encoding="utf-8").startswith("before\n# ❌ weekly: regressed")
    monkeypatch.setenv(STEP_SUMMARY, str(tmp_path / "file" / "below"))
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        append_step_summary(check())


@needs_browser
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (400, True)])
def test_the_page_in_a_browser(tmp_path: Path, width: int, dark: bool) -> None:
    longest = trend(
        variant="a-name-that-somebody-chose", metric="answers.value", text="mmlu_high_school_history.acc_norm"
    )
    told = check(trends=(*check().trends, longest), gates=(*check().gates, gate("passed", variant=longest.variant)))
    (page,) = (path for path in write_pages(told, tmp_path) if path.name == HTML)
    with browser(tmp_path / "profile", width=width, dark=dark) as driver:
        driver.get(page.as_uri())
        run = driver.execute_script
        assert driver.title == f"weekly: regressed {ABSENT} quantkit check"  # the hostile text has not run
        assert [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"] == []
        assert run("return document.documentElement.scrollWidth") <= run("return innerWidth")
        banner = run("return getComputedStyle(document.querySelector('.verdict')).backgroundColor")
        paper = run("return getComputedStyle(document.body).backgroundColor")
        assert banner != paper  # the style sheet is allowed by the page's own policy
        assert dark == (sum(map(int, paper[4:-1].split(","))) < 3 * 128)
        marks = run("return document.querySelector('#trends figure .trend').querySelectorAll('g').length")
        assert marks == RUNS
        overlaps = run(
            "const labels = [...document.querySelector('#trends figure svg').querySelectorAll('text.k.c')]"
            ".map(e => e.getBoundingClientRect()).sort((a, b) => a.left - b.left);"
            "return labels.some((box, i) => i && labels[i - 1].right > box.left)"
        )
        assert overlaps is False
        run("document.querySelectorAll('details').forEach(each => { each.open = true })")
        clipped = "e => e.scrollWidth > e.clientWidth + 1 || e.getBoundingClientRect().right > innerWidth"
        assert run(f"return [...document.querySelectorAll('figcaption')].some({clipped})") is False
        if width < 640:  # a row is a list of its figures, each with its name
            assert run(f"return [...document.querySelectorAll('.stack tbody tr')].some({clipped})") is False
            label = "return getComputedStyle(document.querySelector('#gates td'), '::before').content"
            assert run(label) == '"Variant"'
        first = run("return document.querySelector('.verdict').getBoundingClientRect().top")
        assert 0 <= first < 200
        assert len(driver.get_screenshot_as_png()) > 20_000


@contextmanager
def hook(*answers: int) -> Iterator[tuple[str, list[tuple[str, Mapping[str, str], bytes]]]]:
    """The address of a server that answers with these statuses in turn, and what was posted to it."""
    got: list[tuple[str, Mapping[str, str], bytes]] = []

    def answer(request: Request) -> Answer:
        got.append((request.path, dict(request.headers.items()), request.body))
        status = answers[min(len(got), len(answers)) - 1]
        return status, {"Location": "/elsewhere"} if status == 302 else {}, b""

    with serving(answer) as address:
        yield f"{address}/hooks/T0KEN", got


@pytest.fixture
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(urllib3.util.Retry, "sleep", lambda *_: None)


@pytest.mark.usefixtures("no_pause")
def test_a_webhook_is_posted_signed_and_tried_again() -> None:
    with hook(503, 429, 200) as (url, got):
        notify.post(notify.Target(url, "s3cret"), notify.payload(check()))
    assert len(got) == 3
    path, headers, body = got[-1]
    assert path == "/hooks/T0KEN"
    assert headers[notify.SIGNATURE] == "sha256=" + hmac.new(b"s3cret", body, hashlib.sha256).hexdigest()
    content = json.loads(body)
    assert (content["verdict"], content["run"], len(content["gates"])) == ("regressed", RUNS, 2)
    assert "reports/" not in body.decode()


@pytest.mark.usefixtures("no_pause")
@pytest.mark.parametrize(("answers", "tries"), [((403,), 1), ((302,), 1), ((503,), notify.TRIES)])
def test_a_webhook_that_refuses_is_one_line_without_its_address(answers: tuple[int, ...], tries: int) -> None:
    with hook(*answers) as (url, got), pytest.raises(QuantkitError) as caught:
        notify.post(notify.Target(url, "s3cret"), notify.payload(check()))
    assert len(got) == tries
    assert all(path == "/hooks/T0KEN" for path, _, _ in got)
    assert "T0KEN" not in str(caught.value)
    assert "s3cret" not in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.usefixtures("no_pause")
def test_a_webhook_that_is_not_there_is_one_line() -> None:
    with hook(200) as (url, _):
        pass
    with pytest.raises(QuantkitError, match=r"http://127\.0\.0\.1 was not told: \w+"):
        notify.post(notify.Target(url), {})


def test_a_webhook_takes_its_address_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = WebhookSpec(url_env="HOOK", secret_env="HOOK_SECRET")
    monkeypatch.delenv("HOOK", raising=False)
    with pytest.raises(RecipeError, match="HOOK"):
        notify.target(spec)
    monkeypatch.setenv("HOOK", "http://example.org/x")
    with pytest.raises(RecipeError, match="HTTPS"):
        notify.target(spec)
    monkeypatch.setenv("HOOK", "https://example.org/x")
    with pytest.raises(RecipeError, match="HOOK_SECRET"):
        notify.target(spec)
    monkeypatch.setenv("HOOK_SECRET", "s")
    assert notify.target(spec) == notify.Target("https://example.org/x", "s")


def test_a_webhook_is_told_of_failures_or_of_all() -> None:
    failures, everything = WebhookSpec(url_env="HOOK"), WebhookSpec(url_env="HOOK", on="always")
    wanted = [(notify.wanted(failures, each), notify.wanted(everything, each)) for each in (check("passed"), check())]
    assert wanted == [(False, True), (True, True)]
