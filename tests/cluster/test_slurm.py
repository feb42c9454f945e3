"""The project's own job files on a real SLURM: nothing is lost, whatever ends a job."""

import json
import re
from itertools import pairwise

import pytest

from biomerge_lib.experiment.stages import STAGES

pytestmark = pytest.mark.integration
CURVE = ("loss", "eval_loss", "eval_ner_f1", "greedy_dev_ner_f1", "grad_norm", "learning_rate")


def curve(folder):
    history = json.loads((folder / "log_history.json").read_text())
    return [(entry["step"], name, entry[name]) for entry in history for name in CURVE if name in entry]


def stage(folder, name="03_train"):
    return json.loads((folder / "metrics.json").read_text())["stages"][name]


def checkpoints(folder):
    return {path.name for path in (folder / "checkpoints").glob("checkpoint-*")}


@pytest.mark.parametrize("name", ["job_single_ner", "job_single_ner_h100", "job_sweep_ner"])
def test_slurm_accepts_the_full_size_requests(cluster, name):
    assert "to start at" in cluster.call("sbatch", "--test-only", f"slurm/{name}.sbatch")


def test_a_chain_waits_stage_by_stage(cluster):
    submitted = cluster.call(
        "bash", "slurm/submit_chain.sh", *cluster.tiny, GPU_OPTIONS="--hold", CPU_OPTIONS="--hold"
    )
    jobs = dict(re.findall(r"(\w+): job (\d+),", submitted))
    shown = {name: cluster.show(job) for name, job in jobs.items()}
    cluster.call("scancel", *jobs.values())
    assert list(jobs) == list(STAGES)
    assert shown["01_tokenizer"]["Dependency"] == "(null)"
    for before, name in pairwise(STAGES):
        assert shown[name]["Dependency"] == f"afterok:{jobs[before]}(unfulfilled)"
    gpus = {name: "gpu" in found.get("TresPerNode", "") for name, found in shown.items()}
    assert gpus == {name: stage.device == "gpu" for name, stage in STAGES.items()}


def test_a_chain_makes_the_tokenizer_and_the_data_of_the_jobs_after_it(cluster):
    told = [word for word in cluster.tiny if not word.startswith(("tokenizer_dir", "data_dir"))]
    told += ["corpora=[sample]", "tokenizer_dir=tokenizers/new", "data_dir=data/new"]
    submitted = cluster.call("bash", "slurm/submit_chain.sh", "01_tokenizer", "02_data", *told)
    assert cluster.wait(*re.findall(r"job (\d+),", submitted)) == ["COMPLETED", "COMPLETED"]
    assert (cluster.project / "tokenizers/new/tokenizer.json").is_file()
    assert (cluster.project / "data/new/train.jsonl").read_text().startswith('{"task": "NER"')


def test_a_chain_refuses_a_misspelt_parameter_before_anything_is_submitted(cluster):
    output = cluster.call("bash", "slurm/submit_chain.sh", "learning_rat=1e-3", expect=2)
    assert "Did you mean 'learning_rate'?" in output and "job" not in output


def test_results_come_back_after_success(cluster, campaign):
    assert cluster.state(campaign["whole"]) == cluster.state(campaign["scored"]) == "COMPLETED"
    folder = cluster.runs / "whole"
    assert stage(folder)["status"] == stage(folder, "04_greedy_dev")["status"] == "finished"
    assert {"03_train.ipynb", "04_greedy_dev.ipynb", "merged", "predictions-dev-greedy.jsonl"} <= {
        path.name for path in folder.iterdir()
    }
    assert len(checkpoints(folder)) <= 2  # those that training deleted went here, too
    assert not cluster.workplace(campaign["whole"]).exists()


def test_a_jobs_log_shows_how_training_goes(cluster, campaign):
    log = cluster.log(campaign["whole"])
    told = r"^step (\d+) of \d+, [\d.]+ steps/s, \d:\d\d:\d\d left, (\w+) [\d.]+"
    lines = re.findall(told, log, flags=re.M)
    last = str(stage(cluster.runs / "whole")["metrics"]["steps"])
    assert lines[0] == ("1", "loss") and {
        (last, "loss"),
        (last, "eval_ner_f1"),
        (last, "greedy_dev_ner_f1"),
    } < set(lines)


def test_a_refused_stage_stops_the_chain_says_why_and_leaves_no_run(cluster, campaign):
    assert cluster.state(campaign["broken"]) == "FAILED"
    assert cluster.state(campaign["after"]) == "CANCELLED"
    assert not (cluster.runs / "broken").exists()
    end = cluster.log(campaign["broken"])[-1500:]
    assert "FAILED after" in end and re.search(r"dev\.jsonl:\d+: not JSON", end.partition("FAILED after")[2])
    told = "".join(path.read_text() for path in (cluster.project / "logs").glob("chain-*.txt"))
    assert "not JSON" in told and f"03_train-{campaign['broken']}.out" in told


def test_results_come_back_after_scancel_with_a_last_checkpoint(cluster, campaign):
    assert cluster.state(campaign["cancelled"]) == "CANCELLED"
    folder = cluster.runs / "cancelled"
    newest = max(int(name.rpartition("-")[2]) for name in checkpoints(folder))
    assert 4 < newest < 12 and stage(folder)["status"] == "interrupted"
    assert "The same command goes on from the newest checkpoint" in cluster.log(campaign["cancelled"])
    assert not cluster.workplace(campaign["cancelled"]).exists()


