"""Prefect flows over stored codes: edits of a run, and what edits need.

Each also runs from the command line without a server: `refinery edit --no-flow`, `refinery adapt`,
`refinery directions fit`.
"""

from prefect import flow, task

from pipeline import edit as edits
from pipeline import run as stages
from pipeline.directions import fit_directions as fit
from pipeline.edit import EditRunConfig, Wishes, load_edit_config
from pipeline.flows import (
    RETRY_ON_OUTAGE,
    IncompleteRun,
    publish,
    run_shards,
    scheduled_day,
    seal_and_verify,
    write_report,
)
from pipeline.run import Plan, Summary


@flow(name="edit-dataset", flow_run_name="{output_uri}")
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
    settings = load_edit_config(config, overrides or [], wishes)
    day = scheduled_day()
    source, run_uri = source_uri.replace("{date}", day), output_uri.replace("{date}", day)
    stages.check_places(source, run_uri)
    planned = plan_edit(source, run_uri, settings, limit)
    outcome = run_shards(planned, settings.engine)
    problems = seal_and_verify(run_uri)
    summary = Summary(outcome=outcome, problems=problems, report_uri=write_report(run_uri))
    publish(summary)
    if not summary.is_clean:
        raise IncompleteRun(summary)
    return summary


@task(name="plan-edit", **RETRY_ON_OUTAGE)
def plan_edit(source: str, run_uri: str, config: EditRunConfig, limit: int | None) -> Plan:
    return edits.plan(source, run_uri, config, limit=limit)


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
    return [str(path) for path in find_directions(way, config, overrides or [])]


@task(name="find-directions", **RETRY_ON_OUTAGE)
def find_directions(way: str, config: str | None, overrides: list[str]) -> list[str]:
    return [str(path) for path in fit(way, config, overrides)]
