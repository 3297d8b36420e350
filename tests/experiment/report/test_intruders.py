"""Whatever a run's files and its folder's name hold, the page shows it as text, and so do a spreadsheet and a terminal."""

import csv
import html
import html.parser
import io
import json
import re
import shutil
import subprocess

import markdown_it
import pytest

from lowrank_jax.experiment.report.blocks import Code, Emphasis, Heading, Paragraph, Picture, Preformatted, Table
from lowrank_jax.experiment.report.page import Report
from lowrank_jax.experiment.report.rendering import as_csv, as_html, as_markdown, as_text
from lowrank_jax.experiment.workdir.workdir import Workdir
from tests.stored import make

CALL = "document.title='owned'"
PAYLOADS = [
    f"<script>{CALL}</script>",
    f"</title><script>{CALL}</script>",
    f"</style><script>{CALL}</script>",
    f"</code></pre></td></table><script>{CALL}</script>",
    f"--><script>{CALL}</script><!--",
    f"`<script>{CALL}</script>`",
    f"`` `<img src=x onerror={CALL}>",
    f"a\n\n<script>{CALL}</script>\n\nb",
    f"a\r\n\r\n    <svg onload={CALL}>",
    f'"><img src=x onerror="{CALL}">',
    f"' onmouseover='{CALL}",
    f"[x](javascript:{CALL})",
    f"[x]: javascript:{CALL}\n[x]",
    f"<javascript:{CALL}>",
    "![x](https://example.com/x.png)",
    '<iframe src="https://example.com"></iframe><base href="https://example.com/">',
    '<meta http-equiv="refresh" content="0;url=https://example.com">',
    "https://example.com www.example.com a@example.com @octocat",
    "| a | b |\n| --- | --- |\n| c \\| d \\\\| e |",
    "# a\n## b\n- c\n1. d\n> e\n---\n===\n*f* _g_ __h__ ~~i~~ $j$",
    "&lt;script&gt;&#60;b&#62; &amp;",
    "{{ 7 * 7 }}{% raw %}{# #}",
    "\x1b]0;owned\x07\x1b[31m\x9b31m\x08\x7f\u202e\u2066\x00\ufeff",
]

TAGS = "html|head|meta|title|style|body|h1|h2|p|table|thead|tbody|tr|th|td|pre|code|em|img"


class Page(html.parser.HTMLParser):
    """The elements of a page, and its text; anything that this project does not write itself is a failure."""

    def __init__(self, text):
        super().__init__()
        self.text, self.open, self.metas = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        assert re.fullmatch(TAGS, tag)
        if tag == "meta":
            self.metas.append(dict(attrs))
        elif tag == "img":
            assert [name for name, _ in attrs] == ["alt", "src"] and attrs[1][1].startswith("data:image/png;base64,")
        else:
            assert attrs == []
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def handle_comment(self, data):
        raise AssertionError(data)

    def handle_pi(self, data):
        raise AssertionError(data)

    def handle_decl(self, decl):
        assert decl == "doctype html"


def check_html(text):
    """The text of a page that holds nothing but this project's own elements."""
    page = Page(text)
    charset, policy = page.metas
    assert charset == {"charset": "utf-8"} and policy["http-equiv"] == "Content-Security-Policy"
    assert re.fullmatch(
        r"default-src 'none'; img-src data:; style-src 'sha256-[\w+/=]+'; base-uri 'none'; form-action 'none'",
        policy["content"],
    )
    return "".join(page.text)


TOKENS = r"(heading|paragraph|table|thead|tbody|tr|th|td|em)_(open|close)|inline|text|code_inline|code_block"


def check_markdown(text):
    """The text of a page in Markdown, whose only links are its own pictures."""
    shown = []
    for token in markdown_it.MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(text):
        for part in [token, *(token.children or [])]:
            if part.type == "image":
                assert re.fullmatch(r"[a-z0-9_]+\.png", str(part.attrs["src"]))
                continue
            assert re.fullmatch(TOKENS, part.type) or part.content == "<!-- -->", part
            if part.type in ("text", "code_inline", "code_block"):
                shown.append(part.content)
    without_code = re.sub(r"`[^`\n]*`|^    .*$", "", text, flags=re.M)
    assert not re.search(r"(https?|ftp)://|www\.|@\w", without_code)  # GitHub makes links of these
    return "".join(shown)


