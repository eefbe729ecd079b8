"""The benchmark's plot: labels do not cover each other."""

import re

from tasks.benchmark.figures import LABEL_HEIGHT, scatter


def test_labels_of_equal_points_stand_below_each_other() -> None:
    row = {"trunk_distance": 0.2, "frechet_edited": 50.0, "seconds_per_image": 0.1}
    far = {"trunk_distance": 0.5, "frechet_edited": 50.0, "seconds_per_image": 0.1}
    rows = {"first": row, "second": row, "third": row, "apart": far}
    picture = scatter({"perceptual": "trunk_distance", "rows": rows})
    heights = {name: float(re.findall(rf'y="([\d.]+)"[^>]*>{name}<', picture)[0]) for name in rows}
    assert heights["second"] - heights["first"] == LABEL_HEIGHT
    assert heights["third"] - heights["second"] == LABEL_HEIGHT
    assert heights["apart"] == heights["first"]
