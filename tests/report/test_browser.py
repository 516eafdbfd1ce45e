"""The pages of a run and of a sweep as a browser shows them, where there is one."""

import html
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from cbq.report.command import SweepReport
from cbq.report.run_page import write_run_page
from cbq.results import write_results

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# A window of a browser without a screen is never narrower than 500 pixels; a frame in it is, and is a page of its own.
FRAME = """<!doctype html><body><iframe width="{width}" height="800" srcdoc="{page}"></iframe><pre></pre><script>
const frame = document.querySelector("iframe");
function look() {{
  const page = frame.contentDocument;
  if (page.body?.dataset.drawn !== "yes") return setTimeout(look, 50);
  const root = page.documentElement;
  document.querySelector("pre").textContent = JSON.stringify({{
    width: root.clientWidth,
    scrolls: root.scrollWidth,
    fetched: frame.contentWindow.performance.getEntriesByType("resource").map(each => each.name),
    charts: Object.fromEntries([...page.querySelectorAll(".chart")].map(
      each => [each.id, each.querySelector("svg").getBoundingClientRect().width])),
  }});
}}
look();
</script>"""


@pytest.fixture
def sweep_page(result: Callable[..., dict], tmp_path: Path) -> Path:
    """The page of a sweep of long names, with options, commands, and a run that has a page."""
    folder = tmp_path / "sweep"
    names = ["rounding_6epochs", "lora", "adarounding"]
    for number, name in enumerate(f"table3b_{name}" for name in names):
        for seed in (0, 1, 2):
            words = [f"experiment={name}", f"seed={seed}", "calibration.num_segments=16", "evaluation.baselines=false"]
            settings = {"experiment": name, "quant": "w4a4", "preprocess": f"outlier_suppression_of_number_{number}"}
            settings |= {"calibration": "c4", "calibration.num_segments": 16, "calibration.segment_tokens": 2048}
            settings |= {f"reconstruction.option{each}": "a/long/" * 20 + "word" for each in range(25)}
            run = result(16.0 + number + seed / 10, seed=seed, **settings)
            run |= {"overrides": words, "working_folder": str(tmp_path)}
            write_results(folder / f"experiment={name},seed={seed}", run)
    (folder / "experiment=table3b_lora,seed=1" / "report.html").write_text("a page")
    SweepReport(str(folder), ["table3b_nearest", *(f"table3b_{name}" for name in names)]).run()
    return folder / "report.html"


@pytest.fixture
def run_page(run_folder: Path) -> Path:
    """The page of a run."""
    return write_run_page(run_folder)


def look(page: Path, width: int, theme: int, *options: str) -> tuple[dict, list[str]]:
    """Return what a browser finds in a page, and the lines of its console.

    Args:
        page: to be shown.
        width: of the page, in pixels.
        theme: 0 dark, 1 light.
        options: more of Chromium's.
    """
    frame = page.with_name(f"frame_{width}_{theme}.html")
    frame.write_text(FRAME.format(width=width, page=html.escape(page.read_text(encoding="utf-8"))), encoding="utf-8")
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    command += ["--window-size=1400,900", "--virtual-time-budget=20000", "--host-resolver-rules=MAP * ~NOTFOUND"]
    command += [f"--blink-settings=preferredColorScheme={theme}", *options, frame.as_uri()]
    found = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    (told,) = re.findall("<pre>(.*?)</pre>", found.stdout)
    return json.loads(html.unescape(told)), [line for line in found.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.skipif(CHROMIUM is None, reason="no browser")
@pytest.mark.slow
@pytest.mark.parametrize("theme", [0, 1], ids=["dark", "light"])
@pytest.mark.parametrize("width", [400, 1280], ids=["phone", "desktop"])
@pytest.mark.parametrize("kind", ["run_page", "sweep_page"])
def test_a_browser_draws_every_chart_without_an_error(request, kind, width, theme):
    page = request.getfixturevalue(kind)
    found, console = look(page, width, theme)
    assert console == []
    assert found["fetched"] == []
    assert width - 20 <= found["width"] <= width  # a scroll bar may stand beside it
    assert found["scrolls"] == found["width"], "a page scrolls down only"
    charts = set(re.findall(r'class="chart" id="([\w-]+)"', page.read_text(encoding="utf-8")))
    assert found["charts"].keys() == charts
    assert len(charts) == {"run_page": 10, "sweep_page": 1}[kind]
    assert all(0.6 * width < size <= found["width"] for size in found["charts"].values()), found["charts"]
