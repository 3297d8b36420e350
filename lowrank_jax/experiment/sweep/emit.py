"""A sweep as text, for clusters without Ray: shell lines for a batch system, or manifests for Kubernetes.

Nothing here runs or watches a trial.  That is enough because `lowrank train` resumes: the same command on the same work
directory continues the run, so whatever restarts a line or a pod restarts the run.
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
    """One `lowrank train` per line, quoted for sh.

    Raises:
      ValueError: a value contains a line break.
    """
    broken = [trial.name for trial in trials if any("\n" in word for word in trial.command)]
    if broken:
        raise ValueError(f"a value contains a line break, which --emit=sh cannot write: {', '.join(broken)}")
    hopeless = ", ".join(map(str, HOPELESS))
    head = [
        f"# {len(trials)} trials of `lowrank train`, one per line, in any order, wherever the work directories are reachable.",
        f"# Exit status {INTERRUPTED}: run the line again to resume; {hopeless}: a rerun would fail again.",
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
    """Parses a slice that GKE offers; see `slices.parse`.

    Raises:
      ValueError: there is no such slice.
    """
    try:
        slice_ = slices.parse(text)
        if slice_.generation not in _ACCELERATORS:
            raise ValueError(f"{slice_.generation} is not available for JobSets; available: {', '.join(_ACCELERATORS)}")
    except ValueError as error:
        raise ValueError(f"tpu: {error}") from None
    return slice_


@dataclasses.dataclass(frozen=True)
class JobSetSettings:
    """Where and how the pods of a sweep run.

    Attributes:
      image: container image with `lowrank`, jax for TPUs, and the config file at the path after --config=, relative to the
        image's working directory; a config that comes with lowrank needs no file.
      tpu: the slice of each trial; see `parse_tpu`.
      name: of the sweep: label of its JobSets and prefix of their names.
      namespace: of Kubernetes; None: kubectl's current one.
      queue: a LocalQueue of Kueue; without it all trials request their slices at once.
      service_account: of Kubernetes; must be able to read and write the work directories and read the data; None: the
        namespace's default.
      spot: request spot nodes.
      max_restarts: of each trial, after preemptions and crashes.
      grace: seconds from SIGTERM to SIGKILL, for finishing a step and saving.  An upper bound: a spot node gives less, 15
        unless its pool says otherwise, and then progress since the last `checkpoint.every` may be lost.
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
        """What is wrong with the settings, one line per problem."""
        found = [] if re.fullmatch(r"\S+", self.image) else [f"image: {self.image!r} is not the name of a container image"]
        try:
            parse_tpu(self.tpu)
        except ValueError as error:
            found.append(str(error))
        longest = _LONGEST_NAME - 1 - _DIGEST
        if not (_LABEL.fullmatch(self.name) and self.name[0].isalpha() and len(self.name) <= longest):
            rule = f"lower-case letters, digits and hyphens, starting with a letter, at most {longest} characters"
            found.append(f"name: {self.name!r}; must be {rule}")
        for key, pattern, longest in (
            ("namespace", _LABEL, 63),
            ("queue", _SUBDOMAIN, 63),
            ("service_account", _SUBDOMAIN, 253),
        ):
            value = getattr(self, key)
            if value is not None and not (pattern.fullmatch(value) and len(value) <= longest):
                found.append(f"{key}: {value!r} is not a valid name in Kubernetes (lower-case letters, digits, hyphens)")
        if not 0 <= self.max_restarts < 2**31:
            found.append(f"max_restarts: {self.max_restarts}; must be at least 0 and below 2^31")
        if self.grace < 1:
            found.append(f"grace: {self.grace}; must be at least 1 second")
        return found


def jobset(trials: Sequence[Trial], settings: JobSetSettings) -> str:
    """One JobSet per trial, as a stream of YAML documents for `kubectl apply -f`.

    A pod that fails or is preempted fails its Job, because the rest of the slice is useless without it; the JobSet then
    restarts all pods, and the run resumes.  Exit statuses that a restart would only repeat fail the JobSet instead.

    Raises:
      ValueError: invalid settings, or work directories that pods cannot share; one line per problem.
    """
    problems = settings.problems()
    problems += [
        f"{trial.name}: work directory {trial.workdir!r} is local and would be lost with the pod; use a remote one (gs://...)"
        for trial in trials
        if not _URL.match(trial.workdir)
    ]
    problems += dict.fromkeys(refusal for trial in trials if (refusal := _refusal(trial.workdir)))
    if problems:
        raise ValueError("\n".join(problems))
    documents = (yaml.safe_dump(_manifest(trial, settings), sort_keys=False, width=math.inf) for trial in trials)
    return "".join([_header(len(trials), settings), *(f"---\n{document}" for document in documents)])


