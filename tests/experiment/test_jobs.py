"""A job and its run: stopping leaves no trace in the curve, the archive gives back what it was given."""

import json
import os
import subprocess
import sys
import time

import pytest
from transformers import TrainerCallback

from biomerge_lib.core.errors import BioMergeError
from biomerge_lib.experiment import jobs
from biomerge_lib.training import run as training
from tests.conftest import ROOT, make_tiny_parameters

FROM_A_KERNEL = "from biomerge_lib.experiment.jobs import note_progress; note_progress('step 1 of 2')"
CURVE = ("loss", "eval_loss", "eval_ner_f1", "greedy_dev_ner_f1", "grad_norm", "learning_rate")


@pytest.fixture
def job_dir(tmp_path, monkeypatch):
    folder = tmp_path / "messages"
    folder.mkdir()
    monkeypatch.setenv(jobs.JOB_DIR, str(folder))
    return folder


@pytest.fixture(scope="module")
def train(tiny_prepared, tokenizer, sample_records, tmp_path_factory):
    """Trains run NAME on 12 sentences, 3 steps an epoch; ``at_step`` maps steps to what happens there."""

    place = tmp_path_factory.mktemp("jobs")

    def run(name, at_step=None, **overrides):
        values = {"eval_steps": 2, "save_steps": 2, "num_train_epochs": 3.0, "backend": "peft"}
        parameters = make_tiny_parameters(place, **values | {"early_stopping_patience": 100} | overrides)
        splits = {
            split: [r for r in sample_records[split] if len(r.text) < 90 and r.spans]
            for split in ("train", "dev")
        }
        records = {"train": splits["train"][:12], "dev": splits["dev"][:4]}
        folder = place / name
        trainer = training.build_trainer(
            training.build_model(parameters, tiny_prepared),
            tokenizer,
            records,
            parameters,
            checkpoints=folder / "checkpoints",
        )

        class AtStep(TrainerCallback):
            def on_step_begin(self, args, state, control, **kwargs):
                (at_step or {}).get(state.global_step + 1, lambda: None)()

        trainer.add_callback(AtStep())
        return training.train(trainer, folder), folder

    return run


@pytest.fixture(scope="module")
def whole(train):
    return train("whole")


def curve(folder):
    history = json.loads((folder / "log_history.json").read_text())
    return [(entry["step"], name, entry[name]) for entry in history for name in CURVE if name in entry]


@pytest.mark.integration
@pytest.mark.parametrize(("asked_at", "stopped_at"), [(1, 1), (3, 4), (5, 5), (6, 7)])
def test_a_stopped_run_resumes_to_the_same_curve(train, whole, job_dir, asked_at, stopped_at):
    """An epoch has three steps: its last one is finished, with its evaluation, before training stops."""
    name = f"stopped-{asked_at}"
    with pytest.raises(jobs.RunInterrupted, match=f"after {stopped_at} steps"):
        train(name, {asked_at: (job_dir / "stop").touch})
    folder = whole[1].with_name(name)
    assert (folder / f"checkpoints/checkpoint-{stopped_at}/trainer_state.json").is_file()
    assert (job_dir / "interrupted").read_text() == f"checkpoint-{stopped_at} of 9 steps\n"
    assert not (folder / "training.json").exists()
    (job_dir / "stop").unlink()
    resumed, _ = train(name)
    assert curve(folder) == curve(whole[1])
    for metric in ("eval_ner_f1", "greedy_dev_ner_f1", "train_loss", "steps", "best_checkpoint"):
        assert resumed[metric] == whole[0][metric]


@pytest.mark.integration
def test_a_request_at_the_last_step_comes_too_late_to_stop(train, job_dir):
    assert train("late", {9: (job_dir / "stop").touch})[0]["steps"] == 9


@pytest.mark.integration
def test_early_stopping_goes_on_counting_after_an_interruption(train, job_dir):
    never_better = {"early_stopping_patience": 3, "early_stopping_threshold": 2.0}
    assert (
        train("early", **never_better)[0]["steps"] == 6
    )  # evaluations at 2, 3, 4 and 6; the first one is a gain
    with pytest.raises(jobs.RunInterrupted):
        train("early-stopped", {5: (job_dir / "stop").touch}, **never_better)
    (job_dir / "stop").unlink()
    assert train("early-stopped", **never_better)[0]["steps"] == 6


