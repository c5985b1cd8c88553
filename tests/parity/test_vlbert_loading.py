"""Where VL-BERT's first weights come from, against recorded ones: equal."""

import pytest
import torch

from data.tokenizers.wordpiece import WordPieceTokenizer
from models.vlbert.loading import classifier_from_words, load_bert, load_pretrained
from models.vlbert.vqa import VLBertForVQA
from tests.parity.fixture_files import load_fixture
from tests.parity.vlbert_fixtures import transformer_config

STRATEGIES = ("standard", "SpotTune", "SpotTune_Block")


@pytest.mark.parametrize("files", ["bert_only", "bert_and_vlbert"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_weights_after_loading(strategy, files):
    recording = load_fixture("vlbert_loading.pt")
    config, inputs, expected = recording["config"], recording["inputs"], recording["outputs"][f"{strategy}_{files}"]
    torch.manual_seed(0)
    model = VLBertForVQA(transformer_config(config["VLBERT"], strategy=strategy), config["ANSWER_VOCAB_SIZE"])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert sorted(before) == sorted(expected["all_keys"])
    load_bert(model, inputs["bert_state_dict"])
    if files == "bert_and_vlbert":
        load_pretrained(model, inputs["pretrain_state_dict"], config["prefix_changes"])
    tokenizer = WordPieceTokenizer(config.get("vocab") or recording["vocab"])
    classifier_from_words(model, [tokenizer.encode(answer) for answer in config["answer_vocab"]])
    state = model.state_dict()
    for name, value in expected["loaded"].items():
        assert torch.allclose(state[name], value, atol=1e-7), name
    partly = {"vlbert.token_type_embeddings.weight", "final_mlp.2.weight"}
    for name in set(expected["random_keys"]) - partly:
        assert torch.equal(state[name], before[name]), name
    copies = {name: value for name, value in state.items() if "parallel_" in name}
    assert all(torch.equal(value, state[name.replace("parallel_", "")]) for name, value in copies.items())
