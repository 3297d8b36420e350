"""A sweep as text, for clusters without Ray: lines for a shell or a batch system, or manifests for Kubernetes.

Nothing here runs or watches a trial.  What makes that enough is that `lowrank train` resumes: the same command on the same work
directory goes on where it stopped, so whatever restarts a line or a pod restarts the run.
"""

import dataclasses
import hashlib
import math
import re
import shlex
from collections.abc import Sequence
from typing import Any

import yaml

from lowrank_jax.experiment.errors import HOPELESS, INTERRUPTED
from lowrank_jax.experiment.preflight import slices
from lowrank_jax.experiment.preflight.slices import Slice
from lowrank_jax.experiment.sweep.trials import Trial
from lowrank_jax.experiment.workdir.workdir import Workdir, WorkdirError

TRIAL, SWEEP = "lowrank-jax/trial", "lowrank-jax/sweep"

_JOB = "slice"
_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
_SUBDOMAIN = re.compile(rf"{_LABEL.pattern}(\.{_LABEL.pattern})*")
_URL = re.compile(r"(?!file:)[a-z][a-z0-9+.-]*://[^/]", re.IGNORECASE)

# JobSet refuses pods whose name, `NAME-slice-0-POD-abcde`, is longer than 63 characters; a slice has at most 1536 pods.
_LONGEST_NAME = 63 - len(f"-{_JOB}-0-9999-abcde")
_DIGEST = 8


def shell(trials: Sequence[Trial]) -> str:
    """One `lowrank train` a line, quoted for sh.

    Raises:
      ValueError: a value holds a line break, which a line cannot.
    """
    broken = [trial.name for trial in trials if any("\n" in word for word in trial.command)]
    if broken:
        raise ValueError(f"a value with a line break does not fit on a line of shell: {', '.join(broken)}")
    hopeless = ", ".join(map(str, HOPELESS))
    head = [
        f"# {len(trials)} trials of `lowrank train`, one a line, in any order, wherever the work directories can be reached.",
        f"# Exit status {INTERRUPTED}: give the line again, and it goes on where it stopped; {hopeless}: do not.",
    ]
    return "\n".join([*head, *(shlex.join(["lowrank", *trial.command]) for trial in trials), ""])


# Values of the node label cloud.google.com/gke-tpu-accelerator.
_ACCELERATORS = {
    "v4": "tpu-v4-podslice",
    "v5e": "tpu-v5-lite-podslice",
    "v5p": "tpu-v5p-slice",
    "v6e": "tpu-v6e-slice",
}


def parse_tpu(text: str) -> Slice:
    """A slice that GKE has; see `slices.parse`.

    Raises:
      ValueError: there is no such slice.
    """
    try:
        slice_ = slices.parse(text)
        if slice_.generation not in _ACCELERATORS:
            raise ValueError(f"{slice_.generation} is not for JobSets; {', '.join(_ACCELERATORS)} are")
    except ValueError as error:
        raise ValueError(f"tpu: {error}") from None
    return slice_


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Where and how the pods of a sweep run.

    Attributes:
      image: container image with `lowrank`, jax for TPUs, and the config file at the path after --config=, which counts from
        the image's working directory.
      tpu: the slice of every trial; see `parse_tpu`.
      name: of the sweep: label of its JobSets and the beginning of their names.
      namespace: of Kubernetes; None: the one that kubectl is set to.
      queue: a LocalQueue of Kueue, without which all trials ask for their slices at once.
      service_account: of Kubernetes, that may read and write the work directories and the data; None: the namespace's default.
      spot: ask for spot nodes.
      max_restarts: after preemptions and crashes, of each trial.
      grace: seconds from SIGTERM to SIGKILL, to end a step and save in.  An upper bound: a spot node gives less, 15 unless its
        pool says otherwise, and what did not get saved there is what came after the last `checkpoint.every`.
    """

    image: str
    tpu: str
    name: str = "lowrank"
    namespace: str | None = None
    queue: str | None = None
    service_account: str | None = None
    spot: bool = False
    max_restarts: int = 20
    grace: int = 300

    def problems(self) -> list[str]:
        """What is wrong, a line each; empty when nothing is."""
        found = [] if re.fullmatch(r"\S+", self.image) else [f"image: {self.image!r} is no name of a container image"]
        try:
            parse_tpu(self.tpu)
        except ValueError as error:
            found.append(str(error))
        longest = _LONGEST_NAME - 1 - _DIGEST
        if not (_LABEL.fullmatch(self.name) and self.name[0].isalpha() and len(self.name) <= longest):
            rule = f"lower-case letters, digits and hyphens, a letter first, {longest} characters at most"
            found.append(f"name: {self.name!r}; must be {rule}")
        for key, pattern, longest in (
            ("namespace", _LABEL, 63),
            ("queue", _SUBDOMAIN, 63),
            ("service_account", _SUBDOMAIN, 253),
        ):
            value = getattr(self, key)
            if value is not None and not (pattern.fullmatch(value) and len(value) <= longest):
                found.append(f"{key}: {value!r} is no name in Kubernetes (lower-case letters, digits, hyphens)")
        if not 0 <= self.max_restarts < 2**31:
            found.append(f"max_restarts: {self.max_restarts}; must be at least 0, and below 2^31")
        if self.grace < 1:
            found.append(f"grace: {self.grace}; must be at least 1 second")
        return found


def jobset(trials: Sequence[Trial], cluster: Cluster) -> str:
    """One JobSet a trial, as a stream of YAML documents for `kubectl apply -f`.

    A pod that fails or is taken away fails its Job, since the rest of the slice is of no use without it; the JobSet then starts
    all pods anew, and the run resumes.  Not so after the exit statuses that would only come again: they fail the JobSet.

    Raises:
      ValueError: the settings, or work directories that pods would not share; one line a problem.
    """
    problems = cluster.problems()
    problems += [
        f"{trial.name}: work directory {trial.workdir!r} is local and would vanish with the pod; use a remote one (gs://...)"
        for trial in trials
        if not _URL.match(trial.workdir)
    ]
    problems += dict.fromkeys(refusal for trial in trials if (refusal := _refusal(trial.workdir)))
    if problems:
        raise ValueError("\n".join(problems))
    documents = (yaml.safe_dump(_manifest(trial, cluster), sort_keys=False, width=math.inf) for trial in trials)
    return "".join([_header(len(trials), cluster), *(f"---\n{document}" for document in documents)])


def _refusal(workdir: str) -> str:
    """What training would say of a remote work directory; not of buckets of Google's, which may be out of reach from here."""
    if not _URL.match(workdir) or workdir.startswith("gs://"):
        return ""
    try:
        Workdir(workdir).check_bucket()
    except WorkdirError as error:
        return str(error)
    return ""


