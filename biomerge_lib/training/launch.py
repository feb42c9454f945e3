"""Knows how a run's training is started: in this process, or in several under torchrun.

``python -m biomerge_lib.training.launch RUN_FOLDER`` is what each torchrun process executes.
"""

from __future__ import annotations

import itertools
import os
import re
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import IO, Any, cast

from biomerge_lib.core.errors import BioMergeError
from biomerge_lib.core.files import OBJECT, read_values
from biomerge_lib.core.parameters import Parameters
from biomerge_lib.core.records import Record
from biomerge_lib.experiment.recorded import load_run_parameters
from biomerge_lib.experiment.runs import PROJECT_DIR, quiet_libraries
from biomerge_lib.model.backbones import prepare_backbone
from biomerge_lib.model.unsloth_lora_ner import import_backend
from biomerge_lib.prompts.ner_span import read_training_splits

_TORCHRUN = "elastic/multiprocessing/api.py"  # in the first line that it writes when a process has failed
_KILLED = re.compile(r"failed \(exitcode: -(\d+)\) local_rank: (\d+)")


def train_run(
    folder: Path, parameters: Parameters, records: dict[str, list[Record]] | None = None
) -> dict[str, Any]:
    """Train the run in ``folder`` (or go on with it) and return its metrics; see :func:`run.train`.

    ``records`` are those of :func:`read_training_splits`, where they have been read; torchrun's processes read for
    themselves.

    With ``num_processes`` > 1 or DeepSpeed, torchrun starts the processes on this node; their output is shown here.

    Raises:
        BioMergeError: a process failed; the processes' last lines are in the message.
    """
    done = folder / "training.json"
    if done.is_file():
        print(f"{folder.name} is trained already; existing_run=replace trains it anew.")
    elif parameters.num_processes == 1 and not parameters.deepspeed:
        return _train_here(folder, parameters, records or read_training_splits(parameters))
    else:
        # Prepared once, before the processes look for it all at the same time.
        prepare_backbone(parameters.backbone, parameters.tokenizer_dir, parameters.backbones_dir)
        _torchrun(folder, parameters.num_processes)
    return read_values(done, OBJECT, cure=" Delete it: 03_train then ends from its last checkpoint.")


def _train_here(folder: Path, parameters: Parameters, records: dict[str, list[Record]]) -> dict[str, Any]:
    import_backend(parameters.backend)
    from biomerge_lib.prompts.tokenizer import load_tokenizer
    from biomerge_lib.training.run import build_model, build_trainer, train

    backbone = prepare_backbone(parameters.backbone, parameters.tokenizer_dir, parameters.backbones_dir)
    model, tokenizer = build_model(parameters, backbone), load_tokenizer(backbone)
    trainer = build_trainer(model, tokenizer, records, parameters, checkpoints=folder / "checkpoints")
    if trainer.is_world_process_zero():
        trained, total = model.num_parameters(only_trainable=True), model.num_parameters()
        print(f"training {trained:,} of {total:,} weights ({trained / total:.1%})")
    return train(trainer, folder)


def _torchrun(folder: Path, processes: int) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += ["-m", "biomerge_lib.training.launch", str(folder)]
    # Threads of each; torchrun's own choice is one, and a banner.
    threads = max(1, len(os.sched_getaffinity(0)) // processes)
    environment = {"OMP_NUM_THREADS": str(threads)} | os.environ
    environment["PYTHONPATH"] = os.pathsep.join([str(PROJECT_DIR), os.environ.get("PYTHONPATH", "")])
    lines: list[str] = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        try:
            for line in cast(IO[str], process.stdout):  # a pipe
                lines.append(line)
                if "%|" not in line:  # progress bars are for terminals
                    print(line, end="")
        except BaseException:  # an interrupt: torchrun ends its processes
            process.terminate()
            raise
    if process.returncode:
        if killed := _KILLED.search("".join(lines)):
            number, rank = int(killed[1]), killed[2]
            raise BioMergeError(
                f"training process {rank} of {processes} (counted from 0) was ended by signal {number} "
                f"({signal.strsignal(number)}), and the others with "
                "it: the machine ran out of memory, or someone killed it. The same command goes on from the newest "
                "checkpoint."
            )
        # Else torchrun's own words hide the processes' last ones.
        own = list(itertools.takewhile(lambda line: _TORCHRUN not in line, lines))
        raise BioMergeError(f"torchrun ended with {process.returncode}:\n{''.join((own or lines)[-30:])}")


def take_gpu() -> None:
    """Make a torchrun process's own GPU the current one, before anything is loaded to the first.

    Raises:
        BioMergeError: there are fewer GPUs than processes.
    """
    import torch

    gpus, processes = torch.cuda.device_count(), int(os.environ["LOCAL_WORLD_SIZE"])
    if gpus and processes > gpus:
        raise BioMergeError(
            f"num_processes={processes}, but PyTorch sees {gpus} GPU{'s' * (gpus > 1)} here: lower it, or let the job "
            "ask for more."
        )
    if gpus:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))


def main() -> int:
    quiet_libraries()
    # Of names that DeepSpeed and accelerate still use.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    folder = Path(sys.argv[1])
    try:
        take_gpu()
        parameters = load_run_parameters(folder)
        _train_here(folder, parameters, read_training_splits(parameters))
    except BioMergeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
