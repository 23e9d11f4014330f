"""The base's VLM phases: labels, the attention loss against probabilities, and that scores are the model's own."""

import numpy as np
import pytest
import torch

from burnish.data.questions import make_questions
from workshop.pretrain import PretrainConfig, pretrain, sincos_2d
from workshop.pretrain_grounding import GroundingPhase, match_rms, name_texts
from workshop.pretrain_vision import OTHERS, VisionPhase, attention_loss, grid_targets, located_names

WORDS = {"ball": 0, "cube": 1, "red": 2}


@pytest.fixture(scope="module")
def vlm(nano_vlm):
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(nano_vlm, attn_implementation="eager").eval()


def test_located_names():
    rows = [
        {"kind": "where", "question": "where is the red cube?", "answer": "x 40 y 7"},
        {"kind": "count", "question": "how many cubes are there?", "answer": "1"},
    ]
    assert located_names(rows) == [(("red", "cube"), 0.405, 0.075)]


def test_grid_targets():
    labels, offsets = grid_targets([(("red", "cube"), 0.5, 0.25)], WORDS, 4, 0.6)
    # The object lies at (2, 1) in cells, on the corner of four of them, whose centres are half a cell away.
    at = [y * 4 + x for y in (0, 1) for x in (1, 2)]
    assert sorted(np.flatnonzero(labels[:, WORDS["cube"]])) == sorted(at)
    np.testing.assert_array_equal(labels[:, WORDS["red"]], labels[:, WORDS["cube"]])
    assert labels[:, WORDS["ball"]].sum() == 0
    np.testing.assert_allclose(offsets[1 * 4 + 1], [0.5, -0.5])
    assert np.isnan(np.delete(offsets, at, axis=0)).all()


def test_attention_loss_is_minus_log_probability():
    torch.manual_seed(0)
    scores, text = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 4)
    applies = torch.zeros(2, 1, 4, 5, dtype=torch.bool)
    applies[0, 0, 0, [1, 3]] = True
    weights = torch.cat([scores, text, torch.zeros(2, 3, 4, OTHERS)], -1).softmax(-1)
    expected = -weights[..., 5:].sum(-1).log()
    expected[0, :, 0] = -weights[0, :, 0, [1, 3]].sum(-1).log()
    torch.testing.assert_close(attention_loss(scores, text, applies), expected.mean())


def test_scores_are_those_of_the_models_first_layer(vlm):
    """Softmax over our scores equals the attention that the language model itself computes."""
    words = [40, 55]
    phase = VisionPhase(vlm, words)
    image = torch.randn(1, 4, vlm.config.text_config.hidden_size)
    with torch.no_grad():
        scores, text = phase.scores(image, torch.tensor(4))
        row = torch.cat([image, phase.embeddings(torch.tensor([[words[1]]]))], 1)
        attention = vlm.model.text_model(inputs_embeds=row, output_attentions=True).attentions[0]
    ours = torch.cat([scores[0, :, 1], text[:, 1, 1:2]], -1).softmax(-1)
    torch.testing.assert_close(ours, attention[0, :, 4], atol=1e-5, rtol=1e-4)


def test_match_rms_leaves_the_first_attention_alone(vlm):
    import copy

    model = copy.deepcopy(vlm)
    pixels = torch.rand(3, 3, 32, 32) * 2 - 1

    def first_attention():
        with torch.no_grad():
            patches = model.model.vision_model(pixel_values=pixels, patch_attention_mask=None).last_hidden_state
            image = model.model.connector(patches)
            rms = image.pow(2).mean().sqrt()
            return rms, model.model.text_model(inputs_embeds=image, output_attentions=True).attentions[0]

    _, before = first_attention()
    match_rms(model, pixels)
    rms, after = first_attention()
    assert rms == pytest.approx(0.06, rel=1e-3)
    table = model.model.text_model.get_input_embeddings().weight
    torch.testing.assert_close(table[10:20].pow(2).mean(1).sqrt(), torch.full((10,), 0.06), atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(before, after, atol=2e-2, rtol=0)  # the norm's epsilon is felt a little


def test_name_texts_and_grounding_gradient(vlm, nano_vlm):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(nano_vlm)
    located = [(("red", "cube"), 0.2, 0.3), (("green", "ball"), 0.8, 0.9)]
    ids, named, points = name_texts(located, tokenizer, np.random.default_rng(0))
    text = tokenizer.decode([ids[i] for i in named])
    assert sorted(text.split()) == ["ball", "cube", "green", "red"]
    assert len(points) == len(named) and set(points) == {(0.2, 0.3), (0.8, 0.9)}
    out = GroundingPhase(vlm)(
        torch.rand(1, 3, 32, 32), torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long),
        torch.tensor([named]), torch.tensor([points]), torch.tensor(True),
    )  # fmt: skip
    out["loss"].backward()
    assert vlm.model.connector.modality_projection.proj.weight.grad.abs().sum() > 0
    vlm.zero_grad()


def test_sincos_rows_differ():
    table = sincos_2d(8, 32)
    distances = torch.cdist(table, table) + 10 * torch.eye(64)
    assert table.shape == (64, 32) and distances.min() > 0.1


def test_all_phases_run(tmp_path):
    root = make_questions("tabletop:lift", 16, tmp_path / "q", image_size=32, workers=1, progress=False)
    config = PretrainConfig(
        output=str(tmp_path / "out"), questions=str(root), image_size=32, patch_size=8, vocab_size=400, batch_size=4,
        vision={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2},
        text={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
              "num_key_value_heads": 2, "head_dim": 16},
        vision_steps=2, grounding_steps=2, steps=2, warmup_steps=1,
    )  # fmt: skip
    folder = pretrain(config)
    from transformers import AutoModelForImageTextToText

    assert AutoModelForImageTextToText.from_pretrained(folder).config.text_config.hidden_size == 32