def _header(count: int, cluster: Cluster) -> str:
    columns = f"JOBSET:.metadata.name,STATE:.status.terminalState,RESTARTS:.status.restarts,TRIAL:.metadata.annotations.{TRIAL}"
    namespace = f" -n {cluster.namespace}" if cluster.namespace else ""
    return (
        f"# {count} trials of `lowrank train`, a JobSet each, on {cluster.tpu}: kubectl apply -f THIS_FILE\n"
        "# The config file has to be in the image at the path after --config=, and the data where the config says.\n"
        "# A JobSet that has ended stays, and has to be deleted before its trial can be given again.\n"
        f"# kubectl get jobsets{namespace} -l {SWEEP}={cluster.name} -o custom-columns={columns}\n"
    )


def _manifest(trial: Trial, cluster: Cluster) -> dict[str, Any]:
    slice_ = parse_tpu(cluster.tpu)
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": _metadata(trial, cluster, slice_),
        "spec": {
            "network": {"enableDNSHostnames": True},  # the hosts of a slice find each other by name
            "failurePolicy": {
                "maxRestarts": cluster.max_restarts,
                "rules": [{"name": "hopeless", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
            },
            "replicatedJobs": [{"name": _JOB, "replicas": 1, "template": {"spec": _job(trial, cluster, slice_)}}],
        },
    }


def _metadata(trial: Trial, cluster: Cluster, slice_: Slice) -> dict[str, Any]:
    # Of the work directory, which ends in the trial's name: two sweeps may have trials of the same name, but two JobSets must
    # not write to one work directory.
    digest = hashlib.sha256(trial.workdir.encode()).hexdigest()[:_DIGEST]
    labels, annotations = {SWEEP: cluster.name}, {TRIAL: trial.name}  # a label's value could not hold the trial's name
    if cluster.queue:
        labels["kueue.x-k8s.io/queue-name"] = cluster.queue
    if slice_.hosts > 1:  # or else pods of one trial could land in the slices of two
        annotations["alpha.jobset.sigs.k8s.io/exclusive-topology"] = "cloud.google.com/gke-nodepool"
    namespace = {"namespace": cluster.namespace} if cluster.namespace else {}
    return {"name": f"{cluster.name}-{digest}", **namespace, "labels": labels, "annotations": annotations}


def _job(trial: Trial, cluster: Cluster, slice_: Slice) -> dict[str, Any]:
    hopeless = {"operator": "In", "values": sorted(HOPELESS)}
    return {
        "parallelism": slice_.hosts,
        "completions": slice_.hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": [{"action": "FailJob", "onExitCodes": hopeless}]},
        "template": {"spec": _pod(trial, cluster, slice_)},
    }


def _pod(trial: Trial, cluster: Cluster, slice_: Slice) -> dict[str, Any]:
    nodes = {
        "cloud.google.com/gke-tpu-accelerator": _ACCELERATORS[slice_.generation],
        "cloud.google.com/gke-tpu-topology": slice_.topology,
    }
    if cluster.spot:
        nodes["cloud.google.com/gke-spot"] = "true"
    return {
        "restartPolicy": "Never",  # what podFailurePolicy requires
        "terminationGracePeriodSeconds": cluster.grace,
        **({"serviceAccountName": cluster.service_account} if cluster.service_account else {}),
        "nodeSelector": nodes,
        "containers": [
            {
                "name": "train",
                "image": cluster.image,
                "command": ["lowrank"],  # no shell in between, so that SIGTERM reaches it
                "args": [word.replace("$", "$$") for word in trial.command],  # Kubernetes would expand $(NAME)
                "resources": {"limits": {"google.com/tpu": slice_.chips_per_host}},
            }
        ],
    }
