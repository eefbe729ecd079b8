"""Prefect flows over stored codes: edits of a run, and what edits need.

Each also runs from the command line without a server: `refinery edit --no-flow`, `refinery adapt`,
`refinery directions fit`.
"""

import json
from contextlib import nullcontext

from prefect import flow, task
from prefect.artifacts import create_table_artifact
from prefect.concurrency.sync import concurrency

from pipeline.adapt import load_adapt_config
from pipeline.directions import fit_directions as fit
from pipeline.edit import Wishes, load_edit_config
from pipeline.flows import (
    GPU_LIMIT,
    RETRY_ON_OUTAGE,
    ProgressBar,
    dated,
    run_name,
    run_stages,
    show_picture,
)
from pipeline.run import Summary
from tasks.adapt.config import AdaptConfig
from tasks.adapt.job import adapt


@flow(name="edit-dataset", flow_run_name=run_name)
def edit_dataset(
    source_uri: str,
    output_uri: str,
    config: str | None = None,
    overrides: list[str] | None = None,
    wishes: Wishes | None = None,
    limit: int | None = None,
) -> Summary:
    """Edit a run's stored samples: plan, run shards, seal, verify, report.

    Args:
        source_uri: a finished run of inversions. `{date}` as in `output_uri`.
        output_uri: the run directory of the edits. `{date}` becomes the day the run was scheduled
            for (UTC).
        config: TOML file with [[variant]] tables.
        overrides: as `--set`.
        wishes: as `--edit`, `--domain` and so on, beside the file's variants.
        limit: only the first samples.

    Raises:
        IncompleteRun: shards were quarantined, or verification found problems.
        RefineryError: as the stages of `pipeline.run`.
    """
    source, run_uri = dated(source_uri), dated(output_uri)
    settings = load_edit_config(source, config, overrides or [], wishes)
    return run_stages(source, run_uri, settings, limit)


@flow(name="adapt-domain")
def adapt_domain(config: str | None = None, overrides: list[str] | None = None) -> list[str]:
    """Learn domains, all of a job in one batch; waits for a GPU of the server's quota.

    Args:
        config: TOML file with [[domain]] tables.
        overrides: as `--set`.

    Returns:
        Their folders.

    Raises:
        RefineryError: as `tasks.adapt.job.adapt`.
    """
    return learn_domains(load_adapt_config(config, overrides or []))


@task(name="learn-domains", **RETRY_ON_OUTAGE)
def learn_domains(config: AdaptConfig) -> list[str]:
    quota = nullcontext() if config.device == "cpu" else concurrency(GPU_LIMIT, occupy=1)
    bar = ProgressBar("Steps done")
    with quota:
        folders = adapt(config, lambda progress: bar(progress.step, progress.steps))
    rows = []
    for folder in folders:
        card = json.loads((folder / "card.json").read_text())
        rows.append({key: card[key] for key in ("name", "status", "note", "best_step", "score")})
        show_picture((folder / "preview.png").read_bytes(), card["name"], "Before and after")
    create_table_artifact(table=rows, key="domains", description=f"Domains in {config.out}")
    return [str(folder) for folder in folders]


@flow(name="nightly-domains", flow_run_name=run_name)
def nightly_domains(
    adapt_config: str,
    source_uri: str,
    output_uri: str,
    strength: float = 1.0,
    overrides: list[str] | None = None,
    adapt_overrides: list[str] | None = None,
) -> Summary:
    """A night of re-styling: learn the domains, render every stored sample in each, report.

    Domains that are learnt already are not learnt again.

    Args:
        adapt_config: TOML file with [[domain]] tables.
        source_uri: a finished run of inversions; `{date}` as in `edit_dataset`.
        output_uri: the run directory of the edits; `{date}` likewise.
        strength: of every domain.
        overrides: settings of the edit run, as `--set`.
        adapt_overrides: settings of the adaptation.

    Raises:
        IncompleteRun, RefineryError: as the two flows.
    """
    folders = adapt_domain(adapt_config, adapt_overrides)
    wishes = Wishes(domains=folders, strength=strength, is_each=True)
    return edit_dataset(source_uri, output_uri, None, overrides, wishes)


@flow(name="fit-directions", flow_run_name="{way}")
def fit_directions(
    way: str, config: str | None = None, overrides: list[str] | None = None
) -> list[str]:
    """Find directions and write their files.

    Args:
        way: boundary, ganspace, sefa, text or file.
        config: TOML file with the way's settings.
        overrides: as `--set`.

    Raises:
        RefineryError: as `pipeline.directions.fit_directions`.
    """
    return find_directions(way, config, overrides or [])


@task(name="find-directions", **RETRY_ON_OUTAGE)
def find_directions(way: str, config: str | None, overrides: list[str]) -> list[str]:
    return [str(path) for path in fit(way, config, overrides)]
