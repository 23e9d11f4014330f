"""Parts 4 to 7: latency of `act`, decoders against the bytes of the weights, closed loop, server."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from bench.gpu_meter import Setting, attempted, flops, kept, launches, median_of, ratio, roofline, timed
from burnish.core.errors import BurnishError

TIERS: dict[str, Callable[[Any], Callable[[dict[str, Any]], Any]]] = {
    "lerobot": lambda policy: (
        lambda batch: policy.postprocessor(policy.policy.predict_action_chunk(policy.preprocessor(dict(batch))))
    ),
    "exact": lambda policy: _Executed(policy, "exact"),
    "exact_graph": lambda policy: _Executed(policy, "exact", graph=True),
    "fused_graph": lambda policy: _Executed(policy, "fused", graph=True),
    "bf16_graph": lambda policy: _Executed(policy, "bf16", graph=True),
}
"""Ways to run a call by name, each from a policy to a function of a batch; compiled ones take minutes to make."""
CHUNKS = (8, 50)
"""Control steps of a chunk: 56 and 350 tokens at 7 dimensions."""


class _Executed:
    """The executor's call. With a graph its first one captures that; on a CPU there is none."""

    def __init__(self, policy: Any, tier: str, graph: bool = False):
        from burnish.runtime.executor import Runtime

        self.runtime = Runtime(policy, tier=tier, graph=graph)

    def __call__(self, batch: dict[str, Any]) -> Any:
        return self.runtime.act(batch)


def act_smolvla(setting: Setting) -> Iterator[tuple[str, dict[str, Any]]]:
    """One call of SmolVLA with two views, every tier, in float32 and bf16, where its time goes, and what else there is
    to the runtime.
    """
    policy = _two_views(setting, "smolvla", setting.pick(256, 32))
    yield from _calls(setting, "smolvla", policy)
    yield from _runtime(setting, policy)


def act_pi05(setting: Setting) -> Iterator[tuple[str, dict[str, Any]]]:
    """The same calls of pi05."""
    yield from _calls(setting, "pi05", _two_views(setting, "pi05", setting.pick(256, 32)))


def _two_views(setting: Setting, name: str, image_size: int) -> Any:
    from workshop.real import make_real

    return make_real(name, device=setting.device, cameras=("front", "wrist"), image_size=image_size,
                     tiny=setting.rehearse)  # fmt: skip


