"""Two ranks: the projectors' gradients are averaged like all others, and both ranks hold equal weights afterwards."""

import json

import fake
from ranks import train_and_keep, two_ranks


def rank_main(rank, root, output):
    import align_student

    import burnish.policies
    from burnish.train.objective import OBJECTIVES

    burnish.policies.load_policy = align_student.load_student
    lines = []

    class Recorder(fake.Objective):
        def edit_gradients(self, run, batch, grads):
            own = {n: g.flatten()[:5].tolist() for n, g in grads.items() if n.startswith("objectives.align")}
            lines.append({"rows": batch["index"].tolist(), "grads": own})
            return {}

    OBJECTIVES.register("recorder")(Recorder)
    align = "{name: align, teacher: 'edges:Edges', match: 0.5, measure_every: 2, sharing: independent}"
    run, weights = train_and_keep(
        align_student.recipe(root, output, align, "{name: recorder}", more=["--train.steps=5"])
    )
    strength = float(run.objectives["align"].strength)
    with open(f"{output}.{rank}.json", "w") as file:
        json.dump({"steps": lines, "weights": weights, "strength": strength}, file)


def test_projectors_are_synchronised(dataset, edges, tmp_path):
    two_ranks(rank_main, dataset, tmp_path / "run")
    one, two = (json.loads((tmp_path / f"run.{rank}.json").read_text()) for rank in range(2))
    assert one["weights"] == two["weights"] and one["strength"] == two["strength"]
    assert any(name.startswith("objectives.align") for name in one["weights"])
    for a, b in zip(one["steps"], two["steps"], strict=True):
        assert a["rows"] != b["rows"] and a["grads"] == b["grads"] and a["grads"]
