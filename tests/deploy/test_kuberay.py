"""deploy/kuberay: the structure KubeRay's ray.io/v1 resources must have, and that it fits the tree.

The operator's schemas drop a misspelt key in silence. The schema below is closed: it names the keys
of the ray.io/v1 API reference and, of Kubernetes' pod template, those that are used here.
"""

import shlex
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.scripts.scripts import drain_node

from pipeline.cli import app
from pipeline.config import load_config

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "deploy" / "kuberay"

STRING = {"type": "string"}
COUNT = {"type": "integer", "minimum": 0}
BOOLEAN = {"type": "boolean"}
# Kubernetes takes no number or boolean for a string (labels, env values, start parameters).
STRINGS = {"type": "object", "additionalProperties": STRING}
QUANTITY = {
    "type": ["string", "integer"],
    "pattern": r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$",
}
QUANTITIES = {"type": "object", "additionalProperties": QUANTITY}


def closed(required: str = "", **properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "additionalProperties": False,
        "required": required.split(),
        "properties": properties,
    }


def listed(item: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": item, "minItems": 1}


RESOURCES = closed("requests limits", requests=QUANTITIES, limits=QUANTITIES)
CONTAINER = closed(
    "name image resources",
    name=STRING,
    image=STRING,
    imagePullPolicy={"enum": ["Always", "IfNotPresent", "Never"]},
    ports=listed(closed("containerPort", name=STRING, containerPort=COUNT)),
    env=listed(closed("name", name=STRING, value=STRING, valueFrom={"type": "object"})),
    envFrom=listed(closed("secretRef", secretRef=closed("name", name=STRING))),
    securityContext=closed(
        allowPrivilegeEscalation=BOOLEAN, capabilities=closed("drop", drop=listed(STRING))
    ),
    lifecycle=closed(preStop=closed("exec", exec=closed("command", command=listed(STRING)))),
    resources=RESOURCES,
    volumeMounts=listed(closed("name mountPath", name=STRING, mountPath=STRING, readOnly=BOOLEAN)),
)
POD_TEMPLATE = closed(
    "spec",
    metadata=closed(labels=STRINGS, annotations=STRINGS),
    spec=closed(
        "containers",
        containers=listed(CONTAINER),
        restartPolicy={"enum": ["Always", "OnFailure", "Never"]},
        automountServiceAccountToken=BOOLEAN,
        terminationGracePeriodSeconds=COUNT,
        nodeSelector=STRINGS,
        tolerations=listed(
            closed(
                key=STRING,
                operator={"enum": ["Exists", "Equal"]},
                value=STRING,
                effect={"enum": ["NoSchedule", "PreferNoSchedule", "NoExecute"]},
            )
        ),
        securityContext=closed(
            runAsNonRoot=BOOLEAN,
            runAsUser=COUNT,
            runAsGroup=COUNT,
            fsGroup=COUNT,
            seccompProfile=closed("type", type=STRING),
        ),
        volumes=listed(
            closed("name configMap", name=STRING, configMap=closed("name", name=STRING))
        ),
    ),
)
HEAD_GROUP = closed(
    "template",
    template=POD_TEMPLATE,
    rayStartParams=STRINGS,
    serviceType={"enum": ["ClusterIP", "NodePort", "LoadBalancer"]},
    enableIngress=BOOLEAN,
    headService={"type": "object"},
)
WORKER_GROUP = closed(
    "groupName template minReplicas maxReplicas",
    groupName=STRING,
    replicas=COUNT,
    minReplicas=COUNT,
    maxReplicas=COUNT,
    idleTimeoutSeconds=COUNT,
    numOfHosts=COUNT,
    rayStartParams=STRINGS,
    template=POD_TEMPLATE,
)
CLUSTER_SPEC = closed(
    "headGroupSpec workerGroupSpecs rayVersion",
    rayVersion=STRING,
    enableInTreeAutoscaling=BOOLEAN,
    autoscalerOptions=closed(
        upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
        idleTimeoutSeconds=COUNT,
        version={"enum": ["v1", "v2"]},
        resources=RESOURCES,
    ),
    headGroupSpec=HEAD_GROUP,
    workerGroupSpecs=listed(WORKER_GROUP),
)
JOB_SPEC = closed(
    "entrypoint rayClusterSpec",
    entrypoint=STRING,
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode"]},
    submitterConfig=closed(backoffLimit=COUNT),
    backoffLimit=COUNT,
    activeDeadlineSeconds={"type": "integer", "minimum": 1},
    shutdownAfterJobFinishes=BOOLEAN,
    ttlSecondsAfterFinished=COUNT,
    suspend=BOOLEAN,
    runtimeEnvYAML=STRING,
    rayClusterSpec=CLUSTER_SPEC,
)


def resource(kind: str, spec: dict[str, Any]) -> dict[str, Any]:
    metadata = closed(name=STRING, generateName=STRING, labels=STRINGS)
    return closed(
        "apiVersion kind metadata spec",
        apiVersion={"const": "ray.io/v1"},
        kind={"const": kind},
        metadata=metadata,
        spec=spec,
    )


def load(name: str) -> dict[str, Any]:
    return yaml.safe_load((FOLDER / name).read_text())


@pytest.fixture(scope="module")
def job() -> dict[str, Any]:
    return load("rayjob.yaml")


@pytest.fixture(scope="module")
def cluster(job: dict[str, Any]) -> dict[str, Any]:
    return job["spec"]["rayClusterSpec"]


@pytest.fixture(scope="module")
def worker(cluster: dict[str, Any]) -> dict[str, Any]:
    (group,) = cluster["workerGroupSpecs"]
    return group


def pod(group: dict[str, Any]) -> dict[str, Any]:
    return group["template"]["spec"]


def container(group: dict[str, Any]) -> dict[str, Any]:
    (found,) = pod(group)["containers"]
    return found


def violations(document: dict[str, Any], schema: dict[str, Any]) -> list[str]:
    kind = jsonschema.validators.validator_for(schema)
    return [error.message for error in kind(schema).iter_errors(document)]


def test_rayjob_has_the_structure_of_the_crd(job: dict[str, Any]) -> None:
    assert violations(job, resource("RayJob", JOB_SPEC)) == []


def test_raycluster_has_the_structure_of_the_crd() -> None:
    assert violations(load("raycluster.yaml"), resource("RayCluster", CLUSTER_SPEC)) == []


def test_schema_refuses_a_misspelt_key(job: dict[str, Any]) -> None:
    wrong = job | {"spec": job["spec"] | {"backofLimit": 1}}
    with pytest.raises(jsonschema.ValidationError, match="backofLimit"):
        jsonschema.validate(wrong, resource("RayJob", JOB_SPEC))


def test_both_files_describe_the_same_cluster(cluster: dict[str, Any]) -> None:
    assert load("raycluster.yaml")["spec"] == cluster


def test_ray_is_the_version_that_is_installed(cluster: dict[str, Any]) -> None:
    assert f"\nray=={cluster['rayVersion']}\n" in (ROOT / "constraints.txt").read_text()


def test_entrypoint_parses_with_the_real_command_line(job: dict[str, Any]) -> None:
    program, *tokens = shlex.split(job["spec"]["entrypoint"])
    assert program == "refinery"
    command, bound, _ = app.parse_args(tokens, exit_on_error=False, print_error=False)
    assert command.__name__ == "invert"
    assert bound.arguments["source"].startswith("s3://")
    assert bound.arguments["output"].startswith("s3://")
    options = bound.arguments["options"]
    assert options.flow is False
    # The config is the file that the pods mount, and the overrides fit it.
    mounts = {m["name"]: m["mountPath"] for m in container(_head(job))["volumeMounts"]}
    assert options.config == f"{mounts['config']}/nightly.toml"
    config = load_config(str(ROOT / "deploy" / "nightly.toml"), options.overrides)
    assert config.engine.address == "auto"
    assert config.engine.kind == "ray"


def _head(job: dict[str, Any]) -> dict[str, Any]:
    return job["spec"]["rayClusterSpec"]["headGroupSpec"]


def test_pool_asks_for_what_the_worker_group_can_grow_to(worker: dict[str, Any]) -> None:
    """From zero nodes the autoscaler brings what pending actors ask for; "auto" asks for one."""
    engine = load_config(str(ROOT / "deploy" / "nightly.toml")).engine
    assert worker["minReplicas"] == 0
    gpus = container(worker)["resources"]["limits"]["nvidia.com/gpu"]
    assert engine.actors == worker["maxReplicas"] * gpus
    assert engine.gpus_per_actor == 1
    assert worker["rayStartParams"]["num-gpus"] == str(gpus)


def test_head_computes_nothing(cluster: dict[str, Any]) -> None:
    head = cluster["headGroupSpec"]
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert "nvidia.com/gpu" not in container(head)["resources"]["limits"]
    assert cluster["enableInTreeAutoscaling"] is True


def test_images_are_the_ones_that_the_dockerfile_says_to_build(cluster: dict[str, Any]) -> None:
    dockerfile = (ROOT / "deploy" / "Dockerfile").read_text()
    images = [container(cluster["headGroupSpec"])["image"]]
    images += [container(group)["image"] for group in cluster["workerGroupSpecs"]]
    assert images == ["style-refinery:0.1.0-cpu", "style-refinery:0.1.0-gpu"]
    for image in images:
        assert f"-t {image} " in dockerfile
    assert 'version = "0.1.0"' in (ROOT / "pyproject.toml").read_text()


def test_pods_run_as_the_user_of_the_image(cluster: dict[str, Any]) -> None:
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups:
        assert pod(group)["securityContext"]["runAsUser"] == 1000
        assert pod(group)["securityContext"]["runAsNonRoot"] is True
        assert container(group)["securityContext"]["allowPrivilegeEscalation"] is False
        # Kubernetes would restart a pod in place, as another Ray node under the same name.
        assert pod(group)["restartPolicy"] == "Never"


def test_credentials_come_from_a_secret(cluster: dict[str, Any]) -> None:
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert container(group)["envFrom"] == [{"secretRef": {"name": "refinery-s3"}}]
        assert not [e for e in container(group)["env"] if "KEY" in e["name"]]


def test_workers_are_spot_gpus_that_leave_in_order(worker: dict[str, Any]) -> None:
    assert "spot" in pod(worker)["nodeSelector"].values()
    tolerated = {t["key"] for t in pod(worker)["tolerations"]}
    assert {"nvidia.com/gpu", *pod(worker)["nodeSelector"]} <= tolerated
    command = container(worker)["lifecycle"]["preStop"]["exec"]["command"]
    assert command[:2] == ["/bin/bash", "-c"]
    drain, rest = command[2].split(";", 1)
    # Ray's own parser takes the flags (the command is hidden and may change with a Ray release).
    words = shlex.split(drain)
    assert words[:2] == ["ray", "drain-node"]
    flags = drain_node.make_context("drain-node", words[2:]).params
    assert flags["reason"] == "DRAIN_NODE_REASON_PREEMPTION"
    assert f"sleep {flags['deadline_remaining_seconds']}" in rest
    assert pod(worker)["terminationGracePeriodSeconds"] >= flags["deadline_remaining_seconds"] + 10
