"""The report page: whole, self-contained, escaped, and there for every run however it ended."""

import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from summary_samples import sample, table

from simulations import plots
from simulations.report import (
    cost_result,
    main_result,
    privacy_result,
    render,
    secure_sum_result,
    utility_result,
    write_report,
)
from simulations.summary import (
    ClosedSlot,
    ComparedFacts,
    DeviceFacts,
    Failure,
    Halving,
    MemoryFacts,
    PrivacyFacts,
    ResourceFacts,
    RunSummary,
    SitePrivacy,
    TableRow,
)

VOID = {"meta", "br", "img", "link", "input", "hr"}
SECTIONS = ["comparison", "learning", "sites", "labels", "cost", "data", "failures", "setting"]


ODD_NAMES = (
    "<script>alert(1)</script>",
    '"><b id="plot-loss-figure_1">&amp;',
    "$\\frac{a$ & b_{",
    "Krankenhaus München “Süd” 東京都立病院 مستشفى",
    "x" * 64,
    "病院" * 32,
    "line\nbreak\x1b[31m\x08",
    "{{ summary }}{% if",
    'id="a" href="#b" url(#c)',
)


class Page(HTMLParser):
    """A parsed page: its ids, attributes and text; `open` is empty if every element was closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.note(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.note(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.words.append(data)

    def note(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.ids += [value or "" for name, value in attrs if name == "id"]
        self.attributes += [(name, value or "") for name, value in attrs]


def page(summary: RunSummary) -> Page:
    parsed = Page(render(summary))
    assert parsed.open == []
    assert len(parsed.ids) == len(set(parsed.ids))
    return parsed


@pytest.fixture(scope="module")
def html() -> str:
    """The page of the usual sample."""
    return render(sample())


def with_figures(summary: RunSummary, value: float) -> RunSummary:
    """`summary` with `value` in place of every figure that a model has measured."""

    def changed(figures: dict[str, float] | None) -> dict[str, float] | None:
        return None if figures is None else dict.fromkeys(figures, value)

    return summary.model_copy(
        update={
            "rounds": [
                facts.model_copy(update={"train_loss": value, "validation": changed(facts.validation)})
                for facts in summary.rounds
            ],
            "table": [row.model_copy(update={"figures": changed(row.figures)}) for row in summary.table],
            "sites": [
                site.model_copy(
                    update={
                        "train_loss": [value] * len(site.train_loss),
                        "validation": [changed(figures) for figures in site.validation],
                        "local_only": changed(site.local_only),
                    }
                )
                for site in summary.sites
            ],
        }
    )


def test_a_page_has_every_section_in_order_and_its_facts() -> None:
    parsed = page(sample(overfitting="Validation loss rose from round 3 on."))
    assert [name for name in parsed.ids if name in SECTIONS] == SECTIONS
    for text in [
        "city-hospitals",
        "run 20260301-101500-a1b2",
        "Federated training reached accuracy 0.910 on the test set",
        "One seed",
        "adapter/",
        "local only (best site)",
        "Validation loss rose from round 3 on.",
        "hospital-6",
        "37.2 MB went up from the sites and 44.6 MB down",
        "310 3.1%",
        "hospital-3 2 timeout",
        "309,520 (1.4%)",
        "53" * 32,
        "ab" * 32,
        "Python 3.11.9, torch 2.13.0",
    ]:
        assert text in parsed.text
    assert parsed.tags.count("svg") == 7
    assert len([value for name, value in parsed.attributes if name == "aria-label" and len(value) > 20]) >= 7


def test_a_page_loads_nothing(html: str) -> None:
    parsed = Page(html)
    assert not {"script", "link", "img", "image", "iframe", "object", "embed"} & set(parsed.tags)
    for name, value in parsed.attributes:
        if name in {"src", "href", "xlink:href", "action", "srcset"}:
            assert value.startswith("#")
        assert not value.startswith(("http:", "https:", "//", "data:"))
    assert not re.search(r"@import|url\((?!#)|https?://", html)


def test_references_inside_a_plot_lead_to_an_id_of_the_page(html: str) -> None:
    parsed = Page(html)
    used = re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', html)
    assert used
    assert {first or second for first, second in used} <= set(parsed.ids)


def test_the_page_is_written_whole_and_is_the_same_again(html: str, tmp_path: Path) -> None:
    write_report(sample(), tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == html
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_rejected_rounds_are_named(html: str) -> None:
    summary = sample()
    rounds = [
        facts.model_copy(update={"rejected": "accept_drop: 0.3 is above 0.1"} if facts.round in (2, 3) else {})
        for facts in summary.rounds
    ]
    page = render(summary.model_copy(update={"rounds": rounds, "aggregation": "alternate"}))
    reason = "accept_drop: 0.3 is above 0.1"
    assert f"round 2 ({reason}), round 3 ({reason})." in page
    assert "3 (rejected)" in page
    assert "<code>alternate</code>" in page
    assert "rejected" not in html.lower().replace("projected", "")


def test_names_are_escaped_and_fit() -> None:
    summary = sample(sites=len(ODD_NAMES), labels=len(ODD_NAMES))
    sites = [
        site.model_copy(update={"name": name, "labels": dict.fromkeys(ODD_NAMES, 5)})
        for site, name in zip(summary.sites, ODD_NAMES, strict=True)
    ]
    failures = [Failure(round=1, site=name, code="timeout") for name in ODD_NAMES]
    texts = dict.fromkeys(("federation", "description", "reason", "overfitting", "run_id"), " ".join(ODD_NAMES))
    parsed = page(summary.model_copy(update={"sites": sites, "failures": failures, **texts}))
    assert not {"script", "b"} & set(parsed.tags)
    # Plots shorten names; tables have the whole name, as text.
    for name in ODD_NAMES:
        assert parsed.words.count(name) >= 2


def test_a_name_in_a_plot_is_text_and_not_changed() -> None:
    name = 'url(#c) id="a"'
    plot = plots.records_bars([sample(rounds=0).sites[0].model_copy(update={"name": name})])
    assert plot is not None
    assert name in plot.svg


@pytest.mark.parametrize(
    ("sites", "task"), [(1, "text-classification"), (2, "token-classification"), (50, "causal-lm")]
)
def test_any_number_of_sites_and_any_task(sites: int, task: str) -> None:
    parsed = page(sample(sites=sites, task=task, rounds=2, labels=4))
    assert f"hospital-{sites}" in parsed.text
    assert ("Only the 40 sites with the most records of 50 are drawn." in parsed.text) == (sites > 40)
    assert ("share of the site's labels" in parsed.text) == (task != "causal-lm")


def test_many_labels_and_many_rounds_are_cut_and_said() -> None:
    failures = [{"round": 1, "site": "hospital-1", "code": "timeout"}] * 300
    parsed = page(sample(labels=60, rounds=250, failures=failures))
    assert "Only the 40 most frequent labels of 60 are drawn." in parsed.text
    assert "The first 200 of 251 rounds" in parsed.text
    assert "The first 200 of 300;" in parsed.text


@pytest.mark.parametrize("value", [math.nan, -math.inf, 0.0, 1e12])
def test_any_figure_can_be_shown(value: float) -> None:
    # As it comes back from summary.json, where NaN and infinity are strings.
    page(RunSummary.model_validate_json(with_figures(sample(), value).model_dump_json()))


def test_a_run_that_ended_before_round_zero() -> None:
    parsed = page(
        sample(rounds=-1, table=[], status="interrupted", reason="stopped by Ctrl-C", timing=dict.fromkeys(TIMES, 0.0))
    )
    assert "interrupted" in parsed.text
    assert "stopped by Ctrl-C" in parsed.text
    assert "The run ended before its first round of training was finished: there is no result." in parsed.text
    assert "Nothing was measured on the test set." in parsed.text
    assert "One seed" not in parsed.text
    assert "adapter/" not in parsed.text


def test_a_run_with_nothing_at_all() -> None:
    parsed = page(sample(sites=0, rounds=-1, table=[], metrics=[], status="failed", reason="no worker started"))
    assert "No site is known." in parsed.text
    assert "No metric was reported." in parsed.text


def test_sites_without_records() -> None:
    summary = sample()
    empty = {"records": 0, "held_out": 0, "units": 0, "labels": dict.fromkeys(summary.sites[0].labels, 0)}
    sites = [
        site.model_copy(update={**empty, "train_loss": [], "validation": [], "local_only": None})
        for site in summary.sites
    ]
    data = {**summary.data.model_dump(), "records": {"train": 0, "test": 0}, "units": {}, "truncated": {}}
    page(sample(sites=0, data=data).model_copy(update={"sites": sites}))
    assert plots.records_bars(sites) is not None


def test_a_run_without_baselines_says_so() -> None:
    parsed = page(sample(baselines=False))
    assert "Baselines were not measured in this run." in parsed.text
    assert "alone, on the test set" not in parsed.text
    assert "Both bars of a site" not in parsed.text


def test_the_best_of_each_column_is_bold(html: str) -> None:
    assert re.findall(r'<td class="best">([^<]+)</td>', html) == ["0.930", "0.930", "0.340"]
    assert "(lower is better)" in html


def test_a_custom_metric_is_named_by_its_function() -> None:
    metrics = ("clinic.scores:cost_of_errors",)
    parsed = page(sample(metrics=list(metrics), table=table(metrics)))
    assert "cost of errors 0.910" in parsed.text
    assert "clinic.scores" not in parsed.text


TIMES = ["startup", "rounds", "validation", "baselines", "test", "total"]


def test_the_main_result_compares_in_points() -> None:
    assert main_result(sample()) == (
        "Federated training reached accuracy 0.910 on the test set:"
        " 21.0 points above the mean site alone and 2.0 points below centralised training."
    )


def test_the_main_result_says_what_lower_means() -> None:
    assert main_result(sample(task="causal-lm")) == (
        "Federated training reached bits per byte 0.380 on the test set:"
        " 0.420 lower (better) than the mean site alone and 0.040 higher (worse) than centralised training."
    )


def test_the_main_result_of_equals_and_of_missing_rows() -> None:
    rows = {row.name: row for row in table(("accuracy",))}
    same = rows["centralised"].model_copy(update={"figures": {"accuracy": 0.91}})
    assert main_result(sample(table=[rows["federated"], same])).endswith(": level with centralised training.")
    assert main_result(sample(table=[rows["federated"]])).endswith("accuracy 0.910 on the test set.")
    unknown = rows["centralised"].model_copy(update={"figures": {"accuracy": math.nan}})
    assert main_result(sample(table=[rows["federated"], unknown])).endswith("accuracy 0.910 on the test set.")


def test_the_main_result_without_a_test() -> None:
    summary = sample(table=[], rounds=3)
    assert main_result(summary).startswith("The adapter of round 3 reached accuracy 0.814 on the sites' held-out")
    assert main_result(sample(table=[], rounds=0)).startswith("The run ended before its first round")
    blind = [facts.model_copy(update={"validation": {}}) for facts in summary.rounds]
    assert main_result(summary.model_copy(update={"rounds": blind})) == (
        "3 rounds of training were finished; no accuracy on the test set is known."
    )


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("hospital-1", "hospital-1"),
        ("a-name-of-22-columns-ok!", "a-name-of-22-c…mns-ok!"),
        ("病" * 12, "病病病病病病病…病病病"),
        ("a\x1bb", "a\N{REPLACEMENT CHARACTER}b"),
    ],
)
def test_long_names_lose_their_middle(name: str, short: str) -> None:
    assert plots.shorten(name) == short


def test_a_site_is_shown_at_the_selected_round_or_the_last_known() -> None:
    site = sample(rounds=3).sites[0]
    assert plots.site_validation(site, 1) == site.validation[1]
    gone = site.model_copy(update={"validation": [*site.validation[:2], None, None]})
    assert plots.site_validation(gone, 3) == site.validation[1]
    assert plots.site_validation(gone.model_copy(update={"validation": []}), 3) is None


def private_facts(*, protects: bool = True) -> PrivacyFacts:
    sites = [
        SitePrivacy(
            name=f"<b>site {number}</b>",
            units=1100,
            noise_multiplier=0.873,
            sampling_rate=0.0145,
            steps=160,
            epsilon=7.25 + number / 4,
            epsilon_prv=6.5,
        )
        for number in (1, 2)
    ]
    return PrivacyFacts(unit="patient", epsilon=8.0, delta=1e-5, clip=1.0, protects=protects, sites=sites)


def test_the_first_line_says_whether_the_adapter_is_private() -> None:
    assert privacy_result(sample()) == "The released adapter is not private: it may give single records away."
    said = "The released adapter is private: epsilon at most 7.750 at delta 1e-05 for each patient and site, over all"
    private = sample(privacy=private_facts())
    assert privacy_result(private).startswith(said)
    for summary in (sample(), private, sample(privacy=private_facts(protects=False))):
        page = render(summary)
        header = page.split("<header>")[1].split("</header>")[0]
        assert privacy_result(summary) in header
        assert header.index(privacy_result(summary)) < header.index('class="result"')


def test_the_first_line_says_what_the_coordinator_could_learn() -> None:
    on = sample(sites=6)
    assert secure_sum_result(on) == (
        "The coordinator learns sums over at least 5 of 6 sites, and nothing of a single one."
    )
    off = sample(secure_sum=None)
    assert secure_sum_result(off) == "The secure sum is off: the coordinator sees every site's change."
    for summary in (on, off):
        first = render(summary).split("<header>")[1].split("</header>")[0].split('class="result"')[0]
        assert f"{privacy_result(summary)} {secure_sum_result(summary)}".replace("'", "&#39;") in first
    assert '<p class="callout">The released adapter' in render(off)
    section = render(on).split('<section id="secure-sum"')[1].split("</section>")[0]
    for text in ("6 sums were opened, each over 6 sites or more", "5 of 6 sites", "16 bits and 2.67 bytes"):
        assert text in section
    assert '<section id="secure-sum"' not in render(off)


def test_known_noise_is_a_warning() -> None:
    page = render(sample(privacy=private_facts(protects=False)))
    assert '<p class="callout">The released adapter is not private: privacy.unsafe_seed' in page
    assert '<p class="callout">The released adapter' not in render(sample(privacy=private_facts()))


def test_what_each_site_paid_is_in_the_page_and_names_are_escaped() -> None:
    page = render(sample(privacy=private_facts()))
    section = page.split('<section id="privacy"')[1].split("</section>")[0]
    assert "Protected is each patient at each site" in section
    for text in ("&lt;b&gt;site 1&lt;/b&gt;", "1,100", "7.500", "7.750", "0.873", "160", "1.0e-05"):
        assert text in section
    assert "<b>" not in section
    assert '<section id="privacy"' not in render(sample())


def compared(mine: PrivacyFacts | None, other: PrivacyFacts | None, name: str) -> RunSummary:
    row = TableRow.model_validate({"name": name, "figures": {"accuracy": 0.7}, "examples_seen": 9})
    facts = ComparedFacts(run="compared", settings=["training.rounds=3", "adapter.rank=2"], privacy=other)
    return sample(privacy=mine, compared=facts, table=[*sample().table, row])


@pytest.mark.parametrize(
    ("mine", "other", "name", "words"),
    [
        (False, True, "federated, private", "privacy (epsilon 8 for each patient and site)"),
        (True, False, "federated, not private", "no privacy"),
        (False, False, "federated, compared", "training.rounds=3, adapter.rank=2"),
    ],
)
def test_the_second_federation_is_told_beside_the_first(mine: bool, other: bool, name: str, words: str) -> None:
    summary = compared(private_facts() if mine else None, private_facts() if other else None, name)
    said = utility_result(summary)
    assert said.startswith(f"The same federation with {words} reached accuracy 0.700: ")
    assert said.endswith("points below the released.")
    page = render(summary)
    assert said in page.split("<header>")[1].split("</header>")[0]
    assert '<a href="compared/report.html">' in page
    assert utility_result(sample()) == ""


def test_of_very_many_sites_the_slowest_and_the_worst_are_shown() -> None:
    summary = sample(sites=300, rounds=2, labels=3)
    metric = summary.metrics[0]
    changed = []
    for place, site in enumerate(summary.sites):
        figures = [
            {**each, metric: 0.1 if place in range(150, 155) else 0.9} if each else each for each in site.validation
        ]
        seconds = 100.0 if place in range(20, 30) else 1.0
        changed.append(site.model_copy(update={"validation": figures, "seconds": seconds}))
    html = render(summary.model_copy(update={"sites": changed}))
    assert "Shown are 20 of 300 sites, the slowest and those with the worst accuracy" in html
    assert "summary.json has the other 280 too." in html
    rows = html.split('<section id="sites"')[1].split("</section>")[0]
    assert rows.count('<th scope="row">') == 20
    for place in (*range(20, 30), *range(150, 155)):
        assert f'<th scope="row">{changed[place].name}</th>' in rows
    assert "Shown are" not in page(sample(sites=50, rounds=1)).text


def test_where_the_workers_computed_and_what_they_used_is_told() -> None:
    device = DeviceFacts(
        name="emulated GPU 0 (8 GiB)",
        emulated=True,
        free=8 << 30,
        workers=2,
        records=4,
        planned=3_000_000_000,
        used=None,
    )
    memory = MemoryFacts(
        measured=True,
        devices=[device, device.model_copy(update={"name": "GPU <1>", "emulated": False, "used": 2_900_000_000})],
        notes=["GPU 2 is left out"],
        halvings=[Halving(round=2, site="<b>west", before=8, after=4)],
        closed_slots=[ClosedSlot(round=3, site="west", device="GPU <1>", left=1)],
    )
    resources = ResourceFacts(processors=0.874, memory=3_100_000_000, gpus=[0.5], gpu_memory=[2_900_000_000])
    summary = sample().model_copy(update={"memory": memory, "resources": resources})
    text = " ".join(page(summary).text.split())
    assert "emulated GPU 0 (8 GiB) (emulated: its workers computed on the CPU): 2 workers, 4 records at once" in text
    assert "3.0 GB planned for each (measured before the run), 2.9 GB used at most; 8.6 GB were free" in text
    assert "GPU 2 is left out" in text
    assert "Round 2, <b>west: 4 records at once instead of 8." in text
    assert "Round 3, west: memory ran out again; at most 1 worker at once on GPU <1> from then on." in text
    said = cost_result(summary)
    assert said.endswith(
        "Its processors were 87% busy, its processes held at most 3.1 GB; GPU 0 was 50% busy and held at most 2.9 GB."
    )
    assert said in text
    assert "Memory ran out" not in page(sample()).text
    assert cost_result(sample()).startswith("The run took 2 m 40 s (start-up 8.2 s, rounds ")