def test_outside_a_job_nothing_is_asked_or_told(tmp_path, monkeypatch):
    monkeypatch.delenv(jobs.JOB_DIR, raising=False)
    monkeypatch.delenv(jobs.ARCHIVE, raising=False)
    jobs.note_failure("x")
    assert not jobs.stop_requested() and not jobs.was_interrupted()
    assert jobs.archived_run(tmp_path / "run") == tmp_path / "run"


def test_a_run_is_fetched_whole_without_what_is_too_large_or_anothers(tmp_path, monkeypatch):
    archive, folder = tmp_path / "archive", tmp_path / "node/runs/a"
    monkeypatch.setenv(jobs.ARCHIVE, str(archive))
    for name in ("parameters.yaml", "checkpoints/checkpoint-4/x", "merged/model", "wandb/run-1/y", ".lock"):
        (archive / "a" / name).parent.mkdir(parents=True, exist_ok=True)
        (archive / "a" / name).write_text(name)
    folder.parent.mkdir(parents=True)
    jobs.fetch_run(folder)
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert found == {"parameters.yaml", "checkpoints/checkpoint-4/x"}
    assert jobs.kept_path(folder / "03_train.ipynb") == archive / "a/03_train.ipynb"
    monkeypatch.delenv(jobs.ARCHIVE)
    (tmp_path / "workplace").mkdir()
    (tmp_path / "workplace/runs").symlink_to(archive)  # of a job that works in the archive
    assert jobs.kept_path(tmp_path / "workplace/runs/a/02_data.ipynb") == archive / "a/02_data.ipynb"


def test_a_job_that_makes_its_data_first_still_finds_the_training_in_the_archive(tmp_path, monkeypatch):
    archive, folder = tmp_path / "archive/a", tmp_path / "node/runs/a"
    monkeypatch.setenv(jobs.ARCHIVE, str(archive.parent))
    for place, stages in ((archive, {"02_data": 1, "03_train": 1}), (folder, {"02_data": 2})):
        place.mkdir(parents=True)
        (place / "metrics.json").write_text(json.dumps({"run_id": "a", "stages": stages}))
        (place / "02_data.ipynb").write_text(str(stages["02_data"]))
    (archive / "parameters.yaml").write_text("x")
    (archive / "checkpoints/checkpoint-4").mkdir(parents=True)
    assert jobs.archived_run(folder) == archive  # what existing_run=replace moves aside
    jobs.fetch_run(folder)
    recorded = json.loads((folder / "metrics.json").read_text())
    assert recorded == {"run_id": "a", "stages": {"02_data": 2, "03_train": 1}}
    assert (folder / "02_data.ipynb").read_text() == "2" and (folder / "checkpoints/checkpoint-4").is_dir()


def test_a_fetch_that_fails_leaves_no_folder(tmp_path, monkeypatch):
    monkeypatch.setenv(jobs.ARCHIVE, str(tmp_path / "archive"))
    (tmp_path / "archive/a").mkdir(parents=True)
    (tmp_path / "archive/a/parameters.yaml").write_text("x")
    (tmp_path / "archive/a/gone").symlink_to(tmp_path / "nowhere")
    with pytest.raises(BioMergeError, match="could not be copied"):
        jobs.fetch_run(tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["archive"]


def test_two_processes_do_not_train_the_same_run(tmp_path):
    with (
        jobs.only_one(tmp_path / "a"),
        pytest.raises(BioMergeError, match="another process is training this run"),
        jobs.only_one(tmp_path / "a"),
    ):
        pass
    with jobs.only_one(tmp_path / "a"), jobs.only_one(tmp_path / "b"):
        pass


COMMON = ROOT / "slurm/common.sh"


def end_job(tmp_path, *, copying):
    """What a staged job does at its end; ``copying`` is the status of rsync then."""
    for name in ("biomerge_lib", "notebooks", "parameters", "data"):
        (tmp_path / "project" / name).mkdir(parents=True, exist_ok=True)
    for name in ("archive", "tmp"):
        (tmp_path / name).mkdir(exist_ok=True)
    script = f"""
      SLURM_JOB_ID=7 MODULES= MIN_TMP_GB=0
      WORKROOT={tmp_path}/project ARCHIVE={tmp_path}/archive TMPDIR={tmp_path}/tmp
      source {COMMON}
      rsync() {{ return "$status"; }}
      trap on_exit EXIT
      status=0
      make_workplace staged
      echo results >"$WORKPLACE/runs/results"
      status={copying}"""
    return subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)


