"""Two ranks: the projectors' gradients are averaged like all others, and both ranks hold equal weights afterwards."""

import json

import fake
import numpy as np
from ranks import train_and_keep, two_ranks

ALIGN = "name: align, teacher: 'edges:Edges', measure_every: 2, sharing: independent"
OWN = "objectives.align"
PLAIN = "--data.augment=false"  # shifts are drawn on each rank


def record(rank, root, output, option, *more):
    """Train, and write rows and projector gradients of each step, the final weights and the strength of alignment."""
    import align_student

    import burnish.policies
    from burnish.methods.objective import OBJECTIVES

    burnish.policies.load_policy = align_student.load_student
    lines = []

    class Recorder(fake.Objective):
        def edit_gradients(self, run, batch, grads):
            own = {n: g.flatten().tolist() for n, g in grads.items() if n.startswith(OWN)}
            lines.append({"rows": batch["index"].tolist(), "grads": own})
            return {}

    OBJECTIVES.register("recorder")(Recorder)
    align = f"{{{ALIGN}, {option}}}"
    recipe = align_student.recipe(root, output, align, "{name: recorder}", more=["--train.steps=5", *more])
    run, weights = train_and_keep(recipe)
    strength = float(run.objectives["align"].strength)
    with open(f"{output}.{rank}.json", "w") as file:
        json.dump({"steps": lines, "weights": weights, "strength": strength}, file)


def read(output, rank):
    return json.loads(output.with_name(f"{output.name}.{rank}.json").read_text())


def test_projectors_are_synchronised(dataset, edges, tmp_path):
    two_ranks(record, dataset, tmp_path / "run", "gradient_norm_ratio: 0.5")
    one, two = (read(tmp_path / "run", rank) for rank in range(2))
    assert one["weights"] == two["weights"] and one["strength"] == two["strength"]
    assert any(name.startswith(OWN) for name in one["weights"])
    for a, b in zip(one["steps"], two["steps"], strict=True):
        assert a["rows"] != b["rows"] and a["grads"] == b["grads"] and a["grads"]


def test_two_ranks_with_half_batches_are_one_with_the_whole(dataset, edges, tmp_path):
    two_ranks(record, dataset, tmp_path / "halves", "weight: 0.5", "--train.batch_size=5", PLAIN)
    two_ranks(record, dataset, tmp_path / "whole", "weight: 0.5", "--train.batch_size=10", PLAIN, world=1)
    halves, whole = [read(tmp_path / "halves", rank)["steps"][0] for rank in range(2)], read(tmp_path / "whole", 0)
    whole = whole["steps"][0]
    assert halves[0]["rows"] + halves[1]["rows"] == whole["rows"]
    assert halves[0]["grads"].keys() == whole["grads"].keys() and whole["grads"]
    for name, gradient in whole["grads"].items():
        np.testing.assert_allclose(halves[0]["grads"][name], gradient, rtol=1e-4, atol=1e-7, err_msg=name)