def _refusal(workdir: str) -> str:
    """Training's error for a remote work directory; not checked for gs://, which may be unreachable from here."""
    if not _URL.match(workdir) or workdir.startswith("gs://"):
        return ""
    try:
        Workdir(workdir).check_bucket()
    except WorkdirError as error:
        return str(error)
    return ""


def _header(count: int, settings: JobSetSettings) -> str:
    columns = f"JOBSET:.metadata.name,STATE:.status.terminalState,RESTARTS:.status.restarts,TRIAL:.metadata.annotations.{TRIAL}"
    namespace = f" -n {settings.namespace}" if settings.namespace else ""
    return (
        f"# {count} trials of `lowrank train`, one JobSet each, on {settings.tpu}: kubectl apply -f THIS_FILE\n"
        "# The image must contain the config file at the path after --config=, or have it by its name;\n"
        "# the data must be where the config says.\n"
        "# A finished JobSet stays; delete it before applying its trial again.\n"
        f"# kubectl get jobsets{namespace} -l {SWEEP}={settings.name} -o custom-columns={columns}\n"
    )


def _manifest(trial: Trial, settings: JobSetSettings) -> dict[str, Any]:
    slice_ = parse_tpu(settings.tpu)
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": _metadata(trial, settings, slice_),
        "spec": {
            "network": {"enableDNSHostnames": True},  # the hosts of a slice find each other by name
            "failurePolicy": {
                "maxRestarts": settings.max_restarts,
                "rules": [{"name": "hopeless", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
            },
            "replicatedJobs": [{"name": _JOB, "replicas": 1, "template": {"spec": _job(trial, settings, slice_)}}],
        },
    }


def _metadata(trial: Trial, settings: JobSetSettings, slice_: Slice) -> dict[str, Any]:
    # A digest of the work directory: two sweeps may have trials of one name, but two JobSets must not share a work directory.
    digest = hashlib.sha256(trial.workdir.encode()).hexdigest()[:_DIGEST]
    labels, annotations = {SWEEP: settings.name}, {TRIAL: trial.name}  # a label cannot contain it
    if settings.queue:
        labels["kueue.x-k8s.io/queue-name"] = settings.queue
    if slice_.hosts > 1:  # otherwise pods of a trial could land in several slices
        annotations["alpha.jobset.sigs.k8s.io/exclusive-topology"] = "cloud.google.com/gke-nodepool"
    namespace = {"namespace": settings.namespace} if settings.namespace else {}
    return {"name": f"{settings.name}-{digest}", **namespace, "labels": labels, "annotations": annotations}


def _job(trial: Trial, settings: JobSetSettings, slice_: Slice) -> dict[str, Any]:
    hopeless = {"operator": "In", "values": sorted(HOPELESS)}
    return {
        "parallelism": slice_.hosts,
        "completions": slice_.hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": [{"action": "FailJob", "onExitCodes": hopeless}]},
        "template": {"spec": _pod(trial, settings, slice_)},
    }


def _pod(trial: Trial, settings: JobSetSettings, slice_: Slice) -> dict[str, Any]:
    nodes = {
        "cloud.google.com/gke-tpu-accelerator": _ACCELERATORS[slice_.generation],
        "cloud.google.com/gke-tpu-topology": slice_.topology,
    }
    if settings.spot:
        nodes["cloud.google.com/gke-spot"] = "true"
    return {
        "restartPolicy": "Never",  # required by podFailurePolicy
        "terminationGracePeriodSeconds": settings.grace,
        **({"serviceAccountName": settings.service_account} if settings.service_account else {}),
        "nodeSelector": nodes,
        "containers": [
            {
                "name": "train",
                "image": settings.image,
                "command": ["lowrank"],  # no shell in between, so that SIGTERM reaches it
                "args": [word.replace("$", "$$") for word in trial.command],  # Kubernetes would expand $(NAME)
                "resources": {"limits": {"google.com/tpu": slice_.chips_per_host}},
            }
        ],
    }
