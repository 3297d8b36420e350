"""A sweep as text: does sh read it as meant, and would Kubernetes take it?"""

import dataclasses
import os
import re
import shlex
import stat
import subprocess

import pytest
import yaml

from lowrank_jax.experiment.cli import commands
from lowrank_jax.experiment.config.schema import Config
from lowrank_jax.experiment.sweep import emit
from lowrank_jax.experiment.sweep.trials import Trial
from lowrank_jax.experiment.workdir.workdir import Workdir, WorkdirError

NAMES = ["method=spectral,seed=0", "M" * 400, "UPPER,Case=1", "größe=ß,Ω=日本", "-", "a'b\"c $(HOME) $$", "x: [y] # z"]
SETTINGS = emit.JobSetSettings(image="europe-docker.pkg.dev/p/r/lowrank:1", tpu="v5e:4x4")


def trial(name="seed=0", *flags, folder="gs://bucket/sweep"):
    workdir = f"{folder}/{name}"
    command = ("train", "--config=configs/digits_resnet.py", *flags, f"--workdir={workdir}")
    return Trial(name, {}, Config(), workdir, command)


def manifests(trials, **changes):
    return list(yaml.safe_load_all(emit.jobset(trials, dataclasses.replace(SETTINGS, **changes))))


def parts(manifest):
    """The Job's spec and the pod's."""
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    return job, job["template"]["spec"]


# --- shell ---


@pytest.fixture
def sh(tmp_path):
    """Runs text in sh with a `lowrank` that prints its arguments."""
    stub = tmp_path / "bin" / "lowrank"
    stub.parent.mkdir()
    stub.write_text("#!/bin/sh\nprintf '%s\\0' \"$@\"\nprintf '\\n'\n")  # no line of shell holds either
    stub.chmod(stub.stat().st_mode | stat.S_IXUSR)
    environment = {**os.environ, "PATH": f"{stub.parent}:{os.environ['PATH']}"}

    def run(text):
        script = tmp_path / "sweep.sh"
        script.write_text(text)
        subprocess.run(["sh", "-n", script], check=True)
        result = subprocess.run(["sh", script], check=True, capture_output=True, text=True, env=environment, cwd=tmp_path)
        return [line.split("\0")[:-1] for line in result.stdout.split("\n")[:-1]]

    return run


def test_every_line_of_shell_runs_the_trial(sh):
    flags = [
        "--config.model.kwargs.widths=(32,)",
        "--config.a='quoted \"twice\"'",
        "--config.b=$HOME `id` \\ * ; & | # !",
        "--c=",
    ]
    trials = [*(trial(f"seed={i}", flag) for i, flag in enumerate(flags)), *(trial(name) for name in NAMES)]
    text = emit.shell(trials)
    assert sh(text) == [list(t.command) for t in trials]
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert [sh(line) for line in lines] == [[list(t.command)] for t in trials]
    assert text.startswith("# ") and text.endswith("\n")


def test_no_trials_are_no_commands(sh):
    assert sh(emit.shell([])) == []
    assert manifests([]) == []


def test_shell_refuses_what_no_line_can_hold():
    with pytest.raises(ValueError, match=r"line break.*seed=7"):
        emit.shell([trial("seed=7", "--config.a=1\n2")])


# --- JobSet ---

