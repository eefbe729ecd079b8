"""The sections of the page that show results: pictures, metrics, throughput, stages."""

from typing import Any

from tasks.report.aggregates import Metric
from tasks.report.charts import Axis, PlotLine, bars, stacked
from tasks.report.data import ReportData
from tasks.report.look import section
from tasks.report.pictures import is_pixelated
from tasks.report.statistics import FAR, RunStatistics
from tasks.report.words import counted, duration, number, time_unit

HEADROOM = 1.12
"""Height of a chart over its tallest bar, so that the texts of markers stand above the bars."""
METRIC_NOTES = {
    "mse": "mean squared error on the [-1, 1] scale; smaller is better",
    "psnr": "peak signal to noise ratio, dB, peak 2.0; larger is better",
    "ssim": "structural similarity, at most 1; larger is better",
    "identity": "cosine similarity of face embeddings; larger is better",
    "trunk_distance": "perceptual distance in the bundled trunk (not LPIPS); smaller is better",
    "nscd": "distance of the codes' styles from the generator's own (LSAP); smaller is nearer",
    "lpips": "LPIPS perceptual distance; smaller is better",
}


def pictures(data: ReportData) -> str:
    stored = (
        picture
        for group in data.groups
        for pair in group.pairs
        for picture in (pair.original, pair.inversion)
        if picture
    )
    return section("pictures", data, all(map(is_pixelated, stored)))


def metrics(data: ReportData) -> str:
    return section("metrics", data, [histogram(metric) for metric in data.metrics])


def histogram(metric: Metric) -> dict[str, Any]:
    """A metric's name, chart and note, as the templates show them."""
    note = next((text for key, text in METRIC_NOTES.items() if metric.name.startswith(key)), "")
    outside = [
        f"{counted(count, 'row')} {side} the axis"
        for count, side in ((metric.below, "below"), (metric.above, "above"))
        if count
    ]
    chart = bars(
        metric.counts,
        Axis(low=metric.low, high=metric.high, label=metric.name),
        Axis(low=0, high=HEADROOM * max(*metric.counts, 1), label="rows"),
        title=f"Histogram of {metric.name}: median {number(metric.median)}, "
        f"from {number(metric.smallest)} to {number(metric.largest)}",
        markers=[PlotLine(at=metric.median, text=f"median {number(metric.median)}")],
    )
    text = "; ".join(filter(None, [note, *outside]))
    return {"name": metric.name, "chart": chart, "note": text}


def codes(found: RunStatistics | None) -> str:
    """Clusters and outliers of the codes, outliers of the metrics."""
    return section("codes", found, FAR)


# ------------------------------------------------------------------ time


def throughput(data: ReportData) -> str:
    line = data.timeline
    if not line.rates:
        return section("throughput", data, "")
    unit, scale = time_unit(line.seconds)
    pauses = [
        PlotLine(at=at / scale, text=f"paused {duration(length)}", kind="pause")
        for at, length in line.pauses
    ]
    if len(pauses) > 3:  # texts would cover each other
        pauses = [PlotLine(at=pause.at, text="", kind="pause") for pause in pauses]
    chart = bars(
        line.rates,
        Axis(low=0, high=line.seconds / scale, label=f"working time, {unit}"),
        Axis(low=0, high=HEADROOM * max(*line.rates, 1e-9), label="images/s"),
        title=f"Images per second over {duration(line.seconds)} of working time",
        markers=pauses,
        height_px=180,
    )
    return section("throughput", data, chart)


def stages(data: ReportData) -> str:
    total = sum(seconds for _, seconds in data.stages)
    shares = ", ".join(f"{name} {100 * s / total:.0f} %" for name, s in data.stages if total > 0)
    chart = stacked(data.stages, title=f"Share of time by stage: {shares}")
    return section("stages", data, chart, total)
