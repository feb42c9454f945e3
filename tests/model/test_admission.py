"""A backbone that is not what its name says, or that cannot be trained here, is refused before anything starts."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from biomerge_lib.core.errors import ModelError
from biomerge_lib.model.admission import BUILT_OTHERWISE, TRIED
from biomerge_lib.model.backbones import backbone_name, build_tokenizer, prepare_backbone
from biomerge_lib.model.unsloth_lora_ner import load_causal_lm
from biomerge_lib.prompts.tokenizer import load_tokenizer
from tests.model.families import FAMILIES

LAYER = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def untied(tiny_backbone, tmp_path_factory) -> Path:
    """The tiny backbone with an output layer of its own."""
    folder = tmp_path_factory.mktemp("untied") / "llama"
    shutil.copytree(tiny_backbone, folder)
    LlamaForCausalLM(LlamaConfig.from_pretrained(tiny_backbone, tie_word_embeddings=False)).save_pretrained(
        folder
    )
    return folder


@pytest.fixture
def copy(untied, tmp_path) -> Path:
    return Path(shutil.copytree(untied, tmp_path / "copy"))


def prepare(folder: Path) -> Path:
    place = folder.parent
    build_tokenizer(str(folder), place / "tok")
    return prepare_backbone(str(folder), place / "tok", place / "backbones")


def edit_json(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def lose_a_layer(weights):
    return {name: values for name, values in weights.items() if "layers.1." not in name}


def lose_the_head(weights):
    return {name: values for name, values in weights.items() if "lm_head" not in name}


def prefix_all(weights):
    return {f"base_model.model.{name}": values for name, values in weights.items()}


def narrow_one(weights):
    return weights | {LAYER: torch.ones(16, 64)}


def add_one(weights):
    return weights | {"model.layers.2.mlp.up_proj.weight": torch.ones(2, 2)}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lose_a_layer, r"9 lacking, as model\.layers\.1\.input_layernorm\.weight\)"),
        (lose_the_head, r"1 lacking, as lm_head\.weight\)"),
        (prefix_all, r"21 lacking, as lm_head\.weight; 21 unknown, as base_model\.model\.lm_head\.weight\)"),
        (narrow_one, rf"1 of another shape, as {re.escape(LAYER)}\)"),
        (add_one, r"1 unknown, as model\.layers\.2\.mlp\.up_proj\.weight\)"),
    ],
)
def test_weights_that_are_not_the_models_are_named(copy, change, words):
    weights = load_file(copy / "model.safetensors")
    save_file(change(weights), copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=rf"not the weights of a LlamaForCausalLM \(.*{words}"):
        prepare(copy)
    with pytest.raises(ModelError, match=words):
        load_causal_lm(copy, dtype="float32")
    assert not list((copy.parent / "backbones").glob("copy*"))


def test_tied_weights_and_a_token_head_are_not_missed(tiny_backbone, tmp_path):
    folder = Path(shutil.copytree(tiny_backbone, tmp_path / "tied"))
    weights = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in weights
    head = {"token_head.weight": torch.ones(3, 64), "token_head.bias": torch.ones(3)}
    save_file(weights | head, folder / "model.safetensors", metadata={"format": "pt"})
    assert load_causal_lm(folder, dtype="float32")


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def point(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 269060552\n")


@pytest.mark.parametrize("damage", [halve, point], ids=["truncated", "pointer"])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_file_that_did_not_arrive_whole_is_named(copy, name, damage):
    damage(copy / name)
    words = rf"{re.escape(name)}\S* .*(?i:incomplete download).*Fetch this file again"
    with pytest.raises(ModelError, match=words):
        build_tokenizer(str(copy), copy.parent / "tok")
    assert not (copy.parent / "tok").exists()


def test_a_shard_that_is_missing_is_named(copy):
    shards = {"lm_head.weight": "model-00001-of-00002.safetensors", LAYER: "model-00002-of-00002.safetensors"}
    (copy / "model.safetensors").rename(copy / "model-00002-of-00002.safetensors")
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    words = r"index\.json names model-00001-of-00002\.safetensors, which is missing\. Incomplete download"
    with pytest.raises(ModelError, match=words):
        build_tokenizer(str(copy), copy.parent / "tok")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"quantization_config": {"quant_method": "fp8"}}, r"quantised \(fp8\)\. Take the unquantised model"),
        ({"quantization_config": {"bits": 4}}, r"quantised \(an unnamed method\)"),
        ({"architectures": ["BertForMaskedLM"]}, r"BertForMaskedLM is no causal LM"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "is no causal LM"),
        (
            {"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True},
            "is an encoder-decoder",
        ),
        (
            {"architectures": ["LlavaForConditionalGeneration"], "vision_config": {"depth": 2}},
            "reads images or sound",
        ),
        ({"architectures": ["GPT2LMHeadModel"]}, r"has no `\.model` and `\.lm_head`"),
        ({"architectures": ["GPTNeoXForCausalLM"]}, r"has no `\.model` and `\.lm_head`"),
        (
            {
                "model_type": "new",
                "architectures": ["NewForCausalLM"],
                "auto_map": {"AutoModelForCausalLM": "m.N"},
            },
            r"NewForCausalLM brings its own code \(trust_remote_code\)",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused_by_its_configuration_alone(copy, config, words):
    (copy / "model.safetensors").unlink()
    edit_json(copy / "config.json", **config)
    with pytest.raises(ModelError, match=rf"config\.json: .*{words}.*docs/backbones\.md"):
        build_tokenizer(str(copy), copy.parent / "tok")


def test_code_of_its_own_beside_a_family_that_transformers_has_is_left_alone(copy):
    edit_json(copy / "config.json", auto_map={"AutoModelForCausalLM": "modeling_llama.LlamaForCausalLM"})
    assert (prepare(copy) / "model.safetensors").is_file()


def test_every_family_is_in_the_table_and_all_others_of_transformers_are_built_as_told():
    assert list(TRIED) == [family.model_type for family in FAMILIES]
    auto = Path(transformers.__file__).parent / "models"
    names = re.search(
        r"MODEL_FOR_CAUSAL_LM_MAPPING_NAMES = OrderedDict\((.*?)\n\)",
        (auto / "auto/modeling_auto.py").read_text(),
        re.DOTALL,
    )
    wanted = set(re.findall(r'"(\w+)ForCausalLM"', names[1]))
    found = set()
    for path in auto.glob("*/modeling_*.py"):
        for name, body in re.findall(
            r"^class (\w+)ForCausalLM\((.*?)(?=^class |\Z)", path.read_text(), re.DOTALL | re.MULTILINE
        ):
            if name in wanted and not ("self.model =" in body and "self.lm_head =" in body):
                found.add(name)
    assert found == set(BUILT_OTHERWISE)


def test_a_hub_name_is_kept_whole_and_an_earlier_folder_is_taken_over(tiny_backbone, tmp_path, monkeypatch):
    assert backbone_name("one/Llama-3-8B") != backbone_name("other/Llama-3-8B")
    monkeypatch.chdir(tmp_path)
    build_tokenizer(str(tiny_backbone), "tok")
    earlier = prepare_backbone(str(tiny_backbone), "tok", "backbones").rename(tmp_path / "backbones/model")
    edit_json(earlier / "biomerge.json", backbone="org/model")
    assert prepare_backbone("org/model", "tok", "backbones") == Path("backbones/org--model")
    assert not earlier.exists()


def test_a_hub_name_is_read_from_what_was_downloaded_of_it(untied, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    for owner in ("one", "other"):
        place = tmp_path / f"hub/models--{owner}--llama"
        shutil.copytree(untied, place / "snapshots/0123abc")
        (place / "refs").mkdir()
        (place / "refs/main").write_text("0123abc")
    edit_json(place / "snapshots/0123abc/config.json", quantization_config={"quant_method": "awq"})
    build_tokenizer("one/llama", tmp_path / "tok")
    prepared = prepare_backbone("one/llama", tmp_path / "tok", tmp_path / "backbones")
    assert prepared.name == "one--llama" and json.loads((prepared / "biomerge.json").read_text())["source"]
    with pytest.raises(ModelError, match=r"set another tokenizer_dir"):
        build_tokenizer("other/llama", tmp_path / "tok")
    with pytest.raises(ModelError, match=r"config\.json: its weights are quantised \(awq\)"):
        build_tokenizer("other/llama", tmp_path / "other_tok")
    shutil.rmtree(tmp_path / "hub")  # a prepared backbone and a built tokenizer need it no longer
    assert build_tokenizer("one/llama", tmp_path / "tok")[1] == 0
    assert prepare_backbone("one/llama", tmp_path / "tok", tmp_path / "backbones") == prepared


def test_spellings_of_one_folder_are_one_source(copy, monkeypatch):
    monkeypatch.chdir(copy.parent)
    spellings = ["copy", "copy/", "./copy", str(copy)]
    assert [build_tokenizer(spelling, "tok")[1] for spelling in spellings] == [5, 0, 0, 0]
    assert len({prepare_backbone(spelling, "tok", "backbones") for spelling in spellings}) == 1


def test_new_files_in_the_same_folder_are_refused(copy):
    prepared = prepare(copy)
    LlamaForCausalLM(LlamaConfig.from_pretrained(copy)).save_pretrained(copy)
    with pytest.raises(ModelError, match=r"backbones.*was made from other files than .*copy holds now"):
        prepare(copy)
    shutil.rmtree(prepared)
    assert prepare(copy) == prepared
    (copy / "tokenizer.json").write_text((copy / "tokenizer.json").read_text() + "\n")
    with pytest.raises(ModelError, match=r"tok was made from other files than .*Delete that folder"):
        build_tokenizer(str(copy), copy.parent / "tok")
    shutil.rmtree(copy)  # a prepared backbone stands alone
    edit_json(prepared / "biomerge.json", source=None)  # as earlier ones
    assert load_tokenizer(prepared)


TEXT = "TNF-α in 20  mg\n"


@pytest.mark.parametrize("bos", [False, True])
def test_a_class_that_is_not_the_files_gives_way_to_the_file(copy, bos):
    in_file = Tokenizer.from_file(str(copy / "tokenizer.json"))
    if bos:
        in_file.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 0)])
        in_file.save(str(copy / "tokenizer.json"))
    edit_json(copy / "tokenizer_config.json", tokenizer_class="LlamaTokenizer", bos_token="</s>")
    assert AutoTokenizer.from_pretrained(copy)(TEXT)["input_ids"] != in_file.encode(TEXT).ids
    tokenizer, _ = build_tokenizer(str(copy), copy.parent / "tok")
    assert tokenizer(TEXT)["input_ids"] == in_file.encode(TEXT).ids
    assert (tokenizer(TEXT)["input_ids"][0] == 0) == bos


def test_a_bos_that_is_asked_for_and_never_written_is_refused(copy):
    edit_json(copy / "tokenizer_config.json", add_bos_token=True, bos_token="</s>")
    with pytest.raises(ModelError, match=r"add_bos_token=true, and tokenizer\.json puts no BOS"):
        build_tokenizer(str(copy), copy.parent / "tok")


def test_an_added_token_with_the_id_of_a_word_is_refused(copy):
    said = json.loads((copy / "tokenizer.json").read_text())
    by_id = {index: word for word, index in said["model"]["vocab"].items()}
    del said["model"]["vocab"][by_id[597]]
    said["model"]["merges"] = [pair for pair in said["model"]["merges"] if "".join(pair) != by_id[597]]
    (copy / "tokenizer.json").write_text(json.dumps(said))
    with pytest.raises(
        ModelError, match=rf"has the id of {re.escape(repr(by_id[599]))}, as the vocabulary has a hole"
    ):
        build_tokenizer(str(copy), copy.parent / "tok")


def test_words_beyond_the_embedding_are_refused_and_special_tokens_are_not(copy):
    tokenizer = AutoTokenizer.from_pretrained(copy)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})  # as Gemma 3's
    tokenizer.save_pretrained(copy)
    prepare(copy)
    edit_json(copy / "config.json", vocab_size=590)
    with pytest.raises(ModelError, match=r"10 words of the tokenizer, as '.*', are beyond the 590 rows"):
        build_tokenizer(str(copy), copy.parent / "other")