# The fields that are emitted and their types, after api/jobset/v1alpha2/jobset_types.go of kubernetes-sigs/jobset at 0336a8fd,
# and batch/v1 and core/v1 of Kubernetes 1.31, where podFailurePolicy became stable.
_STRINGS = {str: str}
_POD = {
    "restartPolicy": {"Always", "OnFailure", "Never"},
    "terminationGracePeriodSeconds": int,
    "serviceAccountName": str,
    "nodeSelector": _STRINGS,
    "containers": [
        {"name": str, "image": str, "command": [str], "args": [str], "resources": {"limits": {"google.com/tpu": int}}},
    ],
}
_JOB = {
    "parallelism": int,
    "completions": int,
    "completionMode": {"NonIndexed", "Indexed"},
    "backoffLimit": int,
    "podFailurePolicy": {
        "rules": [{"action": {"FailJob", "FailIndex", "Ignore", "Count"}, "onExitCodes": {"operator": {"In"}, "values": [int]}}]
    },
    "template": {"spec": _POD},
}
_JOBSET = {
    "apiVersion": {"jobset.x-k8s.io/v1alpha2"},
    "kind": {"JobSet"},
    "metadata": {"name": str, "namespace": str, "labels": _STRINGS, "annotations": _STRINGS},
    "spec": {
        "network": {"enableDNSHostnames": bool},
        "failurePolicy": {
            "maxRestarts": int,
            "rules": [{"name": str, "action": {"FailJobSet", "RestartJobSet"}, "onJobFailureReasons": [{"PodFailurePolicy"}]}],
        },
        "replicatedJobs": [{"name": str, "replicas": int, "template": {"spec": _JOB}}],
    },
}


def conforms(value, schema, path="$"):
    if isinstance(schema, type):
        assert type(value) is schema, f"{path}: {value!r} is no {schema.__name__}"
    elif isinstance(schema, set):
        assert value in schema, f"{path}: {value!r} is none of {schema}"
    elif isinstance(schema, list):
        assert type(value) is list and value, path
        for i, item in enumerate(value):
            conforms(item, schema[0], f"{path}[{i}]")
    else:
        assert type(value) is dict and value, path
        for key, item in value.items():
            assert key in schema or str in schema, f"{path}: unknown field {key}"
            conforms(item, schema.get(key, schema.get(str)), f"{path}.{key}")


@pytest.mark.parametrize(
    "changes", [{}, {"namespace": "team", "queue": "tpus.a", "service_account": "trainer", "spot": True, "tpu": "v4:2x2x1"}]
)
def test_the_fields_are_those_of_the_api(changes):
    text = emit.jobset([trial(name) for name in NAMES], dataclasses.replace(SETTINGS, **changes))
    assert text.count("\n---\n") == len(NAMES) and "&id" not in text
    for manifest in yaml.safe_load_all(text):
        conforms(manifest, _JOBSET)
        labels, (_, pod) = manifest["metadata"]["labels"], parts(manifest)
        assert labels.get("kueue.x-k8s.io/queue-name") == changes.get("queue")
        assert manifest["metadata"].get("namespace") == changes.get("namespace")
        assert pod.get("serviceAccountName") == changes.get("service_account")
        assert ("cloud.google.com/gke-spot" in pod["nodeSelector"]) == ("spot" in changes)


def test_names_are_valid_unique_and_stable():
    longest = "a" * 35
    found = manifests([trial(name) for name in NAMES], name=longest, tpu="v5p:16x16x24")
    names = [manifest["metadata"]["name"] for manifest in found]
    assert len(set(names)) == len(NAMES)
    for name, manifest in zip(names, found, strict=True):
        job, _ = parts(manifest)
        pod_name = (
            f"{name}-{manifest['spec']['replicatedJobs'][0]['name']}-0-{job['completions'] - 1}-abcde"  # as JobSet checks
        )
        assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", pod_name) and len(pod_name) == 63
    assert names == [m["metadata"]["name"] for m in manifests([trial(name) for name in NAMES], name=longest)]
    assert [m["metadata"]["annotations"]["lowrank-jax/trial"] for m in found] == NAMES
    for value in (value for manifest in found for value in manifest["metadata"]["labels"].values()):
        assert re.fullmatch(r"[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?", value) and len(value) <= 63


def test_the_same_trial_of_two_sweeps_is_two_jobsets():
    one, other = manifests([trial(folder="gs://bucket/one"), trial(folder="gs://bucket/other")])
    assert one["metadata"]["name"] != other["metadata"]["name"]


