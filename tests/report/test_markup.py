"""What corpora, runs and commands are called is shown as text, never as markup, and no page loads anything."""

import json
import re
from html.parser import HTMLParser

import markdown_it
import nbformat
import pandas as pd
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from benchmarks.union_report import write_union_report
from biomerge_lib.apply import adapter_export
from biomerge_lib.core.composition import compose_parameters
from biomerge_lib.core.markup import INERT, code_in_markdown, escaped, in_markdown
from biomerge_lib.core.records import Record, write_records
from biomerge_lib.decoding.predictions import Prediction, write_predictions
from biomerge_lib.report.page import show_value, write_report
from biomerge_lib.report.published import results_table
from biomerge_lib.report.report_runs import collect_runs, runs_table
from tests.report.test_report import glue, make_run

EVIL = "<img src=x onerror=alert(1)>|`$a$`[b](http://c) *d*"


class Elements(HTMLParser):
    """The elements and addresses of a page."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.loaded, self.handlers = set(), [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.handlers += [name for name, _ in attributes if name.startswith("on")]
        self.loaded += [value for name, value in attributes if name in ("src", "srcset") and tag != "a"]


def rendered(text):
    return markdown_it.MarkdownIt("commonmark").enable("table").render(text)


@pytest.mark.parametrize(
    "text", [EVIL, "a\n\n# b", "_a_ __b__ ~~c~~", r"back\slash", "&amp;", "1 < 2 & 3", "a\u2028b"]
)
def test_a_text_in_markdown_reads_as_it_is(text):
    shown = re.sub(r"<[^>]+>", "", rendered(f"| x |\n|---|\n| {in_markdown(text)} |").split("<tbody>")[1])
    unescaped = shown.replace("&lt;", "<").replace("&gt;", ">").replace("&quot;", '"').replace("&amp;", "&")
    assert unescaped.split() == text.split()


@pytest.mark.parametrize("text", ["echo a", "echo `b`", "a ``` b", "`", "x\n```\n# not a heading"])
def test_code_in_markdown_stays_code(text):
    assert rendered(code_in_markdown(text, block=True)).count("<code") == 1
    assert "<h1>" not in rendered(code_in_markdown(text, block=True))
    line = rendered(f"a {code_in_markdown(text)} b")
    assert line.startswith("<p>a <code>") and line.endswith("</code> b</p>\n")


def test_a_styled_table_has_no_markup_but_its_own():
    table = pd.DataFrame([[EVIL, 0.5]], columns=[EVIL, "share"], index=pd.Index([EVIL], name=EVIL))
    for style in (escaped(table), escaped(table).format(show_value, na_rep="–", escape="html")):
        assert "img" not in Elements(style.to_html()).tags
        assert style.to_html().count("&lt;img src=x onerror=alert(1)&gt;") == 4


def test_the_report_and_its_notebook_pages_are_inert_and_load_nothing(tmp_path):
    name = "<img src=x onerror=alert(1)>"
    folder = make_run(tmp_path, name, 0.73, notebook=False, backbone=name)
    outputs = [
        new_output("display_data", data={"text/html": f"<p>{EVIL}</p><script src='http://a'></script>"})
    ]
    cells = [new_markdown_cell("![x](http://a/b.png) $x^2$"), new_code_cell(f"a = {EVIL!r}", outputs=outputs)]
    nbformat.write(new_notebook(cells=cells), folder / "03_train.ipynb")
    texts = [Prediction(0, EVIL, EVIL, EVIL, [(0, 4)], [], [""], [[]], ["eos"], 0, 0, 0)]
    write_predictions(folder / "predictions-dev-greedy.jsonl", texts)
    page = write_report(tmp_path, tmp_path / "report.html").read_text(encoding="utf-8")
    [path] = (tmp_path / "report_notebooks").rglob("*.html")
    found = Elements(page)
    assert not {"img", "script"} & found.tags and not found.loaded and not found.handlers
    for text in (page, path.read_text(encoding="utf-8")):
        assert INERT in text[:400]  # before anything that could load
        assert "script" not in Elements(text).tags and "@import" not in text
    runs = collect_runs(tmp_path)
    assert "img" not in Elements(escaped(runs_table(runs)).format(show_value, escape="html").to_html()).tags


def test_a_page_shows_the_notebook_that_lies_there_now(tmp_path):
    out = tmp_path / "report.html"
    for number, place in enumerate(("one", "two")):
        folder = make_run(tmp_path / place, "mine", 0.5, notebook=False)
        glue(folder / "03_train.ipynb", {"eval_ner_f1": 0.25 + number})
    write_report(tmp_path / "one", out)
    first = (tmp_path / "report_notebooks/mine/03_train.html").read_text()
    write_report(tmp_path / "two", out)
    assert (tmp_path / "report_notebooks/mine/03_train.html").read_text() != first
    page = write_report([tmp_path / "one", tmp_path / "two"], out).read_text()
    links = re.findall(r'href="(report_notebooks/[^"]+)"', page)
    assert len(set(links)) == 2 and len({(tmp_path / link).read_text() for link in links}) == 2


def test_the_results_table_has_a_row_a_run_whatever_it_is_called(tmp_path):
    name = EVIL.replace("/", "")
    (tmp_path / name).mkdir()
    scores = {f"greedy_dev_ner_f1{end}": 0.5 for end in ("", "_low", "_high")}
    stage = {"status": "finished", "metrics": scores | {"train_seconds": 1.0}, "provenance": {"device": EVIL}}
    parameters = compose_parameters([]).model_dump() | {"backbone": EVIL}
    metrics = {"run_id": name, "parameters": parameters, "stages": {"03_train": stage}}
    (tmp_path / name / "metrics.json").write_text(json.dumps(metrics))
    (tmp_path / name / "03_train.ipynb").touch()
    html = rendered(results_table(tmp_path))
    assert html.count("<td>") == 7
    assert re.findall(r'<a href="([^"]+)"', html) == [
        "%3Cimg%20src%3Dx%20onerror%3Dalert%281%29%3E%7C%60%24a%24%60%5Bb%5D%28http%3Ac%29%20%2Ad%2A/03_train.ipynb"
    ]
    assert "<img" not in html and "<em>" not in html


def test_a_unions_page_takes_nothing_in_corpora_for_markup(tmp_path, tiny_parameters):
    name = EVIL.replace("/", "")
    text = f"Aspirin {EVIL}"
    for corpus, span in ((name, (0, 7)), ("other", (8, 12))):
        for split in ("train", "dev", "test"):
            record = Record(
                text if split == "train" else f"{corpus} {split} text", (span,), f"{corpus}_{split}", corpus
            )
            write_records(tmp_path / corpus / f"{split}.jsonl", [record])
    parameters = tiny_parameters(
        corpora=[str(tmp_path / name), str(tmp_path / "other")], data_dir=str(tmp_path / "data")
    )
    page = write_union_report(parameters, f"echo '{EVIL}\n```\n# no heading'", tmp_path / "union")
    html = rendered(page.read_text(encoding="utf-8"))
    found = Elements(html)
    assert not {"img", "a", "em"} & found.tags and "<h1>no heading" not in html
    assert "[Aspirin] &lt;img src=x onerror=alert(1)&gt;|`$a$`[b](http://c) *d*" in html


def test_a_model_card_takes_no_name_for_markup():
    parameters = compose_parameters([]).model_copy(update={"corpora": [f"x/{EVIL.replace('/', '')}"]})
    training = {"greedy_dev_out_of_text_rate": None, "steps": 1, "train_seconds": 1.0, "best_checkpoint": "c"}
    provenance = {"device": EVIL, "commit": "abc", "python": "3", "versions": {}}
    metrics = {"run_id": EVIL, "stages": {"03_train": {"metrics": training, "provenance": provenance}}}
    card = adapter_export.build_card(EVIL, parameters, metrics, backbone=EVIL, megabytes="1")
    html = rendered(card.split("---\n", 2)[2])
    assert not {"img", "a"} & Elements(html).tags
    assert "export-adapter 'runs/&lt;img src=x onerror=alert(1)&gt;|" in html