def test_a_job_removes_its_workplace_when_its_results_are_copied_and_only_then(tmp_path):
    workplace = tmp_path / "tmp/biomerge-7"
    done = end_job(tmp_path, copying=0)
    assert (done.returncode, workplace.exists()) == (0, False)
    done = end_job(tmp_path, copying=23)
    assert done.returncode == 74
    assert f"results could not be copied to {tmp_path}/archive (above)" in done.stdout
    assert (workplace / "runs/results").read_text() == "results\n"
    done = end_job(tmp_path, copying=0)  # requeued on this node
    assert done.returncode == 2
    assert f"this job left results in {workplace}/runs that could not be copied" in done.stdout
    assert (workplace / "runs/results").read_text() == "results\n"


def test_what_is_noted_is_printed_at_once_and_to_the_last_line(capfd, monkeypatch):
    monkeypatch.delenv(jobs.PROGRESS, raising=False)
    jobs.note_progress("nobody waits")
    with jobs.progress_shown():
        subprocess.run([sys.executable, "-c", FROM_A_KERNEL], check=True)
        while "step 1 of 2" not in (said := capfd.readouterr().err):
            time.sleep(0.1)
        jobs.note_progress("step 2 of 2")
    assert said + capfd.readouterr().err == "step 1 of 2\nstep 2 of 2\n"
    assert jobs.PROGRESS not in os.environ
    monkeypatch.setenv(jobs.PROGRESS, "/nowhere/progress")
    jobs.note_progress("ends no training")


def test_a_bar_notes_rate_and_time_left_at_once_and_then_twice_a_minute(tmp_path, monkeypatch):
    monkeypatch.setenv(jobs.PROGRESS, str(tmp_path / "progress"))
    clock = iter([1000.0, 1000.0, 1010.0, 1040.0, 1040.0])
    monkeypatch.setattr(jobs.time, "monotonic", lambda: next(clock))
    with jobs.progress_bar(400, "decoding dev", done=100) as bar:
        bar._time = lambda: bar.start_t + 20
        for answers in (10, 20, 30):
            bar.update(answers)
    with jobs.progress_bar(8, None) as silent:
        silent.update(8)
    assert (tmp_path / "progress").read_text().splitlines() == [
        "decoding dev: 110 of 400 sentences, 0.50 a second, 0:09:40 left",
        "decoding dev: 160 of 400 sentences, 3.00 a second, 0:01:20 left",
    ]


def site_values(tmp_path, site, **given):
    """What ``slurm/common.sh`` makes of a site file and an environment."""
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm/site.sh").write_text(site)
    names = ("ARCHIVE", "MODULES", "VENV", "HF_HOME", "SBATCH_PARTITION")
    shown = "; ".join(f'echo "{name}=${{{name}-}}"' for name in names)
    environment = {"PATH": os.environ["PATH"], "WORKROOT": str(tmp_path), **given}
    script = f"source {COMMON}; bash -c '{shown}'; echo VENV=$VENV"
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=True)
    return dict(line.split("=", 1) for line in done.stdout.splitlines())


def test_a_site_file_is_read_and_the_environment_counts_more(tmp_path):
    site = "export HF_HOME=/scratch/hub\nSBATCH_PARTITION='a b'\nARCHIVE=/from/file\n"
    values = site_values(tmp_path, site, ARCHIVE="/it's given")
    assert values["ARCHIVE"] == "/it's given"
    assert values["HF_HOME"] == "/scratch/hub" and values["SBATCH_PARTITION"] == "a b"
    assert values["VENV"] == f"{tmp_path}/.venv" and values["MODULES"] == ""


def test_the_example_of_a_site_file_sets_nothing_and_is_nobodys_own():
    example = (ROOT / "slurm/site.example.sh").read_text()
    assert not [line for line in example.splitlines() if line and not line.startswith("#")]
    offered = {line for line in example.splitlines() if line.startswith("#export ")}
    assert len(offered) > 8
    assert "$HOME/nmishra" not in COMMON.read_text()