def test_the_container_gets_the_command():
    given = trial("seed=0", "--config.model.kwargs.widths=(32,)", "--config.a='b c'", "--config.d=$(HOME) $$ $")
    _, pod = parts(manifests([given])[0])
    (container,) = pod["containers"]
    expanded = [re.sub(r"\$(\$|\(\w+\))", lambda m: "$" if m[1] == "$" else "EXPANDED", word) for word in container["args"]]
    assert container["command"] == ["lowrank"] and tuple(expanded) == given.command


# Hosts and chips a host: v5e and v4 as tabulated by Google's provisioning tool for GKE clusters (TPU types, number of VMs in a
# slice); v6e by the machine types ct6e-standard-1t, -4t and -8t; v5p: ct5p-hightpu-4t has 4 chips.
@pytest.mark.parametrize(
    ("text", "accelerator", "hosts", "chips"),
    [
        ("v5e:1x1", "tpu-v5-lite-podslice", 1, 1),
        ("v5e:2x2", "tpu-v5-lite-podslice", 1, 4),
        ("v5e:2x4", "tpu-v5-lite-podslice", 1, 8),
        ("v5e:2x4/4", "tpu-v5-lite-podslice", 2, 4),
        ("v5e:4x4", "tpu-v5-lite-podslice", 4, 4),
        ("v5e:4x8", "tpu-v5-lite-podslice", 8, 4),
        ("v5e:16x16", "tpu-v5-lite-podslice", 64, 4),
        ("v4:2x2x1", "tpu-v4-podslice", 1, 4),
        ("v4:2x2x2", "tpu-v4-podslice", 2, 4),
        ("v4:2x2x4", "tpu-v4-podslice", 4, 4),
        ("v4:2x4x4", "tpu-v4-podslice", 8, 4),
        ("v4:4x4x4", "tpu-v4-podslice", 16, 4),
        ("v5p:2x2x1", "tpu-v5p-slice", 1, 4),
        ("v5p:4x4x8", "tpu-v5p-slice", 32, 4),
        ("v5p:16x16x24", "tpu-v5p-slice", 1536, 4),
        ("v6e:2x4", "tpu-v6e-slice", 1, 8),
        ("v6e:4x4", "tpu-v6e-slice", 4, 4),
        ("v6e:8x16", "tpu-v6e-slice", 32, 4),
    ],
)
def test_a_slice_has_the_documented_hosts(text, accelerator, hosts, chips):
    manifest = manifests([trial()], tpu=text)[0]
    job, pod = parts(manifest)
    assert (job["parallelism"], job["completions"], job["completionMode"]) == (hosts, hosts, "Indexed")
    assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": chips}
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": accelerator,
        "cloud.google.com/gke-tpu-topology": text.partition(":")[2].partition("/")[0],
    }
    exclusive = manifest["metadata"]["annotations"].get("alpha.jobset.sigs.k8s.io/exclusive-topology")
    assert exclusive == ("cloud.google.com/gke-nodepool" if hosts > 1 else None)