def _calls(setting: Setting, name: str, policy: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    import torch

    from burnish.runtime.observations import observations
    from burnish.runtime.profile import profile

    batch = observations(policy, 1)
    for precision in ("float32", "bf16"):
        for tier, make in TIERS.items():
            if (tier, precision) == ("bf16_graph", "bf16"):
                continue  # it is in bf16 without autocast

            def measured(make: Callable[..., Any] = make, precision: str = precision) -> dict[str, Any]:
                made = make(policy)
                call = partial(made, batch)
                with torch.no_grad(), _autocast(setting, precision):
                    found = timed(setting, call, setting.pick(10, 2), setting.pick(3, 1))
                    if precision == "float32":
                        found["launches"] = launches(setting, call)
                        if isinstance(made, _Executed):
                            found["parity"] = made.runtime.verify(batch)
                return found

            yield f"{name}_{tier}_{precision}", attempted(measured)
            setting.clear()

    def anatomy() -> dict[str, Any]:
        with torch.no_grad(), _autocast(setting, "bf16"):
            found = profile(policy, [batch], repeats=setting.pick(5, 1), warmup=1, progress=False).figures()
            return {"stages": found["stages"], "tflop": flops(partial(policy.act, batch)) / 1e12}

    yield f"{name}_anatomy", attempted(anatomy)


def _runtime(setting: Setting, policy: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """AB2 in four passes against Euler in ten, guidance without a graph and by one, and several observations a call."""
    import torch

    from burnish.runtime.executor import Runtime
    from burnish.runtime.observations import observations
    from burnish.sampling.steering import Steering

    def found(call: Callable[[], Any]) -> dict[str, Any]:
        with torch.no_grad():
            return attempted(lambda: timed(setting, call, setting.pick(10, 1), setting.pick(2, 1)))

    batch = observations(policy, 1)
    for sampler in ("euler:10", "ab2:4"):
        policy.sampler = sampler
        yield f"smolvla_{sampler.replace(':', '_')}", found(partial(_Executed(policy, "fused", graph=True), batch))
    policy.sampler, plain = "", Runtime(policy, tier="fused", graph=False)
    rest = plain.act(batch).raw[:, 2:]
    yield "smolvla_unguided", found(partial(plain.act, batch))
    graphed = Runtime(policy, tier="fused")
    for jacobian in ("identity", "vjp"):
        steering = Steering(rest, delay=2, jacobian=jacobian)
        for name, runtime in (("", plain), ("graph_", graphed)):
            yield f"smolvla_{name}guided_{jacobian}", found(partial(runtime.act, batch, steering=steering))
    for width in setting.pick((1, 2, 4, 8), (2,)):
        several = observations(policy, width)
        row = found(partial(_Executed(policy, "fused", graph=True), several))
        yield f"smolvla_rows_{width}", row | ({"per_second": 1000 * width / row["median"]} if "median" in row else {})


def _autocast(setting: Setting, precision: str) -> AbstractContextManager[Any]:
    import torch

    return torch.autocast(setting.device.split(":")[0], torch.bfloat16) if precision == "bf16" else nullcontext()


def act_figures(found: dict[str, Any]) -> dict[str, Any]:
    shown: dict[str, Any] = {}
    for name, row in found.items():
        if "parity" in row:
            shown[f"{name}_bitwise"] = row["parity"]["bitwise"]
        if "median" in row:
            shown |= {f"{name}_ms": row["median"], f"{name}_p99_ms": row["p99"]}
            shown |= {f"{name}_{key}": row[key] for key in ("launches", "per_second") if key in row}
    for name in ("smolvla", "pi05"):
        for tier in TIERS:
            parity = found.get(f"{name}_{tier}_float32", {}).get("parity", {"holds": True})
            if tier != "lerobot" and parity["holds"]:  # else the ratio would be of something else
                times = (median_of(found, f"{name}_{kind}_float32") for kind in ("lerobot", tier))
                shown[f"{name}_{tier}_over_lerobot"] = ratio(*times)
    return kept(shown)


def decode_3b(setting: Setting) -> Iterator[tuple[str, dict[str, Any]]]:
    """Decoders on a random backbone of 3 billion in bf16, see `_decode`."""
    yield from _decode(setting, "discrete-3b")


def decode_7b(setting: Setting) -> Iterator[tuple[str, dict[str, Any]]]:
    """The same of 7 billion."""
    yield from _decode(setting, "discrete-7b")


def _decode(setting: Setting, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Decoders with a schedule in as many passes as ours.

    Every pass must read all weights of the language model once. What is compared with that is the time of a decode
    less that of the prompt's pass, for each further pass.
    """
    best = roofline(setting)
    yield "roofline", best
    policy = _two_views(setting, name, setting.pick(224, 32)).requires_grad_(False)
    text = policy.policy.model.text_model
    size = sum(p.numel() * p.element_size() for n, p in text.named_parameters() if "embed_tokens" not in n)
    floor = size / best["copy_gb_s"] / 1e6
    yield name, {"language_model_gb": size / 1e9, "floor_ms": floor}
    for steps in setting.pick(CHUNKS, (4,)):
        for kind, found in _decoders(setting, policy, steps):
            yield f"{name}_{7 * steps}_{kind}", found | {"floor_ms": floor}


def _decoders(setting: Setting, policy: Any, steps: int) -> Iterator[tuple[str, dict[str, Any]]]:
    import torch

    from burnish.runtime.observations import observations
    from burnish.sampling.token_model import make_decoder

    blocks, whole = models(policy, steps)
    with torch.no_grad():
        prompt = blocks.embed(policy.preprocessor(dict(observations(policy, 1))))
        prefill = timed(setting, partial(blocks.prefill, prompt), setting.pick(5, 1))["median"]
    kinds = ("together", "pipelined", "sequential")[: 3 if steps == min(CHUNKS) or setting.rehearse else 2]
    made: dict[str, Any] = {kind: make_decoder(kind, blocks) for kind in kinds}
    passes = made["together"](prompt).passes
    made["one_pass"] = make_decoder("one_pass", whole)
    for kind in ("prompt_cached", "bidirectional"):
        made[f"{kind}_equal"] = make_decoder(kind, whole, steps=passes)
    while made:  # each one's buffers and graphs go before the next one's come
        kind, decoder = next(iter(made.items()))

        def measured(decoder: Any = decoder) -> dict[str, Any]:
            found = timed(setting, partial(decoder, prompt), setting.pick(5, 1), setting.pick(2, 1))
            return found | {"prefill_ms": prefill, "passes": decoder(prompt).passes}

        yield kind, attempted(measured)
        del made[kind], decoder, measured


def models(policy: Any, steps: int) -> tuple[Any, Any]:
    """The policy's backbone with chunks of `steps`: block-causal over control steps, and bidirectional."""
    from dataclasses import replace

    import torch

    from burnish.policies.discrete.network import NetTokenModel, TokenNet

    config = replace(policy.config, chunk_size=steps, n_action_steps=steps)
    net = policy.policy.model
    kind = next(net.text_model.parameters()).dtype
    with torch.device(policy.device):
        net = TokenNet(config, net.vlm).to(kind).eval().requires_grad_(False)
    blocks, whole = NetTokenModel(net), NetTokenModel(net)
    whole.block = whole.length
    return blocks, whole


def decode_figures(found: dict[str, Any]) -> dict[str, Any]:
    shown: dict[str, Any] = {}
    for name, row in found.items():
        if "passes" not in row:
            continue
        shown[f"{name}_ms"], shown[f"{name}_passes"] = row["median"], row["passes"]
        if row["passes"] > 1:
            each = (row["median"] - row["prefill_ms"]) / (row["passes"] - 1)
            shown[f"{name}_pass_ms"], shown[f"{name}_pass_over_roofline"] = each, each / row["floor_ms"]
        base, _, kind = (
            name.rpartition("_") if not name.endswith("_equal") else name.removesuffix("_equal").rpartition("_")
        )
        if kind in ("cached", "bidirectional"):
            base = base.removesuffix("_prompt")
            shown[f"{name}_over_together"] = ratio(row["median"], median_of(found, f"{base}_together"))
    return kept(shown)


def loop(setting: Setting) -> Iterator[tuple[str, dict[str, Any]]]:
    """Closed loop on the tabletop: a SmolVLA of real size on the GPU, simulators on the CPU's cores."""
    from burnish.evaluate.rollout import evaluate
    from workshop.real import make_real

    setting.clear()
    policy = make_real("smolvla", device=setting.device, image_size=setting.pick(96, 32), state_dim=4, action_dim=4,
                       tiny=setting.rehearse)  # fmt: skip
    episodes, limit = setting.pick((32, 100), (2, 10))
    for tier in ("", "exact"):
        with TemporaryDirectory() as folder:
            try:
                found = evaluate(policy, "tabletop:lift", episodes=episodes, output=Path(folder) / "eval", video=False,
                                 max_steps=limit, workers=setting.pick(0, 1), tier=tier, progress=False)  # fmt: skip
            except BurnishError as error:  # simulators that cannot render here, say
                yield f"tabletop_{tier or 'lerobot'}", {"skipped": str(error)}
                continue
        steps = sum(record.steps for record in found.records)
        yield f"tabletop_{tier or 'lerobot'}", {
            "n": episodes, "seconds": found.seconds, "control_steps": steps, "max_steps": limit,
            "episodes_per_minute": 60 * episodes / found.seconds, **found.latency_ms,
        }  # fmt: skip


def loop_figures(found: dict[str, Any]) -> dict[str, Any]:
    shown = {}
    for name, row in found.items():
        if "seconds" in row:
            shown[f"{name}_episodes_per_minute"] = row["episodes_per_minute"]
            shown[f"{name}_control_steps_per_s"] = row["control_steps"] / row["seconds"]
            shown[f"{name}_call_ms"] = row["p50"]
    return shown


def serve(setting: Setting) -> Iterator[tuple[str, dict[str, Any]]]:
    """The policy server around a SmolVLA of real size in the fused tier, eight clients that ask as fast as they can."""
    import threading

    if find_spec("websockets") is None or find_spec("msgpack") is None or find_spec("prometheus_client") is None:
        yield "server", {"skipped": "the extra `serve` is not installed"}
        return
    from burnish.runtime.client import PolicyClient
    from burnish.runtime.serve.rows import blank, profile_keys
    from burnish.runtime.serve.run import serve_policy
    from burnish.runtime.serve.server import ServeOptions

    setting.clear()
    policy = _two_views(setting, "smolvla", setting.pick(256, 32)).eval()
    ready, known = threading.Event(), []
    options = ServeOptions(port=0, rate=100_000, tier="fused")
    server = threading.Thread(target=serve_policy, args=(policy, options), kwargs={
        "ready": lambda *found: (known.extend(found), ready.set())})  # fmt: skip
    server.start()
    ready.wait(120)
    seen, took = blank(policy, profile_keys(policy, "lerobot")), []

    def ask() -> None:
        with PolicyClient(f"ws://127.0.0.1:{known[1]}") as one:
            for i in range(setting.pick(60, 2)):
                begin = time.perf_counter()
                one.infer(seen)
                took.extend([1000 * (time.perf_counter() - begin)] if i else [])

    clients, begin = [threading.Thread(target=ask) for _ in range(setting.pick(8, 2))], time.perf_counter()
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    wall = time.perf_counter() - begin
    known[2]()
    server.join(30)
    median, p99 = np.quantile(took, [0.5, 0.99])
    yield "server", {"n": len(took), "clients": len(clients), "p50_ms": float(median), "p99_ms": float(p99),
                     "per_second": len(took) / wall}  # fmt: skip


def serve_figures(found: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in found.get("server", {}).items() if isinstance(value, int | float)}
