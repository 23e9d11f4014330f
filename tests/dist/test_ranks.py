"""What two ranks share: equal gradients and weights; what is not synchronised is caught."""

import json
import re

import fake
import pytest
from ranks import train_and_keep, two_ranks

from burnish.core.errors import BurnishError
from burnish.methods.objective import OBJECTIVES


class Drift(fake.Objective):
    """Edits gradients by something that differs between the ranks: what a method must never do."""

    def edit_gradients(self, run, batch, grads):
        grads["head.bias"].add_(run.accelerator.process_index)
        return {}


class Recorder(fake.Objective):
    """Writes down the batch's rows and the averaged gradient of one parameter, for each rank."""

    def edit_gradients(self, run, batch, grads):
        rank = run.accelerator.process_index
        row = {"rows": batch["index"].tolist(), "grad": grads["head.bias"].tolist(), "names": sorted(grads)}
        with open(f"{run.output}.{rank}.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
        return {}


def rank_main(rank, root, questions, output, case):
    fake.register()
    from burnish.train import step

    OBJECTIVES.register("drift")(Drift)
    OBJECTIVES.register("recorder")(Recorder)
    if case == "ignored":  # data-parallel training is told to leave one module alone
        step.Step._ddp_params_and_buffers_to_ignore = ["policy.head.weight", "policy.head.bias"]
    names = {"drift": "drift", "equal": "probe", "recorded": "recorder"}.get(case, "")
    more = [f"--objectives=[{{name: {names}}}]"] if names else []
    if case == "equal":
        more += [*fake.everything(questions)[:-1]]
    report = {}
    try:
        report["weights"] = train_and_keep(fake.recipe(root, output, *more))[1]
    except BurnishError as error:
        report["error"] = str(error)
    with open(f"{output}.{rank}.json", "w") as file:
        json.dump(report, file)


def reports_of(dataset, questions, folder, case):
    two_ranks(rank_main, dataset, questions, folder / case, case)
    return [json.loads((folder / f"{case}.{rank}.json").read_text()) for rank in range(2)]


def test_equal_weights_after_steps_with_everything_switched_on(dataset, questions, tmp_path):
    one, two = reports_of(dataset, questions, tmp_path, "equal")
    assert "error" not in one, one["error"]
    assert one["weights"] == two["weights"]
    base = {n: p.detach().flatten().tolist() for n, p in fake.FakePolicy().named_parameters()}
    assert all(one["weights"][n] != base[n] for n in base)  # and every one was trained


def test_gradients_are_equal_on_different_batches(dataset, questions, tmp_path):
    reports = reports_of(dataset, questions, tmp_path, "recorded")
    assert reports[0]["weights"] == reports[1]["weights"]
    logs = [
        [json.loads(line) for line in (tmp_path / f"recorded.{rank}.jsonl").read_text().splitlines()]
        for rank in range(2)
    ]
    assert len(logs[0]) == 12
    for one, two in zip(*logs, strict=True):
        assert one["grad"] == two["grad"] and one["rows"] != two["rows"]
        assert not any(name.startswith("words") for name in one["names"])  # reached by no loss: no gradient, no error


@pytest.mark.parametrize(
    ("case", "words"), [("ignored", "gradients of 2 parameters .* head"), ("drift", "gradients of 1 .*head.bias")]
)
def test_self_check_catches_what_is_not_synchronised(dataset, questions, tmp_path, case, words):
    for report in reports_of(dataset, questions, tmp_path, case):
        assert re.search(words, report["error"])
