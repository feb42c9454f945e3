"""The peers of the training benchmark compute what they are compared for."""

import pytest
import torch

from benchmarks.training_peers import count_batch, pad

SENTENCES = [[5, 6, 7, 8, 9], [10, 11, 12], [13, 14, 15, 16, 17, 18, 19]]
LABELS = [[-100, -100, 7, 8, 9], [-100, 11, 12], [-100, -100, -100, -100, 17, 18, 19]]


@pytest.fixture(scope="module")
def model():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval()


def losses(model, batch):
    """The loss of each target token, in the order of the sentences."""
    ids, labels = batch["input_ids"], batch["labels"][:, 1:]
    inputs = {name: values for name, values in batch.items() if name != "labels"}
    with torch.no_grad():
        logits = model(
            **inputs, use_cache=False
        ).logits  # as TRL's Trainer calls it; with a cache no mask is built
    return torch.nn.functional.cross_entropy(
        logits[:, :-1][labels != -100], ids[:, 1:][labels != -100], reduction="none"
    )


def test_trl_packing_without_flash_attention_keeps_sentences_apart(model):
    """TRL warns of it, but SDPA gets a block-diagonal mask from the position ids of its packed rows."""
    from datasets import Dataset
    from trl import pack_dataset
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    data = Dataset.from_dict({"input_ids": SENTENCES, "labels": LABELS})
    packed = pack_dataset(data, 15, "bfd")
    batch = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)(list(packed))
    longest_first = [2, 0, 1]
    assert batch["input_ids"].tolist() == [SENTENCES[2] + SENTENCES[0] + SENTENCES[1]]
    assert count_batch(batch) == (15, 3)
    alone = [
        losses(model, {"input_ids": torch.tensor([SENTENCES[i]]), "labels": torch.tensor([LABELS[i]])})
        for i in longest_first
    ]
    torch.testing.assert_close(losses(model, batch), torch.cat(alone), rtol=1e-5, atol=1e-5)
    merged = batch | {"position_ids": torch.arange(15)[None]}  # what one long sentence would give
    assert (losses(model, merged) - torch.cat(alone)).abs().max() > 1e-3


def test_padding_cuts_at_the_row_and_counts_what_is_real(model):
    examples = [{"input_ids": ids, "labels": labels} for ids, labels in zip(SENTENCES, LABELS, strict=True)]
    cut = pad(examples, pad_token_id=2, row=6)
    assert cut["input_ids"].tolist() == [[5, 6, 7, 8, 9, 2], [10, 11, 12, 2, 2, 2], [13, 14, 15, 16, 17, 18]]
    assert cut["labels"][2].tolist() == [-100, -100, -100, -100, 17, 18]
    assert count_batch(cut) == (14, 3)
    whole = pad(examples, pad_token_id=2, row=None)
    assert whole["input_ids"].shape == (3, 7)
    assert count_batch(whole) == (15, 3)
