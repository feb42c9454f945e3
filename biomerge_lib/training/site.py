"""Knows whether this machine and its cluster have what a job needs; trains, submits and downloads nothing.

slurm/check_site.sh (modules, SLURM, driver, disk) --> findings <-- the backbone's files or the hub, W&B
"""

from __future__ import annotations

import os
import subprocess

from biomerge_lib.core.errors import BioMergeError
from biomerge_lib.core.files import fingerprint_weights
from biomerge_lib.core.parameters import Parameters
from biomerge_lib.experiment.provenance import PROJECT_DIR
from biomerge_lib.experiment.tracking import why_offline
from biomerge_lib.model.admission import find_source
from biomerge_lib.model.backbones import backbone_name
from biomerge_lib.training.preflight import NOTE, OK, REFUSED, WARNING, Preflight, report_backbone

SCRIPT = PROJECT_DIR / "slurm/check_site.sh"
JOB = (
    "task=ner_span",
    "model=lora_ner_unsloth",
    "runtime=a100",
)  # what slurm/job_single_ner.sbatch begins with


def check_site(parameters: Parameters) -> Preflight:
    """All that a job with these parameters would find and miss here, on a login node or a compute node.

    Takes over the environment that ``slurm/site.sh`` and the modules give a job.

    Raises:
        BioMergeError: the script that looks at the machine did not come to its end.
    """
    looked = subprocess.run(["bash", SCRIPT], capture_output=True, text=True, check=False)
    lines, ended, environment = looked.stdout.partition("\0")
    if not ended:
        raise BioMergeError(f"{SCRIPT} ended with {looked.returncode}: {looked.stderr.strip()}")
    for pair in filter(None, environment.split("\0")):
        name, _, os.environ[name] = pair.partition("=")
    found = Preflight({})
    for line in filter(None, lines.split("\n")):  # a path may hold what splitlines takes for an end
        found.add(*map(str.strip, line.split("\t", 2)))
    report_backbone(found, parameters)
    prepared = PROJECT_DIR / parameters.backbones_dir / backbone_name(parameters.backbone)
    place = prepared if prepared.is_dir() else find_source(parameters.backbone)
    if place and fingerprint_weights(place):
        found.add(OK, "backbone", f"its weights are in {place}")
    else:
        found.add(*_ask_hub(parameters.backbone))
    mode = os.environ.get("WANDB_MODE", parameters.wandb_mode)
    reason = why_offline() if mode == "online" else None
    says = f"offline ({reason}): runs go on, and `python -m biomerge_lib wandb-sync` sends them later"
    found.add(WARNING if reason else OK, "wandb", says if reason else f"wandb_mode={mode}")
    return found


def _ask_hub(backbone: str) -> tuple[str, str, str]:
    from httpx import HTTPError  # what the hub refuses is one, too
    from huggingface_hub import HfApi, constants

    fetch = f"`hf download {backbone}` (16 GB for an 8B, into {constants.HF_HUB_CACHE})"
    try:
        HfApi().auth_check(backbone)
    except (HTTPError, ConnectionError) as error:
        says = f"{backbone} is not here, nor to be had from the hub ({' '.join(str(error).split())}). Of a gated or "
        says += "private model: accept its terms on the hub, then `hf auth login`, or set HF_TOKEN. Without network: "
        says += f"{fetch} where there is one, or copy its folder here and set backbone=/path/to/folder"
        return REFUSED, "backbone", says
    return NOTE, "backbone", f"not here yet: {fetch}, or else the first job fetches it"
