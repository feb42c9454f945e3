"""A tiny random Llama with a small byte-level BPE tokenizer: unit tests in seconds, no weights to load."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["WANDB_MODE"] = "disabled"
# Tiny models run faster on one thread, and many times faster on a busy machine; so do the processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"

from biomerge_lib.core.composition import compose_parameters
from biomerge_lib.core.parameters import Parameters, check_parameters
from biomerge_lib.core.prompt_format import PromptFormat, Rendering
from biomerge_lib.core.records import Record
from biomerge_lib.experiment.runs import quiet_libraries
from biomerge_lib.prompts.manifest import Manifest
from biomerge_lib.prompts.tokenizer import import_transformers

quiet_libraries()
# `make test &` in a script begins with interrupts ignored, which the processes that tests interrupt would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)
ROOT = Path(__file__).resolve().parent.parent
ASPIRIN = Record(
    text="Aspirin can trigger asthma attacks .", spans=((0, 7), (20, 34)), doc_id="example", dataset="example"
)
START = PromptFormat(offset_anchors="start", corpus_cue=False, max_input_tokens=512)
MANIFEST = Manifest(prompt_format=START, max_new_tokens=64)


def render(text: str, style: str, cue: str | None = None) -> Rendering:
    """A text as one style writes it."""
    prompt_format = replace(START, offset_anchors=style, corpus_cue=cue is not None)
    return prompt_format.render(Record(text, (), "doc", "corpus", cue))


def spans_of(predicted: list[list]) -> list[list[tuple[int, int]]]:
    """The offsets of each text's predicted mentions."""
    return [[(mention.start, mention.end) for mention in mentions] for mentions in predicted]


def pytest_addoption(parser: pytest.Parser) -> None:
    words = "inputs of tests/hostile in all (2000); another number also draws others each time, and kills at 20 moments"
    parser.addoption("--hostile", type=int, default=2000, metavar="N", help=words)


def pytest_configure(config: pytest.Config) -> None:
    os.environ["BIOMERGE_HOSTILE"] = str(config.getoption("--hostile"))


EVERYDAY_SECONDS = 10  # of the processor: twice what CONTRIBUTING asks, for slower ones
# These share a cluster, or hand on files; each begins at once, as it takes longest.
TOGETHER = ("cluster", "notebooks")


def pytest_collectstart() -> None:
    """Import transformers without what no test needs, before a test's module does; not where tests are only dealt."""
    import_transformers()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with a slow test come first, so that ``pytest -n`` is not left with one of them at the end."""
    for item in items:
        if item.path.suffix == ".ipynb":  # as long as --nbmake-timeout says
            item.add_marker(pytest.mark.timeout(0))
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path.parent.name not in TOGETHER, item.path not in slow))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Any:
    """A test of everyday (`make check`) takes seconds of the processor; what takes more is marked."""
    began = cpu_seconds()
    result = yield
    took = cpu_seconds() - began
    marked = item.path.suffix == ".ipynb" or {"slow", "integration", "gpu"} & item.keywords.keys()
    if took > EVERYDAY_SECONDS and not marked and item.config.getoption("--hostile") == 2000:
        pytest.fail(
            f"{took:.1f} CPU seconds: make it smaller, or mark it slow or integration (CONTRIBUTING.md)"
        )
    return result


def cpu_seconds() -> float:
    """What this process and those that it has waited for took, however busy the machine is."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> object:
    """With ``pytest -n``: a file's tests stay in one process, and a folder's in ``TOGETHER``.

    pytest-xdist 3.8's own ``--dist loadgroup`` groups nothing under pytest 9.2.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = Path(nodeid.partition("::")[0])
            return path.parent.name if path.parent.name in TOGETHER else str(path)

    config.option.loadscopereorder = False
    return ByFile(config, log)


@pytest.fixture(scope="session")
def plain_tokenizer():
    """A byte-level BPE tokenizer trained on the bundled corpus, without the five tokens; EOS is ``</s>``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from biomerge_lib.corpora.readers import read_corpus

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator((record.text for record in read_corpus("sample")["train"]), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>")


@pytest.fixture(scope="session")
def tiny_backbone(plain_tokenizer, tmp_path_factory) -> Path:
    """A folder with a random two-layer Llama and the plain tokenizer, as a user would name it in ``backbone``."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny") / "tiny-llama"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(plain_tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=1024,
        eos_token_id=plain_tokenizer.eos_token_id,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    plain_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_prepared(tiny_backbone, tmp_path_factory) -> Path:
    """The tiny backbone after 01_tokenizer and the embedding resize: what training loads."""
    from biomerge_lib.model.backbones import build_tokenizer, prepare_backbone

    folder = tmp_path_factory.mktemp("prepared")
    build_tokenizer(str(tiny_backbone), folder / "tok")
    return prepare_backbone(str(tiny_backbone), folder / "tok", folder / "backbones")


@pytest.fixture(scope="session")
def tokenizer(tiny_prepared):
    from biomerge_lib.prompts.tokenizer import load_tokenizer

    return load_tokenizer(tiny_prepared)


def make_tiny_parameters(folder: Path, **overrides) -> Parameters:
    """Parameters of a run of seconds on the tiny backbone, in ``folder``."""
    values = compose_parameters([]).model_dump()
    values |= {
        "runs_dir": str(folder / "runs"),
        "cache_dir": str(folder / "token_cache"),
        "run_id": "tiny",
        "eval_limit": 4,
        "num_train_epochs": 1.0,
        "max_new_tokens": 64,
        "max_target_tokens": 64,
    }
    return check_parameters(values | overrides)


@pytest.fixture
def tiny_parameters(tmp_path):
    return partial(make_tiny_parameters, tmp_path)


@pytest.fixture(scope="session")
def sample_records():
    from biomerge_lib.corpora.readers import read_corpus

    return read_corpus("sample")


@pytest.fixture(scope="session")
def browser():
    """A headless chromium; fails where CI lacks one."""
    import shutil

    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    from tests.support.shared_corpora import skip_but_fail_in_ci

    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        skip_but_fail_in_ci("chromium and chromedriver (Debian: chromium-driver) are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for switch in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1400,1000"):
        options.add_argument(switch)
    with webdriver.Chrome(options=options, service=Service(driver)) as browser:
        yield browser


def notebook_cells(name: str) -> list[dict]:
    """Cells of one of the project's notebooks."""
    path = ROOT / "notebooks" / name
    return json.loads(path.read_text(encoding="utf-8"))["cells"]