@pytest.mark.parametrize(("status", "restarted"), [(2, False), (4, False), (75, True), (1, True), (137, True), (143, True)])
def test_what_is_restarted(status, restarted):
    """By the rules of the two controllers: first the Job's, for a pod that failed; then the JobSet's, for a Job that did."""
    manifest = manifests([trial()], max_restarts=3)[0]
    job, pod = parts(manifest)
    assert job["backoffLimit"] == 0 and pod["restartPolicy"] == "Never"
    matched = any(status in rule["onExitCodes"]["values"] for rule in job["podFailurePolicy"]["rules"])
    reason = "PodFailurePolicy" if matched else "BackoffLimitExceeded"
    policy = manifest["spec"]["failurePolicy"]
    actions = [rule["action"] for rule in policy["rules"] if reason in rule["onJobFailureReasons"]]
    assert (actions or ["RestartJobSet"])[0] == ("RestartJobSet" if restarted else "FailJobSet")
    assert policy["maxRestarts"] == 3 and pod["terminationGracePeriodSeconds"] == 300


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tpu": "v5:4x4"}, "unknown generation 'v5'; did you mean v5"),
        ({"tpu": "v5e:4x5"}, "v5e has no topology '4x5'; did you mean 4x"),
        ({"tpu": "v5e:2x2x2"}, "v5e has no topology '2x2x2'; did you mean 2x2?"),
        ({"tpu": "v4:2x2"}, "v4 has no topology '2x2'; did you mean 2x2x"),
        ({"tpu": "v4:8x4x4"}, "v4 has no topology '8x4x4'"),
        ({"tpu": "v4:16x16x20"}, "v4 has no topology '16x16x20'"),
        ({"tpu": "v4:4x4x6"}, "v4 has no topology '4x4x6'; did you mean 4x4x"),
        ({"tpu": "v4-8"}, "tpu: 'v4-8': expected GENERATION:TOPOLOGY"),
        ({"tpu": "v5e:04x4"}, "expected GENERATION:TOPOLOGY"),
        ({"tpu": "v5e:4x4/4"}, "/4 is only for 2x4"),
        ({"image": ""}, "image: ''"),
        ({"image": "a b"}, "image: 'a b'"),
        ({"name": "1a"}, "name: '1a'; must be"),
        ({"name": "Sweep"}, "name: 'Sweep'"),
        ({"name": "a" * 36}, "at most 35 characters"),
        ({"namespace": "a.b"}, "namespace: 'a.b'"),
        ({"queue": "Q_1"}, "queue: 'Q_1'"),
        ({"service_account": ""}, "service_account: ''"),
        ({"max_restarts": -1}, "max_restarts: -1"),
        ({"grace": 0}, "grace: 0"),
    ],
)
def test_mistakes_are_named(changes, message):
    assert len(dataclasses.replace(SETTINGS, **changes).problems()) == 1
    with pytest.raises(ValueError, match=re.escape(message)):
        manifests([trial()], **changes)


@pytest.mark.parametrize("folder", ["runs/sweep", "/runs", "file:///runs", "~/runs"])
def test_a_pod_has_no_local_work_directory(folder):
    with pytest.raises(ValueError, match=r"(?s)grace.*seed=1: work directory .* is local"):
        manifests([trial(), trial("seed=1", folder=folder)], grace=0)


def test_a_bucket_that_training_cannot_write_to_is_refused_in_the_words_of_training():
    folder = "s3://bucket/a"
    with pytest.raises(WorkdirError) as refusal:
        Workdir(folder).claim({})
    with pytest.raises(ValueError) as error:
        manifests([trial(folder=folder), trial("seed=1", folder=folder)])
    assert str(error.value) == str(refusal.value) and "'s3' not implemented" in str(refusal.value)


def test_the_explained_manifest_is_what_its_command_renders(repository, monkeypatch, capsys):
    explained = (repository / "deploy" / "jobset.yaml").read_text()
    command = re.search(r"#   (lowrank sweep (?:.|\n)+?)\n#\n", explained)
    assert command
    words = shlex.split(command[1].replace("\\\n#", ""))
    monkeypatch.chdir(repository)
    with pytest.raises(SystemExit) as ended:
        commands.main(words[1:])
    rendered = list(yaml.safe_load_all(capsys.readouterr().out))
    assert not ended.value.code
    assert len(rendered) == 3
    assert yaml.safe_load(explained) == rendered[0]
    # Every field that can be rendered is explained.
    assert set(_paths(_JOBSET)) == set(_paths(rendered[0]))


def _paths(tree, path=""):
    """The dotted names of a schema's fields, or of those that a manifest has."""
    if isinstance(tree, list):
        tree = tree[0]
    if not isinstance(tree, dict) or set(tree) == {str} or path.endswith(("labels", "annotations", "nodeSelector", "limits")):
        return [path]
    return [name for key, value in tree.items() for name in _paths(value, f"{path}.{key}")]
