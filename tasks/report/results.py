"""The sections of the page that show results: pictures, metrics, throughput, stages.

Every value that comes from a run is escaped where it is written.
"""

from html import escape

from tasks.report.aggregates import Metric, Pair
from tasks.report.charts import Axis, Marker, bars, stacked
from tasks.report.data import ReportData
from tasks.report.pictures import data_uri, is_pixelated
from tasks.report.words import counted, duration, number, table, time_unit

HEADROOM = 1.12
"""Height of a chart over its tallest bar, so that the texts of markers stand above the bars."""
METRIC_NOTES = {
    "mse": "mean squared error on the [-1, 1] scale; smaller is better",
    "psnr": "peak signal to noise ratio, dB, peak 2.0; larger is better",
    "ssim": "structural similarity, at most 1; larger is better",
    "ms_ssim": "multi-scale structural similarity, at most 1; larger is better",
    "identity": "cosine similarity of face embeddings; larger is better",
    "trunk_distance": "perceptual distance in the bundled trunk (not LPIPS); smaller is better",
    "nscd": "distance of the codes' styles from the generator's own (LSAP); smaller is nearer",
    "lpips": "LPIPS perceptual distance; smaller is better",
}


def pictures(data: ReportData) -> str:
    if not data.groups:
        return (
            "<p>No pictures to show: none is committed yet, or the run stores none "
            "(<code>output.pictures</code>).</p>"
        )
    ranked = (
        f"Ranked by <code>{escape(data.ranked_by)}</code> (smaller is better). "
        if data.ranked_by
        else ""
    )
    is_small = all(
        is_pixelated(picture)
        for group in data.groups
        for pair in group.pairs
        for picture in (pair.original, pair.inversion)
        if picture
    )
    css = "pairs" if is_small else "pairs large"
    groups = "".join(
        f'<div><h3>{escape(group.title)}</h3><div class="{css}">'
        f"{''.join(_pair(pair, data.ranked_by) for pair in group.pairs)}</div></div>"
        for group in data.groups
    )
    smooth = '<label><input type="checkbox" id="smooth"> Smooth the pixels</label>'
    return (
        f"<p>Original on the left, inversion on the right. {ranked}</p>"
        f'{smooth if is_small else ""}<div class="groups">{groups}</div>'
    )


def _pair(pair: Pair, ranked_by: str | None) -> str:
    key = escape(pair.key)
    value = f'<span class="value">{number(pair.value)}</span>' if ranked_by else ""
    said = f", {ranked_by} {number(pair.value)}" if ranked_by else ""
    return (
        f'<figure><div class="pair">{_image(pair.original, f"Original of {pair.key}")}'
        f"{_image(pair.inversion, f'Inversion of {pair.key}{said}')}</div>"
        f'<figcaption><span class="key mono" title="{key}">{key}</span>{value}</figcaption>'
        "</figure>"
    )


def _image(encoded: bytes | None, alt: str) -> str:
    if not encoded:
        return '<span class="none">not stored</span>'
    return f'<img width="128" height="128" src="{data_uri(encoded)}" alt="{escape(alt)}">'


def metrics(data: ReportData) -> str:
    if not data.metrics:
        return "<p>No metric has a value yet.</p>"
    charts = "".join(f"<div>{_histogram(metric)}</div>" for metric in data.metrics)
    rows = "".join(
        f'<tr><th scope="row"><code>{escape(m.name)}</code></th>'
        + "".join(
            f'<td class="n">{number(value)}</td>'
            for value in (m.count, m.mean, m.median, m.smallest, m.largest)
        )
        + "</tr>"
        for m in data.metrics
    )
    head = "".join(
        f'<th scope="col" class="n">{title}</th>'
        for title in ("Rows", "Mean", "Median", "Smallest", "Largest")
    )
    return f'<div class="charts">{charts}</div><h3 style="margin-top:28px">Summary</h3>' + table(
        f'<tr><th scope="col">Metric</th>{head}</tr>', rows, "Metric summary"
    )


def _histogram(metric: Metric) -> str:
    note = next((text for key, text in METRIC_NOTES.items() if metric.name.startswith(key)), "")
    outside = [
        f"{counted(count, 'row')} {side} the axis"
        for count, side in ((metric.below, "below"), (metric.above, "above"))
        if count
    ]
    x = Axis(low=metric.low, high=metric.high, label=metric.name)
    y = Axis(low=0, high=HEADROOM * max(*metric.counts, 1), label="rows")
    chart = bars(
        metric.counts,
        x,
        y,
        title=f"Histogram of {metric.name}: median {number(metric.median)}, "
        f"from {number(metric.smallest)} to {number(metric.largest)}",
        markers=[Marker(at=metric.median, text=f"median {number(metric.median)}")],
    )
    text = "; ".join(filter(None, [note, *outside]))
    return (
        f"<h3><code>{escape(metric.name)}</code></h3>{chart}"
        f'<p class="soft" style="font-size:.8125rem">{escape(text)}</p>'
    )


# ------------------------------------------------------------------ time


def throughput(data: ReportData) -> str:
    line = data.timeline
    if not line.rates:
        return "<p>No shard is committed yet.</p>"
    unit, scale = time_unit(line.seconds)
    pauses = [
        Marker(at=at / scale, text=f"paused {duration(length)}", kind="pause")
        for at, length in line.pauses
    ]
    if len(pauses) > 3:  # texts would cover each other
        pauses = [Marker(at=pause.at, text="", kind="pause") for pause in pauses]
    chart = bars(
        line.rates,
        Axis(low=0, high=line.seconds / scale, label=f"working time, {unit}"),
        Axis(low=0, high=HEADROOM * max(*line.rates, 1e-9), label="images/s"),
        title=f"Images per second over {duration(line.seconds)} of working time",
        markers=pauses,
        height_px=180,
    )
    note = (
        f'<p class="soft">Dashed: {counted(len(line.pauses), "pause")} cut out of the axis.</p>'
        if line.pauses
        else ""
    )
    return (
        "<p>Each shard's rows are spread evenly over the time it was worked on, as its commit "
        f"marker tells it.</p>{chart}{note}"
    )


def stages(data: ReportData) -> str:
    total = sum(seconds for _, seconds in data.stages)
    if total <= 0:
        return "<p>No stage timing is committed yet.</p>"
    spoken = ", ".join(f"{name} {100 * s / total:.0f} %" for name, s in data.stages)
    done = max(data.rows, 1)
    rows = "".join(
        f'<tr><th scope="row"><span class="swatch part-{index % 8}"></span>{escape(name)}</th>'
        f'<td class="n">{duration(seconds)}</td><td class="n">{100 * seconds / total:.1f} %</td>'
        f'<td class="n">{number(1000 * seconds / done)} ms</td></tr>'
        for index, (name, seconds) in enumerate(data.stages)
    )
    head = (
        '<tr><th scope="col">Stage</th><th scope="col" class="n">Time</th>'
        '<th scope="col" class="n">Share</th><th scope="col" class="n">Per row</th></tr>'
    )
    return (
        "<p>Summed over all shards. Stages of different shards overlap, so the sum may exceed the "
        f"working time.</p>{stacked(data.stages, title=f'Share of time by stage: {spoken}')}"
        + table(head, rows, "Time by stage")
    )
