"""Language verbs against transformers' own forwards; capture against sums of a layer's parts."""

import pytest
import torch

from burnish.core.errors import BurnishError
from burnish.policies.smolvla import SmolVLA


def texts(policy, question, answer):
    """Prompt and answer ids, spelt out here once more."""
    tok = policy.backbone.tokenizer
    prompt = tok(f"Question: {question}\nAnswer:", add_special_tokens=False)["input_ids"]
    if policy.backbone.bos:
        prompt = [tok.bos_token_id, *prompt]
    return prompt, [*tok(f" {answer}", add_special_tokens=False)["input_ids"], tok.eos_token_id]


def logits_of(policy, image, prompt, answer):
    """Logits [S, V] by transformers' whole-VLM forward, for one unpadded sample."""
    image = image[None] * 2 - 1  # 32 px is the size of the tiny policies' vision towers, or is resized below
    vlm = policy.vlm
    if isinstance(policy, SmolVLA):
        ids = [vlm.config.image_token_id] * 4 + prompt + answer
        return vlm(input_ids=torch.tensor([ids]), pixel_values=image[None]).logits[0]
    image = policy.policy._preprocess_images({"observation.images.top": (image + 1) / 2})[0][0]
    ids = [vlm.config.image_token_id] * 4 + prompt + answer
    kinds = [0] * (4 + len(prompt)) + [1] * len(answer)
    return vlm(
        input_ids=torch.tensor([ids]), pixel_values=image, token_type_ids=torch.tensor([kinds]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long), use_cache=False,
    ).logits[0]  # fmt: skip


def test_language_loss_is_log_softmax(policy, questions):
    loss = policy.language(questions)
    for i in range(3):
        prompt, answer = texts(policy, questions["question"][i], questions["answer"][i])
        log_p = logits_of(policy, questions["observation.images.top"][i], prompt, answer).log_softmax(-1)
        start = 4 + len(prompt)
        expected = torch.stack([-log_p[start + j - 1, token] for j, token in enumerate(answer)])
        assert loss.mask[i].nonzero()[:, 0].tolist() == list(range(start, start + len(answer)))
        torch.testing.assert_close(loss.per_token[i][loss.mask[i]], expected, rtol=1e-4, atol=1e-4)
    loss.mean.backward()
    assert all(p.grad is not None for n, p in policy.backbone_parameters())


def test_first_turn_of_several_is_the_single_turn(policy, questions):
    """Later turns cannot be seen from earlier ones."""
    single = policy.language(questions)
    many = {
        **questions,
        "question": [[q, "is it red?"] for q in questions["question"]],
        "answer": [[a, "no"] for a in questions["answer"]],
    }
    turns = policy.language(many)
    for i in range(3):
        one = single.per_token[i][single.mask[i]]
        torch.testing.assert_close(turns.per_token[i][turns.mask[i]][: len(one)], one, rtol=1e-4, atol=1e-4)
        assert turns.mask[i].sum() > len(one)


def test_batched_answers_equal_single_ones(policy, questions):
    together = policy.answer(questions, max_new_tokens=6)
    for i in range(3):
        one = {k: v[i : i + 1] for k, v in questions.items()}
        assert policy.answer(one, max_new_tokens=6) == together[i : i + 1]


def test_answers_are_greedy(policy, questions):
    """Each token is the arg max of a full forward over everything before it."""
    said = policy.answer({k: v[2:] for k, v in questions.items()}, max_new_tokens=4)[0]
    prompt, _ = texts(policy, questions["question"][2], "")
    tokens = []
    for _ in range(4):
        logits = logits_of(policy, questions["observation.images.top"][2], prompt, tokens)
        tokens.append(int(logits[-1].argmax()))
    tok = policy.backbone.tokenizer
    if tok.eos_token_id in tokens:
        tokens = tokens[: tokens.index(tok.eos_token_id)]
    assert tok.decode(tokens, skip_special_tokens=True).strip() == said


def test_acting_leaves_the_language_loss_alone(policy, questions, batch):
    before = policy.language(questions).per_token
    policy.act(batch)
    assert policy.language(questions).per_token.equal(before)


def test_question_batches_have_one_image(policy, questions, batch):
    with pytest.raises(BurnishError, match="2 images"):
        policy.language({**questions, "observation.images.wrist": batch["observation.images.wrist"]})
    other = {k.replace("top", "side"): v for k, v in questions.items()}
    assert policy.language(other).per_token.equal(policy.language(questions).per_token)


def parts_of(layer, seen):
    """Hooks that add up a layer's output from the residual before its MLP and the MLP itself."""
    return [
        layer.post_attention_layernorm.register_forward_pre_hook(lambda _m, a: seen.append(a[0].detach().clone())),
        layer.mlp.register_forward_hook(lambda _m, _a, out: seen.append(out.detach().clone())),
    ]


@pytest.mark.parametrize("verb", ["loss", "language"])
def test_captured_states_are_residual_plus_mlp(policy, batch, questions, verb):
    layers = range(policy.num_layers)
    seen = {i: [] for i in layers}
    handles = [h for i in layers for h in parts_of(policy.backbone.text_model.layers[i], seen[i])]
    with policy.capture(list(layers)) as captured:
        out = policy.loss(batch).total if verb == "loss" else policy.language(questions).mean
    for handle in handles:
        handle.remove()
    for i in layers:
        assert captured.hidden[i].equal(seen[i][0] + seen[i][1])
        assert captured.hidden[i].shape[:2] == captured.layout["text"].shape
    grads = torch.autograd.grad(out, captured.hidden[0])[0]
    assert grads.abs().sum() > 0
    with policy.capture([0]) as captured:
        pass
    assert not captured.hidden


def test_layout_points_at_the_embeddings(policy, batch):
    """Rows said to hold a camera, the text or the state hold just that at the entrance of the first layer."""
    entered = []
    first = policy.backbone.text_model.layers[0].input_layernorm
    handle = first.register_forward_pre_hook(lambda _m, a: entered.append(a[0]))
    with policy.capture([0]) as outer, policy.capture([1]) as captured:
        policy.loss(batch)
    handle.remove()
    assert outer.layout["text"].equal(captured.layout["text"]) and set(captured.hidden) == {1}
    prepared = policy.preprocessor(batch)
    images, _ = policy.prepare_images(prepared)
    scale = 48**0.5 if isinstance(policy, SmolVLA) else 1.0
    for camera, image in zip(("top", "wrist"), images, strict=True):
        expected = policy.embed_image(image) * scale
        torch.testing.assert_close(entered[0][:, captured.cameras[camera]], expected)
    tokens, mask = prepared["observation.language.tokens"], prepared["observation.language.attention_mask"]
    assert captured.layout["text"].sum(1).equal(mask.sum(1))
    text = policy.backbone.embed_text(tokens) * scale
    torch.testing.assert_close(entered[0][captured.layout["text"]], text[mask])
    assert captured.layout["image"].sum(1).tolist() == [8, 8, 8]
    if isinstance(policy, SmolVLA):
        state = policy.policy.model.state_proj(policy.policy.prepare_state(prepared))
        torch.testing.assert_close(entered[0][captured.layout["state"]], state)
    else:
        assert not captured.layout["state"].any()


def test_capture_knows_its_layers(policy):
    with pytest.raises(BurnishError, match="layers"), policy.capture([policy.num_layers]):
        pass
