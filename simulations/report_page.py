"""The page of `report.html` as a Jinja template. A Python file, because a Flower app carries no other kind of it."""

__all__ = ["PAGE"]

# ruff: noqa: E501
PAGE = """{% macro drawing(plot, caption, missing="Nothing to draw.") %}
{% if plot %}
<figure{{ ' class="large"' | safe if plot.large }}>
<div class="plot"{{ ' tabindex="0"' | safe if plot.large }} role="img" aria-label="{{ plot.alt }}">{{ plot.svg }}</div>
<figcaption>{{ caption }}{% if plot.note %} {{ plot.note }}{% endif %}</figcaption>
</figure>
{% else %}
<figure><p class="none">{{ missing }}</p><figcaption>{{ caption }}</figcaption></figure>
{% endif %}
{% endmacro %}
{% macro arrow(name) %}
{% if name in lower_is_better %}<span aria-hidden="true" title="lower is better">&nbsp;↓</span><span class="unseen"> (lower is better)</span>{% endif %}
{% endmacro %}
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{{ summary.federation }} - run {{ summary.run_id }}</title>
<style>
:root { color-scheme: light; --ink: #22262b; --soft: #5a626c; --line: #d9dde2; --tint: #f4f6f8; --blue: #0072b2; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: var(--ink); font: 16px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main, header { max-width: 76rem; margin: 0 auto; padding: 0 1.25rem; }
header { padding-top: 2rem; }
h1, h2, h3 { line-height: 1.2; overflow-wrap: anywhere; }
h1 { margin: 0; font-size: 1.75rem; }
h2 { margin: 2.75rem 0 .75rem; padding-top: .75rem; border-top: 2px solid var(--ink); font-size: 1.3rem; }
h3 { margin: 1.5rem 0 .5rem; font-size: 1.05rem; }
p { margin: .5rem 0; max-width: 46rem; overflow-wrap: anywhere; }
code { font-size: .9em; overflow-wrap: anywhere; }
.soft, figcaption, .none { color: var(--soft); }
.status { display: inline-block; margin-right: .6rem; padding: .05rem .6rem; border-radius: 1rem; border: 1px solid; font-size: .9rem; font-weight: 600; }
.finished { color: #00664a; background: #e8f5f0; }
.interrupted { color: #7a4b00; background: #fdf3df; }
.failed { color: #9c2b00; background: #fdebe3; }
.result { margin: 1.25rem 0 .5rem; max-width: 54rem; font-size: 1.35rem; line-height: 1.35; font-weight: 600; }
.callout { margin: 1rem 0; padding: .75rem 1rem; max-width: 54rem; border-left: 5px solid #d55e00; background: #fdf1ea; }
.wide { overflow-x: auto; margin: .5rem 0 .75rem; }
.wide:focus-visible { outline: 2px solid var(--blue); outline-offset: 2px; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .32rem .7rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: bottom; }
td { white-space: nowrap; }
tbody th, tbody td { vertical-align: top; }
thead th { border-bottom: 1.5px solid var(--soft); font-weight: 600; }
thead th[colspan] { border-bottom: 1px solid var(--line); text-align: center; white-space: nowrap; }
th:first-child, td.text, th.text { text-align: left; }
tbody th { min-width: 7rem; max-width: 18rem; font-weight: 400; overflow-wrap: anywhere; }
tbody tr.federated { background: #eaf3f9; }
tbody tr.federated th { font-weight: 600; }
.wide tr > th:first-child { position: sticky; left: 0; background: #fff; }
.wide tr.federated > th:first-child { background: #eaf3f9; }
td.best { font-weight: 700; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 25rem), 1fr)); gap: 1.25rem 2rem; align-items: start; }
figure { margin: 0; min-width: 0; }
figure.large { grid-column: 1 / -1; }
figcaption { max-width: 46rem; font-size: .9rem; }
.plot { overflow-x: auto; }
.plot svg { display: block; width: 100%; max-width: 34rem; height: auto; }
.large .plot svg { width: auto; max-width: 100%; }
.plot svg * { stroke-linejoin: round; stroke-linecap: butt; }
.plot svg text { font-family: system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif !important; }
.none { padding: 2rem 1rem; background: var(--tint); text-align: center; max-width: none; }
dl { display: grid; grid-template-columns: minmax(8rem, max-content) minmax(0, 1fr); gap: .25rem 1.25rem; margin: .75rem 0; font-size: .95rem; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
details { margin-top: .75rem; }
#sites .wide { margin-bottom: 0; }
#sites .plots + p { margin-top: 1.5rem; }
summary { cursor: pointer; color: var(--blue); }
footer { max-width: 76rem; margin: 3rem auto 2rem; padding: 0 1.25rem; color: var(--soft); font-size: .9rem; }
.unseen { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }
@media (max-width: 40rem) {
  body { font-size: 15px; }
  .result { font-size: 1.15rem; }
  table { font-size: .82rem; }
  th, td { padding: .3rem .4rem; }
  tbody th { min-width: 5.5rem; }
  .large .plot svg { width: auto; max-width: none; }
}
@media print {
  body { font-size: 10pt; }
  h2, h3 { break-after: avoid; }
  figure, tr, .callout { break-inside: avoid; }
  .wide, .plot { overflow: visible; }
  .plots { grid-template-columns: 1fr 1fr; }
  table { font-size: 8pt; }
  th, td { padding: .2rem .35rem; }
  * { print-color-adjust: exact; }
}
</style>
</head>
<body>
<header>
<h1>{{ summary.federation }}</h1>
{% if summary.description %}
<p>{{ summary.description }}</p>
{% endif %}
<p><span class="status {{ summary.status }}">{{ summary.status }}</span><span class="soft">run <code>{{ summary.run_id }}</code></span></p>
{% if summary.reason %}
<p class="callout">{{ summary.reason }}</p>
{% endif %}
<p class="{{ "callout" if unsafe or not summary.secure_sum else "private" }}">{{ privacy }} {{ secure }}</p>
{% if utility %}<p>{{ utility }} <a href="{{ summary.compared.run }}/report.html">Its report.</a></p>{% endif %}
<p class="result">{{ result }}</p>
{% if table %}
<p class="soft">
{%- if summary.seeds == 1 %}One seed stands behind these figures; with another seed they would differ somewhat.
{%- else %}{{ summary.seeds }} seeds stand behind these figures.{% endif -%}
</p>
{% endif %}
{% if summary.status == "finished" %}
<p>The result{% if summary.rounds %}, the adapter of round {{ summary.selected_round }},{% endif %} is in the folder <code>adapter/</code> of the run folder, where this page is too.</p>
{% endif %}
</header>
<main>

<section id="comparison" aria-labelledby="comparison-title">
<h2 id="comparison-title">Compared on the same test set</h2>
{% if table %}
<p class="soft">The best value of each column is bold; an arrow ↓ marks figures where lower is better.</p>
<div class="wide" tabindex="0" role="region" aria-label="Comparison table">
<table>
<thead><tr><th scope="col">training</th>
{% for name in summary.metrics %}<th scope="col">{{ name | metric }}{{ arrow(name) }}</th>{% endfor %}
<th scope="col">examples seen</th></tr></thead>
<tbody>
{% for line in table %}
<tr{{ ' class="federated"' | safe if line.row.name == "federated" }}><th scope="row">{{ line.row.name }}</th>
{% for text, best in line.cells %}<td{{ ' class="best"' | safe if best }}>{{ text }}</td>{% endfor %}
<td>{{ line.row.examples_seen | count }}</td></tr>
{% endfor %}
</tbody>
</table>
</div>
{% if table | length == 1 %}
<p class="soft">Baselines were not measured in this run.</p>
{% endif %}
{% else %}
<p class="none">Nothing was measured on the test set.</p>
{% endif %}
</section>

<section id="learning" aria-labelledby="learning-title">
<h2 id="learning-title">Learning over the rounds</h2>
{% if rejected %}
<p class="callout" role="note">Rejected, so that the adapter stayed as it was: {% for facts in rejected %}round {{ facts.round }} ({{ facts.rejected }}){{ ", " if not loop.last else "." }}{% endfor %}</p>
{% endif %}
{% if summary.overfitting %}
<p class="callout" role="note">{{ summary.overfitting }}</p>
{% endif %}
<div class="plots">
{{ drawing(plots.loss, "Loss on the sites' training records and on " ~ summary.measured_on ~ ". Round 0 is the first adapter, before any training.", "No loss is known.") }}
{% if chooser != "loss" %}
{{ drawing(plots.metric, "The metric that chooses between rounds, " ~ chooser | metric ~ ", on " ~ summary.measured_on ~ ("; lower is better." if chooser in lower_is_better else "."), "No validation figures are known.") }}
{% endif %}
</div>
{% if rounds %}
<details>
<summary>Figures of every round</summary>
<div class="wide" tabindex="0" role="region" aria-label="Table of rounds">
<table>
<thead>
<tr><td></td><td></td><th scope="colgroup" colspan="{{ summary.metrics | length or 1 }}">on held-out records</th><td colspan="4"></td></tr>
<tr><th scope="col">round</th><th scope="col">train loss</th>
{% for name in summary.metrics %}<th scope="col">{{ name | metric }}{{ arrow(name) }}</th>{% else %}<td></td>{% endfor %}
<th scope="col">sites</th><th scope="col">sat out</th><th scope="col">bytes</th><th scope="col">time</th></tr>
</thead>
<tbody>
{% for facts in rounds %}
<tr><th scope="row">{{ facts.round }}{{ " (selected)" if facts.round == summary.selected_round }}{{ " (rejected)" if facts.rejected }}</th><td>{{ facts.train_loss | figure }}</td>
{% for name in summary.metrics %}<td>{{ facts.validation.get(name) | figure }}</td>{% else %}<td></td>{% endfor %}
<td>{{ facts.answered }}</td><td>{{ facts.failed }}</td><td>{{ (facts.bytes_up + facts.bytes_down) | size }}</td><td>{{ facts.seconds | duration }}</td></tr>
{% endfor %}
</tbody>
</table>
</div>
{% if summary.rounds | length > most_rows %}
<p class="soft">The first {{ most_rows }} of {{ summary.rounds | length }} rounds; <code>summary.json</code> has all.</p>
{% endif %}
</details>
{% endif %}
</section>

{% if summary.secure_sum %}
<section id="secure-sum" aria-labelledby="secure-sum-title">
<h2 id="secure-sum-title">Secure sum</h2>
<p>What the sites sent was masked; {{ summary.secure_sum.sums | count }} sums were opened{% if summary.secure_sum.fewest is not none %}, each over {{ summary.secure_sum.fewest | count }} sites or more{% endif %}. A sum needs {{ summary.secure_sum.least_survivors | count }} of {{ summary.secure_sum.sites | count }} sites, and {{ summary.secure_sum.threshold | count }} signatures under one list of them before anything is revealed{% if summary.secure_sum.max_colluding %}; {{ summary.secure_sum.max_colluding | count }} sites may work together with the coordinator{% endif %}. A value takes {{ summary.secure_sum.bits }} bits and {{ "%.2f" | format(summary.secure_sum.bytes_per_value) }} bytes on the wire. Figures of single sites on this page are known to the simulation, which plays the sites; a coordinator would not have them.</p>
</section>
{% endif %}
{% if summary.privacy %}
<section id="privacy" aria-labelledby="privacy-title">
<h2 id="privacy-title">Privacy</h2>
<p>Protected is each {{ summary.privacy.unit }} at each site. A {{ summary.privacy.unit }} with records at several sites pays at each of them, and the sums add. The bound covers everything that left a site in this run: the changes of the adapter. No other figure that is computed from records left one; the counts of units are public and rounded. The comparison's rows for local and centralised training were trained without privacy.</p>
<div class="wide" tabindex="0" role="region" aria-label="Privacy of each site">
<table>
<thead><tr><th scope="col">site</th><th scope="col">published units</th><th scope="col">epsilon</th><th scope="col">epsilon, tighter bound</th><th scope="col">noise over clip</th><th scope="col">sampling rate</th><th scope="col">steps charged</th></tr></thead>
<tbody>
{% for site in private_sites %}
<tr><th scope="row">{{ site.name }}</th><td>{{ site.units | count }}</td><td>{{ site.epsilon | figure }}</td><td>{{ site.epsilon_prv | figure }}</td><td>{{ site.noise_multiplier | figure }}</td><td>{{ site.sampling_rate | figure }}</td><td>{{ site.steps | count }}</td></tr>
{% endfor %}
</tbody>
</table>
</div>
{% if left_out %}<p class="soft">{{ left_out }}</p>{% endif %}
<p class="soft">Epsilon by Rényi differential privacy enforces the budget; the tighter bound is by privacy loss random variables. Allowed were epsilon {{ summary.privacy.epsilon | figure }} and delta {{ "%.1e" | format(summary.privacy.delta) }}; gradients were clipped to {{ summary.privacy.clip | figure }}. These ledgers are simulated: a real site would have paid this from its one account.</p>
</section>
{% endif %}

<section id="sites" aria-labelledby="sites-title">
<h2 id="sites-title">Sites</h2>
{% if sites %}
<div class="plots">
{{ drawing(plots.sites, "By site: " ~ chooser | metric ~ "." ~ (" Both bars of a site are measured on its own held-out records." if local_known else ""), "No figures by site are known.") }}
{{ drawing(plots.site_losses, "Training loss of each site; gaps are rounds that it sat out or was not invited to.", "No training loss by site is known.") }}
</div>
<p class="soft">Held-out figures are of round {{ summary.selected_round }}, or of the last round that is known.</p>
<div class="wide" tabindex="0" role="region" aria-label="Table of sites">
<table>
<thead>
<tr><td></td><td colspan="7"></td>
{% if summary.metrics %}
<th scope="colgroup" colspan="{{ summary.metrics | length }}">federated, on held-out records</th>
{% if local_known %}<th scope="colgroup" colspan="{{ summary.metrics | length }}">alone, on the test set</th>{% endif %}
{% endif %}
</tr>
<tr><th scope="col">site</th><th scope="col">records</th><th scope="col">held out</th><th scope="col">units</th><th scope="col">training time</th><th scope="col">bytes up</th><th scope="col">bytes down</th><th scope="col">last train loss</th>
{% for _ in range(2 if local_known else 1) %}
{% for name in summary.metrics %}<th scope="col">{{ name | metric }}{{ arrow(name) }}</th>{% endfor %}
{% endfor %}
</tr>
</thead>
<tbody>
{% for site in sites %}
<tr><th scope="row">{{ site.facts.name }}</th><td>{{ site.facts.records | count }}</td><td>{{ site.facts.held_out | count }}</td><td>{{ site.facts.units | count }}</td><td>{{ site.facts.seconds | duration }}</td><td>{{ site.facts.bytes_up | size }}</td><td>{{ site.facts.bytes_down | size }}</td><td>{{ site.train_loss | figure }}</td>
{% for name in summary.metrics %}<td>{{ site.validation.get(name) | figure }}</td>{% endfor %}
{% if local_known %}
{% for name in summary.metrics %}<td>{{ site.local.get(name) | figure }}</td>{% endfor %}
{% endif %}
</tr>
{% endfor %}
</tbody>
</table>
</div>
{% if left_out %}<p class="soft">{{ left_out }}</p>{% endif %}
{% else %}
<p class="none">No site is known.</p>
{% endif %}
</section>

<section id="labels" aria-labelledby="labels-title">
<h2 id="labels-title">Who holds what</h2>
<div class="plots">
{% if plots.labels %}
{{ drawing(plots.labels, "Each row is a site with its number of training records; the shares of a row add up to one.") }}
{% else %}
{{ drawing(plots.records, "Training records of each site.", "No site is known.") }}
{% endif %}
</div>
</section>

<section id="cost" aria-labelledby="cost-title">
<h2 id="cost-title">Traffic and time</h2>
<p>{{ bytes_up | size }} went up from the sites and {{ bytes_down | size }} down to them. {{ cost }}</p>
{% if summary.memory and (summary.memory.halvings or summary.memory.closed_slots) %}
<p class="callout" role="note">Memory ran out. A step that it ran out in was computed again over the same records, fewer at once: batch, noise and what was charged for it stayed the same. {% for each in summary.memory.halvings %}Round {{ each.round }}, {{ each.site }}: {{ each.after | count }} records at once instead of {{ each.before | count }}. {% endfor %}{% for each in summary.memory.closed_slots %}Round {{ each.round }}, {{ each.site }}: memory ran out again; at most {{ each.left | count }} {{ "worker" if each.left == 1 else "workers" }} at once on {{ each.device }} from then on. {% endfor %}</p>
{% endif %}
<div class="plots">
{{ drawing(plots.traffic, "Bytes of encoded messages in each round, all sites together.", "No round was finished.") }}
{{ drawing(plots.time, "Wall time by part of the run. Training is the time of each round's slowest site; waiting is the rest of the rounds: sending, combining, measuring, and sites that take turns on the same cores.", "No time was measured.") }}
</div>
{% if summary.profile %}<p>{{ profile }}</p>{% endif %}
</section>

<section id="data" aria-labelledby="data-title">
<h2 id="data-title">Data</h2>
{% if splits %}
<p class="soft">As read and split. A unit is what stays together: a person, a matter, a document.</p>
<div class="wide" tabindex="0" role="region" aria-label="Table of splits">
<table>
<thead><tr><th scope="col">split</th><th scope="col">records</th><th scope="col">units</th><th scope="col">cut to the longest input</th><th scope="col">share cut</th></tr></thead>
<tbody>
{% for split in splits %}
{% set records = summary.data.records[split] %}
{% set cut = summary.data.truncated.get(split, 0) %}
<tr><th scope="row">{{ split }}</th><td>{{ records | count }}</td><td>{{ summary.data.units.get(split, 0) | count }}</td><td>{{ cut | count }}</td><td>{{ cut | share(records) }}</td></tr>
{% endfor %}
</tbody>
</table>
</div>
{% endif %}
<h3>Records that cleaning changed or left out, and how sites were dealt theirs</h3>
<dl>
<dt>aggregation</dt><dd><code>{{ summary.aggregation }}</code></dd>
<dt>partitioner</dt><dd><code>{{ summary.data.partitioner }}</code></dd>
<dt>Unicode normalised</dt><dd>{{ summary.data.cleaning.normalised | count }}</dd>
<dt>control characters removed</dt><dd>{{ summary.data.cleaning.control_characters | count }}</dd>
<dt>duplicates left out</dt><dd>{{ summary.data.cleaning.duplicates | count }}</dd>
<dt>empty, left out</dt><dd>{{ summary.data.cleaning.empty | count }}</dd>
</dl>
</section>

<section id="failures" aria-labelledby="failures-title">
<h2 id="failures-title">Sites that sat out</h2>
{% if failures %}
<div class="wide" tabindex="0" role="region" aria-label="Table of failures">
<table>
<thead><tr><th scope="col">site</th><th scope="col">round</th><th scope="col" class="text">code</th></tr></thead>
<tbody>
{% for failure in failures %}
<tr><th scope="row">{{ failure.site }}</th><td>{{ failure.round }}</td><td class="text"><code>{{ failure.code }}</code></td></tr>
{% endfor %}
</tbody>
</table>
</div>
{% if summary.failures | length > most_rows %}
<p class="soft">The first {{ most_rows }} of {{ summary.failures | length }}; <code>summary.json</code> has all.</p>
{% endif %}
{% else %}
<p>None: every site answered in every round that was finished.</p>
{% endif %}
</section>

<section id="setting" aria-labelledby="setting-title">
<h2 id="setting-title">Model, machine and manifest</h2>
<dl>
<dt>task</dt><dd>{{ summary.task }}</dd>
<dt>base model</dt><dd>{{ summary.model.name }}</dd>
<dt>revision</dt><dd>{% if summary.model.revision %}<code>{{ summary.model.revision }}</code>{% else %}local directory{% endif %}</dd>
<dt>weights, SHA-256</dt><dd><code>{{ summary.model.weights_sha256 }}</code></dd>
<dt>parameters</dt><dd>{{ summary.model.parameters | count }}</dd>
<dt>trained and sent</dt><dd>{{ summary.model.trainable_parameters | count }} ({{ summary.model.trainable_parameters | share(summary.model.parameters) }})</dd>
<dt>precision</dt><dd>{{ summary.model.precision }}</dd>
<dt>machine</dt><dd>{{ summary.machine.cores }} cores, {{ "%.1f" | format(summary.machine.memory_gib) }} GiB of memory, {{ summary.machine.devices | join(", ") or "no accelerator" }}</dd>
<dt>workers</dt><dd>{{ summary.machine.workers }}, each with {{ summary.machine.threads_per_worker }} threads</dd>
{% if summary.memory %}
{% for device in summary.memory.devices %}
<dt>memory</dt><dd>{{ device.name }}{{ " (emulated: its workers computed on the CPU)" if device.emulated }}: {{ device.workers | count }} {{ "worker" if device.workers == 1 else "workers" }}, {{ device.records | count }} records at once; {{ device.planned | size }} planned for each ({{ "measured before the run" if summary.memory.measured else "by formula" }}){% if device.used is not none %}, {{ device.used | size }} used at most{% endif %}; {{ device.free | size }} were free</dd>
{% endfor %}
{% for note in summary.memory.notes %}
<dt>note</dt><dd>{{ note }}</dd>
{% endfor %}
{% endif %}
<dt>software</dt><dd>Python {{ summary.machine.python }}, torch {{ summary.machine.torch }}</dd>
<dt>manifest, SHA-256</dt><dd><code>{{ summary.manifest_sha256 }}</code></dd>
</dl>
</section>
</main>
<footer>All figures of this page are in <code>summary.json</code> beside it.</footer>
</body>
</html>
"""