def test_results_and_a_last_checkpoint_come_back_when_slurm_ends_a_job_at_its_limit(cluster, campaign):
    """No warning came before: SIGTERM is the first that the job hears."""
    shown = cluster.show(campaign["expired"])
    assert shown["JobState"] == "TIMEOUT" and shown["Restarts"] == "0"
    folder = cluster.runs / "expired"
    newest = max(int(name.rpartition("-")[2]) for name in checkpoints(folder))
    assert 0 < newest < 24 and stage(folder)["status"] == "interrupted"
    assert (folder / "03_train.ipynb").is_file()
    log = cluster.log(campaign["expired"])
    told = log.replace("received SIGUSR1 (code 19)", "")  # by rsync, when it is stopped while it copies
    assert "SIGUSR1" not in told
    assert "The same command goes on from the newest checkpoint" in log
    assert not cluster.workplace(campaign["expired"]).exists()


def test_a_job_at_its_time_limit_is_requeued_and_ends_like_one_that_was_not(cluster, campaign):
    assert cluster.state(campaign["limited"]) == "COMPLETED"
    log = cluster.log(campaign["limited"])
    assert "SIGUSR1" in log and "stopped after" in log and "requeue 1 of at most 10" in log
    assert cluster.show(campaign["limited"])["Restarts"] == "1"
    whole, limited = cluster.runs / "whole", cluster.runs / "limited"
    assert curve(limited) == curve(whole)
    same = ("eval_ner_f1", "greedy_dev_ner_f1", "train_loss", "steps", "best_checkpoint")
    assert {name: stage(limited)["metrics"][name] for name in same} == {
        name: stage(whole)["metrics"][name] for name in same
    }


def test_a_requeued_job_goes_on_with_its_wandb_run(cluster, campaign, wandb_server):
    known = json.loads((cluster.runs / "limited/wandb.json").read_text())
    run = wandb_server.runs[known["id"]]
    assert [state for state in run["states"] if "preempting" in state or "exitcode" in state][:2] == [
        {"preempting": True},
        {"exitcode": 75},
    ]
    losses = [(entry["_step"], entry["loss"]) for entry in run["history"] if "loss" in entry]
    assert losses == [(step, value) for step, name, value in curve(cluster.runs / "whole") if name == "loss"]


def test_wandb_holds_the_curve_the_parameters_and_the_files(cluster, campaign, wandb_server):
    known = json.loads((cluster.runs / "whole/wandb.json").read_text())
    run = wandb_server.runs[known["id"]]
    config = {
        name: found.get("value") for name, found in json.loads(run["config"]).items() if name != "_wandb"
    }
    assert config["learning_rate"] == 2e-3 and len(config["data_sha256_train"]) == 64
    assert run["project"] == "TaskMerge" and run["displayName"] == "whole"
    logged = set().union(*run["history"])
    assert {"loss", "learning_rate", "eval_ner_f1", "greedy_dev_ner_f1", "tokens_per_second"} <= logged
    assert run["summary"]["eval_ner_f1"] == stage(cluster.runs / "whole")["metrics"]["eval_ner_f1"]
    artifacts = [found for found in wandb_server.artifacts.values() if found["run"] == known["id"]]
    files = {name for found in artifacts for name in found["files"]}
    assert {
        "adapter_model.safetensors",
        "03_train.ipynb",
        "04_greedy_dev.ipynb",
        "predictions-dev-greedy.jsonl",
    } <= files
    assert all(found["committed"] for found in artifacts) and not wandb_server.unknown


def test_jobs_at_once_on_a_node_do_not_collide(cluster, campaign):
    shown = {name: cluster.show(campaign[name]) for name in ("whole", "bereft", "expired")}
    assert max(job["StartTime"] for job in shown.values()) < min(job["EndTime"] for job in shown.values())
    assert {job["NodeList"] for job in shown.values()} == {"node1"}
    trained = curve(cluster.runs / "whole")
    assert trained and curve(cluster.runs / "bereft") == trained
    assert not any(cluster.workplace(campaign[name]).exists() for name in shown)  # each removed its own


def test_a_wandb_server_that_is_killed_costs_a_job_nothing_and_gets_it_later(cluster, campaign, wandb_server):
    folder = cluster.runs / "bereft"
    assert cluster.state(campaign["bereft"]) == "COMPLETED" and stage(folder)["status"] == "finished"
    assert curve(folder) == curve(cluster.runs / "whole")
    log = cluster.log(campaign["bereft"])
    assert "W&B: 03_train was not sent (no network" in log and "wandb-sync runs/bereft" in log
    assert "the server did not take everything" in (folder / "03_train.ipynb").read_text()

    known = json.loads((folder / "wandb.json").read_text())
    assert known["id"] not in wandb_server.runs
    cluster.call("python", "-m", "biomerge_lib", "wandb-sync", "runs/bereft")
    run = wandb_server.runs[known["id"]]
    losses = [(entry["_step"], entry["loss"]) for entry in run["history"] if "loss" in entry]
    assert losses == [(step, value) for step, name, value in curve(folder) if name == "loss"]
    files = [found["files"] for found in wandb_server.artifacts.values() if found["run"] == known["id"]]
    assert ["03_train.ipynb"] in files and any("adapter_model.safetensors" in names for names in files)
