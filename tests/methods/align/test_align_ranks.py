"""Two ranks: the projectors' gradients are averaged like all others, and both ranks hold equal weights afterwards."""

import json
import multiprocessing
import os
import socket
import sys


def rank_main(rank, port, root, output, teacher_folder):
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    sys.path.insert(0, teacher_folder)
    import align_student
    import fake
    import torch

    import burnish.policies
    from burnish.train import loop
    from burnish.train.objective import OBJECTIVES

    torch.set_num_threads(1)
    burnish.policies.load_policy = align_student.load_student
    lines = []

    class Recorder(fake.Objective):
        def edit_gradients(self, run, batch, grads):
            own = {n: g.flatten()[:5].tolist() for n, g in grads.items() if n.startswith("objectives.align")}
            lines.append({"rows": batch["index"].tolist(), "grads": own})
            return {}

    OBJECTIVES.register("recorder")(Recorder)
    align = "{name: align, teacher: 'edges:Edges', match: 0.5, measure_every: 2, sharing: independent}"
    kept = []
    original = loop.Run

    class Run(original):
        def __init__(self, *args):
            super().__init__(*args)
            kept.append(self)

    loop.Run = Run
    loop.train(align_student.recipe(root, output, align, "{name: recorder}", more=["--train.steps=5"]), progress=False)
    weights = {n: p.detach().flatten().tolist() for n, p in kept[0].trained.items()}
    strength = float(kept[0].objectives["align"].strength)
    with open(f"{output}.{rank}.json", "w") as file:
        json.dump({"steps": lines, "weights": weights, "strength": strength}, file)
    torch.distributed.destroy_process_group()


def test_projectors_are_synchronised(dataset, edges, tmp_path):
    context = multiprocessing.get_context("spawn")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = (port, dataset, tmp_path / "run", str(edges))
    ranks = [context.Process(target=rank_main, args=(rank, *arguments)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(300)
        assert process.exitcode == 0
    one, two = (json.loads((tmp_path / f"run.{rank}.json").read_text()) for rank in range(2))
    assert one["weights"] == two["weights"] and one["strength"] == two["strength"]
    assert any(name.startswith("objectives.align") for name in one["weights"])
    for a, b in zip(one["steps"], two["steps"], strict=True):
        assert a["rows"] != b["rows"] and a["grads"] == b["grads"] and a["grads"]