def printed(text):
    """How a text is shown on one line."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in re.sub(r"\s+", " ", text))


def check_terminal(text):
    assert all(line.isprintable() for line in text.splitlines())


@pytest.mark.parametrize("payload", PAYLOADS)
def test_a_text_is_shown_as_it_is_wherever_it_stands(payload):
    blocks = [
        Heading(payload, level=1),
        Paragraph(payload),
        Paragraph("a ", Code(payload), " b ", Emphasis(payload), payload, Code(payload)),
        Table([[payload, Code(payload)], [Code(payload), payload], [payload, ""], [f"`{payload}", f"{payload}`"]]),
        Preformatted([payload, payload]),
        Picture("a.png", b"png", payload),
    ]
    shown, marked = check_html(as_html(payload, blocks)), check_markdown(as_markdown(blocks))
    assert shown.count(printed(payload)) == 16
    assert re.sub(r"\s", "", marked).count(re.sub(r"\s", "", printed(payload))) == 15
    check_terminal(as_text([[payload, payload], ["", payload]]))


def hostile_run(home, payload, number):
    """A run with the payload in every text and, where keys are free, in every key."""
    make(home, f"run{number}", top1=0.5, raw=0.4, seed=number)
    folder = Workdir(home / f"run{number}")
    config = folder.read_config()
    for section in config.values():
        for key in section if isinstance(section, dict) else ():
            if isinstance(section[key], str) and not re.match(r"[\d.]+ (step|epoch)", section[key]):
                section[key] = payload
    config["objective"]["metrics"] = ["top1", payload]
    config["model"]["kwargs"] = {payload: payload, "widths": [payload]}
    config["dataset"]["kwargs"] = {payload: {payload: payload}}
    config["lowrank"]["rules"] = [{payload: payload}]
    config[payload] = payload
    folder.write_json("config.json", config)
    result = folder.read_json("result.json") or {}
    result["eval"][payload] = 0.5
    folder.write_json("result.json", {**result, "versions": {payload: payload}, payload: payload})
    folder.metrics.append({"step": 30, payload: 1.0})


def hostile(home, payload):
    """Runs of every kind with the payload in them."""
    for number in range(2):
        hostile_run(home, payload, number)
    named = payload.replace("/", "_").replace("\0", "").encode(errors="replace").decode()
    make(home, "failed", failure=f"{payload}\ud800", seed=7)
    make(home, "stopped", seed=8)
    Workdir(home / "stopped").write_json("stopped.json", {"by": payload, "step": 20})
    make(home, "damaged", seed=9)
    (home / "damaged" / "metrics.jsonl").write_text(json.dumps({"step": 1, payload: payload}) + "\n")
    for run in ("failed", "stopped", "damaged"):
        (home / run).rename(home / f"{run} {named}")
    record = {"commands": [payload, f"lowrank sweep {payload}"], "tuned": [payload], "trials": {}}
    Workdir(home).write_json("sweep.json", record)


@pytest.mark.parametrize("payload", PAYLOADS)
def test_nothing_in_a_run_becomes_a_part_of_the_page(tmp_path, payload):
    hostile(tmp_path, payload)
    report = Report([str(tmp_path)])
    assert sorted(run.status for run in report.found.runs) == ["damaged", "diverged", "done", "done", "stopped"]
    shown = check_html(as_html(report.title(), report.blocks({"curves.png": b"png"})))
    assert shown.count(printed(payload)) > 20
    check_markdown(report.markdown())
    check_terminal(report.console())


def test_the_pictures_are_drawn_whatever_the_arms_are_called(tmp_path):
    for number, payload in enumerate(["$\\frac{", "_a", "x" * 10_000, "\ud800\x00\n", "日本語 😀"]):
        make(tmp_path, f"{number}", top1=0.5, lowrank__scale=0.1)
        folder = Workdir(tmp_path / f"{number}")
        config = folder.read_config()
        config["lowrank"]["method"] = payload
        folder.write_json("config.json", config)
    Report([str(tmp_path)]).write(tmp_path / "out")
    check_html((tmp_path / "out" / "report.html").read_text())


FORMULAS = ["=cmd|' /C calc'!A0", "+1+1", "-1+1", "@SUM(A1)", "\t=1+1", "\r=1+1", " =1+1", "=HYPERLINK(1)", "＝1"]  # noqa: RUF001


def test_no_text_is_a_formula_in_a_spreadsheet_and_every_number_is_a_number(tmp_path):
    make(tmp_path, "good", top1=0.25, loss=-1.5)
    for number, formula in enumerate(FORMULAS):
        make(tmp_path, "new", failure=formula, seed=number + 1, optim__lr=0.5)
        (tmp_path / "new").rename(tmp_path / formula.replace("/", "_"))
    rows = list(csv.reader(io.StringIO(Report([str(tmp_path)]).csv())))
    for row in rows:
        for cell in row:
            assert not cell.lstrip().startswith(("=", "+", "@", "＝")) and not re.match(r"-\D|-.*\+", cell)  # noqa: RUF001
    good = next(dict(zip(rows[0], row, strict=True)) for row in rows if row[0] == "good")
    assert (good["early loss"], good["eval/top1"]) == ("-1.5", "0.25")
    assert as_csv([["a;=1", "a; -1;b", 'a;"@x', "a=1;b-1"]]) == 'a;\'=1,a;\' -1;b,"a;\'""@x",a=1;b-1\n'
    assert as_csv([["=1", -1, -0.5, None, True, 'a"b', "a,b"]]) == '\'=1,-1,-0.5,,True,"a""b","a,b"\n'


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def title_in_chromium(page, profile):
    """The title of a page after its scripts have run."""
    command = (CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run")
    command += (f"--user-data-dir={profile}", "--virtual-time-budget=2000", "--dump-dom", page.as_uri())
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    return re.search("<title>(.*?)</title>", dom, re.S)[1]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_in_a_browser_nothing_runs(tmp_path):
    live = tmp_path / "live.html"
    live.write_text(f"<title>t</title><script>{CALL}</script>")
    assert title_in_chromium(live, tmp_path / "profile") == "owned"  # so a script would be noticed
    for number, payload in enumerate(PAYLOADS):
        hostile(tmp_path / f"{number}", payload)
    report = Report([str(tmp_path / f"{number}") for number in range(len(PAYLOADS))])
    report.write(tmp_path / "out")
    title = title_in_chromium(tmp_path / "out" / "report.html", tmp_path / "profile")
    assert html.unescape(title) == printed(report.title())
